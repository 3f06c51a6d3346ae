#!lua flags=allow-oom
-- Takes what a node has published in a room and not heard since: numbers that were acknowledged go
-- to no other message. All of it waits for the room's first touch, when everybody has been heard.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 process  8 the last position at which it was acknowledged, or empty  9 count of what was
--       acknowledged  then per entry: position, stamp, envelope  then per publish without an
--       answer, in their order: number, envelope
-- Returns "taken", or "late" where the room goes on already.

if not is_here(ARGV[1]) then
    return stale
end
if redis.call('HGET', KEYS[2], 'r') == ARGV[1] then
    return 'late'
end
if redis.call('HGET', KEYS[6], 't') ~= ARGV[1] then
    redis.call('DEL', KEYS[6])
    redis.call('HSET', KEYS[6], 't', ARGV[1])
end
local first_unanswered = 10 + 3 * tonumber(ARGV[9])
for i = 10, first_unanswered - 1, 3 do
    redis.call('HSET', KEYS[6], ARGV[i], ARGV[i + 1] .. '\n' .. ARGV[i + 2])
end
for i = first_unanswered, #ARGV, 2 do
    redis.call('HSET', KEYS[6], '?' .. ARGV[7] .. ':' .. ARGV[i], ARGV[8] .. '\n' .. ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[6], ARGV[4])
return 'taken'
