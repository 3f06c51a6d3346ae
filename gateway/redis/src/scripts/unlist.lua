-- Takes a room from the index that nobody is in and nobody manages any more.
--
-- KEYS  1 index  2 who  3 record
-- ARGV  1 room

if redis.call('EXISTS', KEYS[2], KEYS[3]) == 0 then
    redis.call('ZREM', KEYS[1], ARGV[1])
end
return 1
