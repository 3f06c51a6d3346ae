#!lua flags=allow-oom
-- Gives back the lease of a process that ends in order. Where it is the last one, and nothing that
-- was acknowledged is missing here, that is noted: the next processes go on in the same epochs
-- (docs/adr/0015). Whatever was written before the note is in every state of the data that has the
-- note.
--
-- KEYS  1 leases (hash)  2 barrier
-- ARGV  1 process  2 token  3 whether it has nothing that this server lacks: 1 or empty
-- Returns 1 where that is noted.

if not is_here(ARGV[2]) then
    return stale
end
local now = now_ms()
local row = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
local ends = row and tonumber(string.match(row, '^(%d+) ')) or 0
-- A lease that is over counts as well: its process may be frozen.
local others = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '#')
if ARGV[3] ~= '1' or ends <= now or others > 0 or not opened(KEYS[2], ARGV[2]) or not has_file() then
    return 0
end
redis.call('HSET', KEYS[2], 'left', digits(now))
return 1
