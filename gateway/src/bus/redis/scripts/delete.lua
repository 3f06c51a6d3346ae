#!lua flags=allow-oom
-- Deletes a room's log. The room begins anew in a later epoch, and remembers that this was meant.
--
-- KEYS, ARGV as in the prelude

local epoch = whole()
if not epoch then
    return stale
end
local begun = ordinal(epoch) + 1
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev')
redis.call('HSET', KEYS[2], 'e', epoch_above(begun - 1, ARGV[3]), 's', '0', 'd', digits(begun))
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
