-- Makes a room managed, unless it is there with members or a log.
--
-- KEYS  1 who  2 record  3 index  4 log
-- ARGV  1 room  2 how long it stays empty, ms  then fields of the record and their values
-- Returns 1 where it is made.

if redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[4]) > 0 then
    return 0
end
for i = 3, #ARGV, 2 do
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[1])
return 1
