#!lua flags=allow-oom
-- Sets a user's read mark, and publishes it if it has advanced.
--
-- KEYS  1 read marks (hash)  2 meta of the room's log
-- ARGV  1 user  2 number of the entry  3 channel  4 connection  5 ttl, ms  6 the most users with a mark
-- Returns 1, or 0 if the room has the most read marks already.

local top = int(redis.call('HGET', KEYS[2], 's'), 0, 'log_meta')
local seq = math.min(tonumber(ARGV[2]), top)
local mark = redis.call('HGET', KEYS[1], ARGV[1])
local before = math.min(int(mark, 0, 'read_mark'), top)
if seq > before and not mark and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[6]) then
    return 0
end
if seq > before then
    redis.call('HSET', KEYS[1], ARGV[1], digits(seq))
    redis.call('PUBLISH', ARGV[3], '!r ' .. ARGV[1] .. ' ' .. digits(seq) .. ' ' .. ARGV[4])
end
if seq > 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[5])
end
return 1
