#!lua flags=allow-oom
-- Forgets an incarnation of a process that has ended, and the announcement of the process. A process
-- that has returned to life meanwhile has announced its entries anew, which is kept.
--
-- KEYS  1 incarnations (hash)  2 announcements (hash)  3 leases (hash)
-- ARGV  1 incarnation  2 process

redis.call('HDEL', KEYS[1], ARGV[1])
local row = redis.call('HGET', KEYS[3], ARGV[2])
local ends = row and tonumber(string.match(row, '^(%d+) ')) or 0
if ends <= now_ms() then
    redis.call('HDEL', KEYS[2], ARGV[2])
end
return 1
