#!lua flags=allow-oom
-- Forgets a process that has ended: an incarnation of it, and that it had told its seats. One that
-- has come to live again meanwhile tells them anew, and that is kept.
--
-- KEYS  1 incarnations (hash)  2 told (hash)  3 leases (hash)
-- ARGV  1 incarnation  2 process

redis.call('HDEL', KEYS[1], ARGV[1])
local row = redis.call('HGET', KEYS[3], ARGV[2])
local ends = row and tonumber(string.match(row, '^(%d+) ')) or 0
if ends <= now_ms() then
    redis.call('HDEL', KEYS[2], ARGV[2])
end
return 1
