#!lua flags=allow-oom
-- Notes that a connection has ended, or still has its session. Returns whose that is: 1 of this
-- connection, 2 of another, 0 of nobody.
--
-- KEYS  1 sessions (hash)  2 data of sessions (hash)
-- ARGV  1 session  2 connection  3 how long a session is kept, ms  4 whether it has ended: 1 or
--       empty
--       5 above the watermark of memory: how long those of a user are kept who had none, ms, or
--       empty

local row = redis.call('HGET', KEYS[1], ARGV[1])
if not row then
    return 0
end
local digest, created, connection, about = string.match(row, '^(%x+) (%d+) %d+ (%S+) (.*)$')
if not digest then
    -- No gateway wrote it, and it is nobody's.
    bad('session')
    redis.call('HDEL', KEYS[1], ARGV[1])
    return 0
elseif connection ~= ARGV[2] then
    return 2
else
    local left = ARGV[4] == '1' and '-' or connection
    local now = digits(now_ms())
    redis.call('HSET', KEYS[1], ARGV[1], digest .. ' ' .. created .. ' ' .. now .. ' ' .. left .. ' ' .. about)
    keep_sessions(KEYS[1], KEYS[2], ARGV[3], ARGV[5])
end
return 1
