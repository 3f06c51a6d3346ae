-- Claims a managed room for an owner, unless the owner has the most rooms already.
--
-- KEYS  1 rooms of the owner (sorted set)
-- ARGV  1 room  2 the most rooms  3 how long claims are kept, ms
-- Returns 1 for a new claim, 2 for an existing one, 0 for none.

if redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    return 2
end
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], 0, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
