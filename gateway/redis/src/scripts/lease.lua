#!lua flags=allow-oom
-- Renews the lease of a process, and returns the processes that are alive.
--
-- KEYS  1 leases (hash)  2 barrier
-- ARGV  1 process  2 duration of a lease, ms  3 wake-up channel  4 server id
--       5 the common start of the names of this process' predecessors, which have ended, or empty
-- Returns 1 if every live process has seen this one, 1 if the lease is a new one, and the processes
-- that are alive.
--
-- A field per process, "<end, ms> <number> <seen>": processes are numbered as they register, and each
-- renewal has seen every process up to the newest number. `#` is the newest number.
--
-- If every process had deregistered (leave.lua), the first process that comes removes that record, and
-- no process is alive for the others before the removal is in the append-only file: with the record
-- still there, later acknowledged messages would not be missed. `resumed` of the barrier is the time of
-- the removal.
--
-- On a server without an agreement, processes whose lease has expired are alive as well: they were when
-- the server's data was written, and may hold entries that it lacks, however late that is noticed.

if not is_this_server(ARGV[4]) then
    return unagreed
end
local now = now_ms()
local has_agreement = agreement(KEYS[2], ARGV[4])
local rows = redis.call('HGETALL', KEYS[1])
local newest, own, others, expired, expired_on_unagreed = 0, nil, {}, {}, {}
for i = 1, #rows, 2 do
    local name, row = rows[i], rows[i + 1]
    local ends, number, seen = string.match(row, '^(%d+) (%d+) (%d+)$')
    if name == '#' then
        newest = math.max(newest, int(row, 0, 'lease'))
    elseif not ends or not string.find(name, '^[%w_.:-]+/%w+$')
        or tonumber(ends) > now + tonumber(ARGV[2]) + 60000
        or tonumber(number) > 9007199254740000 then
        -- No process wrote it: a lease that never expires would block the other processes for ever.
        report_invalid('lease')
        expired[#expired + 1] = name
    else
        newest = math.max(newest, tonumber(number))
        if tonumber(ends) <= now and (has_agreement or name == ARGV[1]) then
            expired[#expired + 1] = name
        elseif tonumber(ends) <= now then
            expired_on_unagreed[#expired_on_unagreed + 1] = name
        elseif name == ARGV[1] then
            own = tonumber(number)
        else
            if ARGV[5] ~= '' and string.sub(name, 1, #ARGV[5]) == ARGV[5] then
                -- It renews no lease any more, so that no process waits to be seen by it. Its
                -- entries are missing all the same, and it counts until its lease expires.
                seen = '9007199254740991'
                redis.call('HSET', KEYS[1], name, ends .. ' ' .. number .. ' ' .. seen)
            end
            others[#others + 1] = { name, tonumber(seen) }
        end
    end
end
for _, name in ipairs(expired) do
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
    -- The others renew at once, so that this process does not have to wait.
    redis.call('PUBLISH', ARGV[3], ARGV[1])
end

local seen_by_all, alive = 1, { ARGV[1] }
if has_agreement then
    local marks = redis.call('HMGET', KEYS[2], 'left', 'resumed')
    local resumed = tonumber(marks[2] or '')
    if marks[1] then
        resumed = now
        redis.call('HDEL', KEYS[2], 'left')
        redis.call('HSET', KEYS[2], 'resumed', digits(now))
    end
    -- `appendfsync everysec` takes up to 2 s.
    if resumed and resumed <= now and now - resumed < 2000 then
        seen_by_all = 0
    end
end
for _, other in ipairs(others) do
    alive[#alive + 1] = other[1]
    if other[2] < own then
        seen_by_all = 0
    end
end
for _, name in ipairs(expired_on_unagreed) do
    alive[#alive + 1] = name
end
return { seen_by_all, is_new and 1 or 0, alive }
