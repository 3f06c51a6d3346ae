-- Removes a room without members and settings from the index.
--
-- KEYS  1 index  2 presence  3 settings
-- ARGV  1 room

if redis.call('EXISTS', KEYS[2], KEYS[3]) == 0 then
    redis.call('ZREM', KEYS[1], ARGV[1])
end
return 1
