-- Replaces the data of a session, where it is still what it was when it was looked at.
--
-- KEYS  1 sessions (hash)  2 data of sessions (hash)
-- ARGV  1 session  2 data as it was, or empty  3 data as it is to be  4 how long it is kept, ms
--       5 the most bytes of the data of all sessions
-- Returns 1 where that was done, 0 where it has changed meanwhile, -1 where there is no such
-- session, -2 where all data would take more than they may.

if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
    return -1
end
if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= ARGV[2] then
    return 0
end
if #ARGV[3] > #ARGV[2] then
    local bytes = #ARGV[3] - #ARGV[2]
    for _, data in ipairs(redis.call('HVALS', KEYS[2])) do
        bytes = bytes + #data
    end
    if bytes > tonumber(ARGV[5]) then
        return -2
    end
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
