#!lua flags=allow-oom
-- Extends the retention of a session, or releases it when its connection has ended. Returns the holder:
-- 1 this connection, 2 another one, 0 none.
--
-- KEYS  1 sessions (hash)  2 data of sessions (hash)
-- ARGV  1 session  2 connection  3 retention of a session, ms  4 1 if the connection has ended, or
--       empty
--       5 above the watermark of memory: retention of the sessions of a user that had none, ms; or
--       empty

local row = redis.call('HGET', KEYS[1], ARGV[1])
if not row then
    return 0
end
local digest, created, connection, about = string.match(row, '^(%x+) (%d+) %d+ (%S+) (.*)$')
if not digest then
    -- No gateway wrote it; the session has no holder.
    report_invalid('session')
    redis.call('HDEL', KEYS[1], ARGV[1])
    return 0
elseif connection ~= ARGV[2] then
    return 2
else
    local holder = ARGV[4] == '1' and '-' or connection
    local now = digits(now_ms())
    redis.call('HSET', KEYS[1], ARGV[1],
        digest .. ' ' .. created .. ' ' .. now .. ' ' .. holder .. ' ' .. about)
    expire_sessions(KEYS[1], KEYS[2], ARGV[3], ARGV[5])
end
return 1
