#!lua flags=allow-oom
-- Takes a node's unconfirmed publishes of a room, so that no other message gets a number that was
-- acknowledged. They are appended when the room is opened, by when every process has checked in.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 process  8 the last position that was acknowledged to it, or empty
--       9 count of acknowledged publishes  then for each: position, origin, envelope
--       then for each publish without an answer, in their order: number, envelope
-- Returns "accepted", or "late" if the room is open already.

if not is_this_server(ARGV[1]) then
    return unagreed
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
return 'accepted'
