-- Creates a managed room, unless the room exists: it is managed, or has members or a log.
--
-- KEYS  1 presence  2 settings  3 index  4 log
-- ARGV  1 room  2 retention without members, ms  then fields of the settings and their values
-- Returns 1 if it was created.

if redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[4]) > 0 then
    return 0
end
for i = 3, #ARGV, 2 do
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
return 1
