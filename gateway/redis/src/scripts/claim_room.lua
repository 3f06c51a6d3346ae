-- Notes that a user is to own one managed room more, where that is not too many.
--
-- KEYS  1 rooms of the owner (sorted set)
-- ARGV  1 room  2 the most rooms  3 how long they are noted, ms
-- Returns 1 where it is noted, 2 where it was before, 0 where it is not.

if redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    return 2
end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], 0, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
