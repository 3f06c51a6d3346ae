-- Replaces the data of a session, if it is unchanged since it was read.
--
-- KEYS  1 sessions (hash)  2 data of sessions (hash)
-- ARGV  1 session  2 data as it was read, or empty  3 new data  4 retention, ms
--       5 the most bytes of the data of all sessions of the user
-- Returns 1 if the data was replaced, 0 if it has changed meanwhile, -1 if the
-- session does not exist, -2 if the data of all sessions would be too large.

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
