#!lua flags=allow-oom
-- Checks a process in, which has restored to this server what it holds, and returns whether the server
-- is open: whether every process that may hold something has checked in, or was waited for long enough.
--
-- KEYS  1 barrier (hash)
-- ARGV  1 server id  2 process  3 how long to wait for missing processes, ms  4 how long to wait if no
--       process holds anything, ms  5 the last generation that the process knows
--       6 the last incomplete generation that it knows
--       7... the processes that it knows, itself among them; none if it has never agreed on a server
--       and so holds nothing
-- Returns '' while the server is not open, else '1' if every process has checked in and '0' if not; the
-- missing processes; the generation, and the last incomplete generation.
--
-- Fields: `t` server id, `t0` first check-in, `busy` last restore, `old` a process holds something,
-- `open` '1' if every process has checked in, else '0', `left` when the last process deregistered
-- (leave.lua), `whole`
-- every process had deregistered before this server started, so that none holds
-- anything that it lacks, `n` generation,
-- `owed` last incomplete generation, `in:<process>` checked in,
-- `ex:<process>` expected.

if not is_this_server(ARGV[1]) then
    return unagreed
end
local now = now_ms()
local before = redis.call('HMGET', KEYS[1], 't', 'open', 'n', 'owed', 'left')
local generation, last_incomplete = int(before[3], 0, 'barrier'), int(before[4], 0, 'barrier')
local open = before[1] == ARGV[1] and before[2]
if open then
    return { open, {}, generation, last_incomplete }
end
if before[1] ~= ARGV[1] then
    -- Generations continue from those of a former server.
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 't', ARGV[1], 't0', digits(now))
    -- Older data with this record may be a copy that was made then and put back later.
    local left, left_max = tonumber(before[5] or ''), 3600 * 1000
    if left and left <= now and now - left <= left_max and has_append_only_file() then
        redis.call('HSET', KEYS[1], 'whole', '1')
    end
end
generation = math.max(generation, tonumber(ARGV[5]))
last_incomplete = math.max(last_incomplete, tonumber(ARGV[6]))
redis.call('HSET', KEYS[1], 'n', digits(generation), 'owed', digits(last_incomplete))

redis.call('HSET', KEYS[1], 'in:' .. ARGV[2], '1')
for i = 7, #ARGV do
    redis.call('HSET', KEYS[1], 'old', '1', 'ex:' .. ARGV[i], '1')
end
local rows = redis.call('HGETALL', KEYS[1])
local barrier, missing = {}, {}
for i = 1, #rows, 2 do
    barrier[rows[i]] = rows[i + 1]
end
for name in pairs(barrier) do
    if string.sub(name, 1, 3) == 'ex:' and not barrier['in:' .. string.sub(name, 4)] then
        missing[#missing + 1] = string.sub(name, 4)
    end
end
table.sort(missing)

local first_check_in = int(barrier.t0, nil, 'barrier')
if not first_check_in then
    first_check_in = now
    redis.call('HSET', KEYS[1], 't0', digits(now))
end
barrier.t0 = digits(first_check_in)
barrier.busy = digits(int(barrier.busy, 0, 'barrier'))
if tonumber(barrier.t0) > now or tonumber(barrier.busy) > now then
    -- The clock was set back; the server does not wait for that long.
    barrier.t0, barrier.busy = digits(now), '0'
    redis.call('HSET', KEYS[1], 't0', barrier.t0, 'busy', '0')
end
local waited = now - math.max(tonumber(barrier.t0), tonumber(barrier.busy))
if barrier.old and #missing == 0 then
    open = '1'
elseif waited > tonumber(barrier.old and ARGV[3] or ARGV[4]) then
    -- By now the removal of the record of deregistration is in the append-only file.
    open = barrier.whole and not barrier.old and '1' or '0'
end
if open then
    generation = generation + 1
    if open == '0' then
        last_incomplete = generation
    end
    redis.call('HSET', KEYS[1], 'open', open, 'n', digits(generation), 'owed', digits(last_incomplete))
end
return { open or '', missing, generation, last_incomplete }
