-- Reads part of a room's log as it is at one moment. A room without a log gets an epoch.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 "newest", "after" or "before"  8 seq  9 limit  10 bytes at most, one entry apart
-- Returns epoch, top, oldest entry kept (0 for none), the former epoch and its last seq or empty,
-- the ordinal of the epoch that a deletion began or 0, the term in which the room was declared
-- whole last, and entries { seq, epoch, stamp, envelope }:
-- oldest first for "after", newest first else.

local epoch, top, fields = whole()
if not epoch then
    return stale
end

local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local oldest = first and seq_of(first[1]) or '0'

-- Entries differ in size a thousandfold, so they are fetched a few at a time until it is enough.
local forward = ARGV[7] == 'after'
local cursor = ARGV[7] == 'newest' and '+' or '(' .. ARGV[8] .. '-0'
local left, bytes, above = tonumber(ARGV[9]), tonumber(ARGV[10]), 0
if ARGV[7] == 'before' and tonumber(ARGV[8]) == 0 then
    -- Nothing is below, and Redis takes `(0-0` for an error.
    left = 0
end
local entries = {}
while left > 0 and bytes > 0 do
    local count = math.min(left, 16)
    local some
    if forward then
        some = redis.call('XRANGE', KEYS[1], cursor, '+', 'COUNT', count)
    else
        some = redis.call('XREVRANGE', KEYS[1], cursor, '-', 'COUNT', count)
    end
    for _, entry in ipairs(some) do
        local seq = seq_of(entry[1])
        above = math.max(above, tonumber(seq))
        -- What no gateway wrote leaves a step, which readers find.
        local of, stamp, envelope = parts_of_entry(entry)
        if of then
            bytes = bytes - #envelope
            if bytes < 0 and #entries > 0 then
                break
            end
            entries[#entries + 1] = { seq, of, stamp, envelope }
        end
    end
    if #some < count then
        break
    end
    left = left - count
    cursor = '(' .. some[count][1]
end
if above > top then
    -- The log has entries above the number that stands in its meta. A top that is shown goes on.
    epoch, top = repaired(fields, int(fields[4], 0, 'log_meta'))
end
local meta = redis.call('HMGET', KEYS[2], 'pe', 'ps', 'd', 'n')
local former, former_top = meta[1], int(meta[2], nil, 'log_meta')
if former and not (is_epoch(former) and former_top) then
    bad('log_meta')
    former = nil
end
if not former then
    former, former_top = '', ''
else
    former_top = digits(former_top)
end
local deleted, term = int(meta[3], 0, 'log_meta'), int(meta[4], 0, 'log_meta')
return { epoch, digits(top), oldest, former, former_top, digits(deleted), digits(term), entries }
