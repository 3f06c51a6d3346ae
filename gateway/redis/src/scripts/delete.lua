#!lua flags=allow-oom
-- Deletes a room's log. The room begins anew in a later epoch, and remembers that this was meant.
-- With the further keys the whole room: nobody is in it then, and that is passed on.
--
-- KEYS, ARGV as in the prelude
-- KEYS  7 who  8 record  9 index  10 marks
-- ARGV  7 room  8 who has to be its owner, or empty  9 the connection that asks, or empty
-- Returns `deleted`, `not_owner` or `not_found`.

local epoch, top = whole()
if not epoch then
    return stale
end
if KEYS[7] then
    local owner = redis.call('HGET', KEYS[8], 'owner')
    local is_there = owner or redis.call('EXISTS', KEYS[7]) == 1
    if ARGV[8] ~= '' and owner ~= ARGV[8] then
        return is_there and 'not_owner' or 'not_found'
    elseif not is_there and top == 0 then
        return 'not_found'
    end
end
local begun = ordinal(epoch) + 1
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev', 'a')
redis.call('HSET', KEYS[2], 'e', epoch_above(begun - 1, ARGV[3]), 's', '0', 'd', digits(begun))
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if KEYS[7] then
    redis.call('DEL', KEYS[7], KEYS[8], KEYS[10])
    redis.call('ZREM', KEYS[9], ARGV[7])
    redis.call('PUBLISH', ARGV[2], '!c deleted ' .. ARGV[9])
else
    redis.call('PUBLISH', ARGV[2], '!e')
end
return 'deleted'
