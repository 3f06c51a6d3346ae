-- Appends an entry to a room's log and passes it on, in one atomic step.
--
-- KEYS  1 log (stream)  2 meta (hash)  3, 4 ids (two hashes that take turns)
-- ARGV  1 channel  2 id: "<user> <uuid>"  3 envelope  4 an epoch, used where the room has none
--       5 retention: entries kept in any case  6 window of the others, ms  7 bytes of the log
--       8 log ttl, ms  9 meta ttl, ms  10 dedup window, ms
-- Returns "<epoch>:<seq>" and 1 where the id was known.
--
-- All checks come first, and XADD is the first write: an error leaves everything as it was.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Ids of this window stand in one hash, those of the last in the other. A hash expires when its
-- turn comes again, so that forgetting costs nothing and a room has the same four keys always.
local dedup_window = tonumber(ARGV[10])
local turn = math.floor(now / dedup_window)
local newer, older = KEYS[3 + turn % 2], KEYS[4 - turn % 2]
local known = redis.call('HGET', newer, ARGV[2]) or redis.call('HGET', older, ARGV[2])
if known then
    return { known, 1 }
end

-- e epoch, s top; at, from, prev: when the present window began, its first entry, and the first
-- entry of the window before. What stands before `prev` is older than a window.
local meta = redis.call('HMGET', KEYS[2], 'e', 's', 'at', 'from', 'prev')
local epoch, top = meta[1], tonumber(meta[2])
local fresh = not epoch
if fresh then
    epoch, top = ARGV[4], 0
end
local seq = top + 1
local at, from, prev = tonumber(meta[3]), tonumber(meta[4]), tonumber(meta[5])
local turned = not at or now - at >= tonumber(ARGV[6]) or now < at
if turned then
    at, from, prev = now, seq, from or seq
end

-- Numbers above 10^14 would be written as 1e+15 by tostring.
local number = string.format('%.0f', seq)
if fresh then
    -- The numbers are lost but the log is not: it cannot be continued.
    redis.call('DEL', KEYS[1])
end
local keep_from = math.min(seq - tonumber(ARGV[5]) + 1, prev)
if keep_from > 1 then
    redis.call('XADD', KEYS[1], 'MINID', '~', string.format('%.0f', keep_from), number .. '-0',
        'e', epoch, 'p', ARGV[3])
else
    redis.call('XADD', KEYS[1], number .. '-0', 'e', epoch, 'p', ARGV[3])
end
if turned then
    redis.call('HSET', KEYS[2], 'e', epoch, 's', number, 'at', at, 'from', from, 'prev', prev)
else
    redis.call('HSET', KEYS[2], 'e', epoch, 's', number)
end

-- The size of a stream costs a sample of it, so it is looked at now and then: every 64th entry,
-- and at each that is large.
if seq % 64 == 0 or #ARGV[3] > 65536 then
    local bytes = redis.call('MEMORY', 'USAGE', KEYS[1])
    local bytes_max = tonumber(ARGV[7])
    if bytes > bytes_max then
        local keep = math.floor(redis.call('XLEN', KEYS[1]) * bytes_max / bytes)
        redis.call('XTRIM', KEYS[1], 'MAXLEN', math.max(keep, 1))
    end
end

local position = epoch .. ':' .. number
redis.call('HSET', newer, ARGV[2], position)
redis.call('PEXPIREAT', newer, string.format('%.0f', (turn + 2) * dedup_window))
redis.call('PEXPIRE', KEYS[1], ARGV[8])
redis.call('PEXPIRE', KEYS[2], ARGV[9])
redis.call('PUBLISH', ARGV[1], position .. '\n' .. ARGV[3])
return { position, 0 }
