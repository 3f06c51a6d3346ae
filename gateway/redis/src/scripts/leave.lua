#!lua flags=allow-oom
-- Releases the lease of a process that ends in order. If it is the last process, and the server lacks no
-- acknowledged message, records that: the next processes continue in the same epochs (docs/adr/0015).
-- Every state of the data that has the record also has everything that was written before it.
--
-- KEYS  1 leases (hash)  2 barrier
-- ARGV  1 process  2 server id  3 `all` if the server has everything that the process holds, `none` if
--       the process has never agreed on a server and so holds nothing, else empty
-- Returns 1 if it is recorded.
--
-- A process that holds nothing renews the record that its server began with (`whole` of check_in.lua),
-- if it ends before the server has opened: nothing was acknowledged since that record was made.

if not is_this_server(ARGV[2]) then
    return unagreed
end
local now = now_ms()
local row = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
local ends = row and tonumber(string.match(row, '^(%d+) ')) or 0
-- An expired lease counts as well: its process may be frozen.
local others = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '#')
if ends <= now or others > 0 or not has_append_only_file() then
    return 0
end
local has_all = false
if ARGV[3] == 'all' then
    has_all = agreement(KEYS[2], ARGV[2])
elseif ARGV[3] == 'none' then
    local barrier = redis.call('HMGET', KEYS[2], 't', 'whole', 'open', 'old')
    has_all = barrier[1] == ARGV[2] and barrier[2] and not barrier[3] and not barrier[4]
end
if not has_all then
    return 0
end
redis.call('HSET', KEYS[2], 'left', digits(now))
return 1
