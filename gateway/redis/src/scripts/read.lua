-- Reads a range of a room's log as it is at one moment. A room without a log gets an epoch.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 "newest", "after" or "before"  8 seq  9 limit  10 the most bytes, except for a single entry
-- Returns epoch, top, the oldest entry kept (0 for none), the former epoch and its last seq or empty,
-- the ordinal of the epoch that a deletion began or 0, the generation under which the room was opened
-- last, and entries { seq, epoch, origin, envelope }: oldest first for "after", else newest first.

local epoch, top, fields = open_room()
if not epoch then
    return unagreed
end

local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local oldest = first and seq_of(first[1]) or '0'

-- Entries differ in size a thousandfold, so that they are fetched a few at a time until it is
-- enough.
local forward = ARGV[7] == 'after'
local cursor = ARGV[7] == 'newest' and '+' or '(' .. ARGV[8] .. '-0'
local remaining, bytes, highest = tonumber(ARGV[9]), tonumber(ARGV[10]), 0
if ARGV[7] == 'before' and tonumber(ARGV[8]) == 0 then
    -- There is no number below, and Redis rejects `(0-0`.
    remaining = 0
end
local entries = {}
while remaining > 0 and bytes > 0 do
    local count = math.min(remaining, 16)
    local some
    if forward then
        some = redis.call('XRANGE', KEYS[1], cursor, '+', 'COUNT', count)
    else
        some = redis.call('XREVRANGE', KEYS[1], cursor, '-', 'COUNT', count)
    end
    for _, entry in ipairs(some) do
        local seq = seq_of(entry[1])
        highest = math.max(highest, tonumber(seq))
        -- An entry that no gateway wrote leaves a gap, which readers detect.
        local of_epoch, origin, envelope = parse_entry(entry)
        if of_epoch then
            bytes = bytes - #envelope
            if bytes < 0 and #entries > 0 then
                break
            end
            entries[#entries + 1] = { seq, of_epoch, origin, envelope }
        end
    end
    if #some < count then
        break
    end
    remaining = remaining - count
    cursor = '(' .. some[count][1]
end
if highest > top then
    -- The log has entries above the number in its meta. A top that was returned is not lowered.
    epoch, top = repair(fields, int(fields[4], 0, 'log_meta'))
end
local meta = redis.call('HMGET', KEYS[2], 'pe', 'ps', 'd', 'n')
local former, former_top = meta[1], int(meta[2], nil, 'log_meta')
if former and not (is_epoch(former) and former_top) then
    report_invalid('log_meta')
    former = nil
end
if not former then
    former, former_top = '', ''
else
    former_top = digits(former_top)
end
local deleted, generation = int(meta[3], 0, 'log_meta'), int(meta[4], 0, 'log_meta')
return { epoch, digits(top), oldest, former, former_top, digits(deleted), digits(generation), entries }
