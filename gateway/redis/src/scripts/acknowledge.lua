#!lua flags=allow-oom
-- Acknowledges the inbox of a user up to a number.
--
-- KEYS  1 meta of the inbox
-- ARGV  1 epoch or empty  2 number of the entry  3 ttl of the meta, ms

local meta = redis.call('HMGET', KEYS[1], 'e', 's', 'a', 'pe', 'ps')
if not meta[1] then
    return 0
end
local seq = math.min(tonumber(ARGV[2]), int(meta[2], 0, 'log_meta'))
if ARGV[1] ~= '' and ARGV[1] ~= meta[1] then
    if ARGV[1] ~= meta[4] then
        return 0
    end
    -- The present epoch continues that one.
    seq = math.min(seq, int(meta[5], 0, 'log_meta'))
end
if seq > int(meta[3], 0, 'log_meta') then
    redis.call('HSET', KEYS[1], 'a', digits(seq))
end
if seq > 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 1
