#!lua flags=allow-oom
-- Deletes a room's log. The room begins anew in a later epoch, and remembers that this was meant.
--
-- KEYS  1 log (stream)  2 meta (hash)  3, 4 ids  5 barrier
-- ARGV  1 random part of an epoch  2 meta ttl, ms  3 token

local epoch = whole(KEYS[2], KEYS[1], KEYS[5], ARGV[3], ARGV[1], ARGV[2])
if not epoch then
    return stale
end
local begun = ordinal(epoch) + 1
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev')
redis.call('HSET', KEYS[2], 'e', epoch_above(begun - 1, ARGV[1]), 's', '0', 'd', digits(begun))
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
