#!lua flags=allow-oom
-- Publishes the announcement of a node, and returns those of all nodes.
--
-- KEYS  1 nodes (hash)
-- ARGV  1 process  2 announcement  3 retention of an announcement, ms
--       4 the common start of the names of all processes of this node
-- Returns the time, and of each process its name and row. Rows of former processes of this node are
-- returned once and removed.
--
-- A field per process, "<time, ms> <announcement>". A process withdraws its announcement when it stops;
-- the row of one that was killed stays until its node starts again, or for the retention.

local now = now_ms()
local own = digits(now) .. ' ' .. ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], own)
local rows, kept = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #rows, 2 do
    local name, at = rows[i], tonumber(string.match(rows[i + 1], '^(%d+) ') or '')
    if not at then
        report_invalid('announcement')
    end
    local is_former = name ~= ARGV[1] and string.sub(name, 1, #ARGV[4]) == ARGV[4]
    local is_valid = at and at <= now + 60000 and now - at <= tonumber(ARGV[3])
    if not is_valid or is_former then
        redis.call('HDEL', KEYS[1], name)
    end
    if is_valid then
        kept[#kept + 1] = name
        kept[#kept + 1] = rows[i + 1]
    end
end
return { digits(now), kept }
