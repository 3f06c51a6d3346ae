-- Reads part of a room's log as it is at one moment. A room without a log gets an epoch.
--
-- KEYS  1 log (stream)  2 meta (hash)  3 barrier
-- ARGV  1 "newest", "after" or "before"  2 seq  3 limit  4 bytes at most, one entry apart
--       5 random part of an epoch  6 meta ttl, ms  7 token
-- Returns epoch, top, oldest entry kept (0 for none), the former epoch and its last seq or empty,
-- the ordinal of the epoch that a deletion began or 0, the term in which the room was declared whole
-- last, and entries { seq, epoch, stamp, envelope }:
-- oldest first for "after", newest first else.

local epoch, top = whole(KEYS[2], KEYS[1], KEYS[3], ARGV[7], ARGV[5], ARGV[6])
if not epoch then
    return stale
end
local meta = redis.call('HMGET', KEYS[2], 'pe', 'ps', 'd', 'n')

local function seq_of(id)
    return string.sub(id, 1, string.find(id, '-', 1, true) - 1)
end

local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local oldest = first and seq_of(first[1]) or '0'

-- Entries differ in size a thousandfold, so they are fetched a few at a time until it is enough.
local forward = ARGV[1] == 'after'
local cursor = ARGV[1] == 'newest' and '+' or '(' .. ARGV[2] .. '-0'
local left, bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
if ARGV[1] == 'before' and tonumber(ARGV[2]) == 0 then
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
        local envelope = entry[2][6]
        bytes = bytes - #envelope
        if bytes < 0 and #entries > 0 then
            break
        end
        entries[#entries + 1] = { seq_of(entry[1]), entry[2][2], entry[2][4], envelope }
    end
    if #some < count then
        break
    end
    left = left - count
    cursor = '(' .. some[count][1]
end
return { epoch, digits(top), oldest, meta[1] or '', meta[2] or '', meta[3] or '0', meta[4] or '0', entries }
