-- Appends an entry to a room's log and passes it on, in one atomic step.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 id key: author and id  8 envelope
--       9 retention: entries kept in any case  10 window of the others, ms  11 bytes of the log
--       12, 13 epoch and seq that this entry was acknowledged at before, or empty
-- Returns epoch, seq, and 1 where it was there before.
--
-- All checks come first, and XADD is the first write: an error leaves everything as it was.

local epoch, top, meta = whole()
if not epoch then
    return stale
end

local now = now_ms()
local newer, older, gone = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[6]))
local known = redis.call('HGET', newer, ARGV[7]) or redis.call('HGET', older, ARGV[7])
if known then
    local of, seq = string.match(known, '^(.*):(%d+)$')
    return { of, seq, 1 }
end
if ARGV[12] == epoch and tonumber(ARGV[13]) <= top then
    local _, _, there = entry_at(tonumber(ARGV[13]))
    if not there or key_of(there) == ARGV[7] then
        return { epoch, ARGV[13], 1 }
    end
end

-- at, from, prev: when the present window of retention began, its first entry, and the first entry
-- of the window before. What stands before `prev` is older than a window.
local seq = top + 1
local number = digits(seq)
local at, from, prev = tonumber(meta[5]), tonumber(meta[6]), tonumber(meta[7])
local turned = not at or now - at >= tonumber(ARGV[10]) or now < at
if turned then
    at, from, prev = now, seq, from or seq
end
local keep_from = math.min(seq - tonumber(ARGV[9]) + 1, prev)
if keep_from > 1 then
    redis.call('XADD', KEYS[1], 'MINID', '~', digits(keep_from), number .. '-0',
        'e', epoch, 't', ARGV[1], 'p', ARGV[8])
else
    redis.call('XADD', KEYS[1], number .. '-0', 'e', epoch, 't', ARGV[1], 'p', ARGV[8])
end
if turned then
    redis.call('HSET', KEYS[2], 's', number, 'at', digits(at), 'from', digits(from),
        'prev', digits(prev))
else
    redis.call('HSET', KEYS[2], 's', number)
end

-- The size of a stream costs a sample of it, so it is looked at now and then: every 64th entry,
-- and at each that is large.
if seq % 64 == 0 or #ARGV[8] > 65536 then
    local bytes = redis.call('MEMORY', 'USAGE', KEYS[1])
    local bytes_max = tonumber(ARGV[11])
    if bytes > bytes_max then
        local keep = math.floor(redis.call('XLEN', KEYS[1]) * bytes_max / bytes)
        redis.call('XTRIM', KEYS[1], 'MAXLEN', math.max(keep, 1))
    end
end

redis.call('HSET', newer, ARGV[7], epoch .. ':' .. number)
redis.call('PEXPIREAT', newer, gone)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('PUBLISH', ARGV[2], epoch .. ':' .. number .. ':' .. ARGV[1] .. '\n' .. ARGV[8])
return { epoch, number, 0 }
