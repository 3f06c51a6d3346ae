#!lua flags=allow-oom
-- Renews the lease of a process, and tells who else lives.
--
-- KEYS  1 leases (hash)  2 barrier
-- ARGV  1 process  2 lease, ms  3 channel of pokes  4 token
--       5 the start of the names of this process' predecessors, which have ended, or empty
-- Returns 1 where every living process has seen this one, 1 where the lease is a new one, and the
-- processes that live.
--
-- A field per process, "<end, ms> <number> <seen>": processes are numbered as they register, and
-- each renewal has seen all up to the newest number. `#` is the newest number.
--
-- Where all processes had left in order (leave.lua), the first that comes takes that note away, and
-- none counts before this is in the append-only file: with the note still there, what is
-- acknowledged from now on would not be missed. `resumed` of the barrier is when it was taken away.
--
-- On a server that the nodes have not agreed on yet those live, too, whose lease has ended: they
-- did when what this server has was written, and may hold what it lacks, however late that is
-- noticed.

if not is_here(ARGV[4]) then
    return stale
end
local now = now_ms()
local is_open = opened(KEYS[2], ARGV[4])
local rows = redis.call('HGETALL', KEYS[1])
local newest, own, others, gone, late = 0, nil, {}, {}, {}
for i = 1, #rows, 2 do
    local name, row = rows[i], rows[i + 1]
    local ends, number, seen = string.match(row, '^(%d+) (%d+) (%d+)$')
    if name == '#' then
        newest = math.max(newest, int(row, 0, 'lease'))
    elseif not ends or not string.find(name, '^[%w_.:-]+/%w+$') or tonumber(ends) > now + tonumber(ARGV[2]) + 60000
        or tonumber(number) > 9007199254740000 then
        -- No process wrote it: a lease that would never end would have all wait for ever.
        bad('lease')
        gone[#gone + 1] = name
    else
        newest = math.max(newest, tonumber(number))
        if tonumber(ends) <= now and (is_open or name == ARGV[1]) then
            gone[#gone + 1] = name
        elseif tonumber(ends) <= now then
            late[#late + 1] = name
        elseif name == ARGV[1] then
            own = tonumber(number)
        else
            if ARGV[5] ~= '' and string.sub(name, 1, #ARGV[5]) == ARGV[5] then
                -- It sees nobody any more, so nobody waits for that. What it held is missing all
                -- the same, and it is counted on until its lease ends.
                seen = '9007199254740991'
                redis.call('HSET', KEYS[1], name, ends .. ' ' .. number .. ' ' .. seen)
            end
            others[#others + 1] = { name, tonumber(seen) }
        end
    end
end
for _, name in ipairs(gone) do
    redis.call('HDEL', KEYS[1], name)
end

local is_new = not own
if is_new then
    newest = newest + 1
    own = newest
    redis.call('HSET', KEYS[1], '#', digits(newest))
end
redis.call('HSET', KEYS[1], ARGV[1],
    digits(now + tonumber(ARGV[2])) .. ' ' .. digits(own) .. ' ' .. digits(newest))
if is_new and #others > 0 then
    -- The others renew at once, so that this one is not kept waiting.
    redis.call('PUBLISH', ARGV[3], ARGV[1])
end

local known, alive = 1, { ARGV[1] }
if is_open then
    local marks = redis.call('HMGET', KEYS[2], 'left', 'resumed')
    local resumed = tonumber(marks[2] or '')
    if marks[1] then
        resumed = now
        redis.call('HDEL', KEYS[2], 'left')
        redis.call('HSET', KEYS[2], 'resumed', digits(now))
    end
    -- `appendfsync everysec` takes up to 2 s.
    if resumed and resumed <= now and now - resumed < 2000 then
        known = 0
    end
end
for _, other in ipairs(others) do
    alive[#alive + 1] = other[1]
    if other[2] < own then
        known = 0
    end
end
for _, name in ipairs(late) do
    alive[#alive + 1] = name
end
return { known, is_new and 1 or 0, alive }
