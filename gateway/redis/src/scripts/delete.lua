#!lua flags=allow-oom
-- Deletes a room's log. The room continues in a later epoch, which records the deletion.
-- With further keys deletes the whole room: its presence, settings and read marks, and publishes that.
--
-- KEYS, ARGV to 6 as in the prelude
-- KEYS  8 presence  9 settings  10 index  11 read marks
-- ARGV  7 room  8 the user that has to be its owner, or empty  9 the requesting connection, or empty
-- Returns `deleted`, `not_owner` or `not_found`.

local epoch, top = open_room()
if not epoch then
    return unagreed
end
if KEYS[8] then
    local owner = redis.call('HGET', KEYS[9], 'owner')
    local exists = owner or redis.call('EXISTS', KEYS[8]) == 1
    if ARGV[8] ~= '' and owner ~= ARGV[8] then
        return exists and 'not_owner' or 'not_found'
    elseif not exists and top == 0 then
        return 'not_found'
    end
end
local new_ordinal = ordinal(epoch) + 1
redis.call('DEL', KEYS[1], KEYS[3], KEYS[4])
redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev', 'a')
local new_epoch = epoch_above(new_ordinal - 1, ARGV[3])
redis.call('HSET', KEYS[2], 'e', new_epoch, 's', '0', 'd', digits(new_ordinal))
archive(new_epoch .. ':0')
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if KEYS[8] then
    redis.call('DEL', KEYS[8], KEYS[9], KEYS[11])
    redis.call('ZREM', KEYS[10], ARGV[7])
    redis.call('PUBLISH', ARGV[2], '!c deleted ' .. ARGV[9])
else
    redis.call('PUBLISH', ARGV[2], '!e')
end
return 'deleted'
