-- Appends an entry to a room's log and passes it on, in one atomic step.
--
-- KEYS  1 log (stream)  2 meta (hash)  3, 4 ids (two hashes that take turns)  5 barrier
-- ARGV  1 channel  2 id key: author and id  3 envelope  4 random part of an epoch
--       5 retention: entries kept in any case  6 window of the others, ms  7 bytes of the log
--       8 log ttl, ms  9 meta ttl, ms  10 dedup window, ms  11 token
--       12, 13 epoch and seq that this entry was acknowledged at before, or empty
-- Returns epoch, seq, and 1 where it was there before.
--
-- All checks come first, and XADD is the first write: an error leaves everything as it was.

local token = ARGV[11]
local epoch, top, meta = whole(KEYS[2], KEYS[1], KEYS[5], token, ARGV[4], ARGV[9])
if not epoch then
    return stale
end

local now = now_ms()
local newer, older, gone = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[10]))
local known = redis.call('HGET', newer, ARGV[2]) or redis.call('HGET', older, ARGV[2])
if known then
    local of, seq = string.match(known, '^(.*):(%d+)$')
    return { of, seq, 1 }
end
if ARGV[12] == epoch and tonumber(ARGV[13]) <= top then
    local id = ARGV[13] .. '-0'
    local there = redis.call('XRANGE', KEYS[1], id, id)[1]
    -- Bytes 3 to 26 of an envelope are its id key.
    if not there or string.sub(there[2][6], 3, 26) == ARGV[2] then
        return { epoch, ARGV[13], 1 }
    end
end

-- at, from, prev: when the present window of retention began, its first entry, and the first entry
-- of the window before. What stands before `prev` is older than a window.
local seq = top + 1
local number = digits(seq)
local at, from, prev = tonumber(meta[5]), tonumber(meta[6]), tonumber(meta[7])
local turned = not at or now - at >= tonumber(ARGV[6]) or now < at
if turned then
    at, from, prev = now, seq, from or seq
end
local keep_from = math.min(seq - tonumber(ARGV[5]) + 1, prev)
if keep_from > 1 then
    redis.call('XADD', KEYS[1], 'MINID', '~', digits(keep_from), number .. '-0',
        'e', epoch, 't', token, 'p', ARGV[3])
else
    redis.call('XADD', KEYS[1], number .. '-0', 'e', epoch, 't', token, 'p', ARGV[3])
end
if turned then
    redis.call('HSET', KEYS[2], 's', number, 'at', digits(at), 'from', digits(from),
        'prev', digits(prev))
else
    redis.call('HSET', KEYS[2], 's', number)
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

redis.call('HSET', newer, ARGV[2], epoch .. ':' .. number)
redis.call('PEXPIREAT', newer, gone)
redis.call('PEXPIRE', KEYS[1], ARGV[8])
redis.call('PEXPIRE', KEYS[2], ARGV[9])
redis.call('PUBLISH', ARGV[1], epoch .. ':' .. number .. ':' .. token .. '\n' .. ARGV[3])
return { epoch, number, 0 }
