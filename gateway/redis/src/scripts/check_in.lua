#!lua flags=allow-oom
-- Notes that a process has given this server back what it holds, and tells whether the server is
-- open: whether everybody who may hold something has done so, or was waited for long enough.
--
-- KEYS  1 barrier (hash)
-- ARGV  1 token  2 process  3 wait for those who are missing, ms  4 wait where nobody remembers
--       anything, ms  5 the last term that it knows of  6 the last in which not everybody was heard
--       7... the processes that this one knows of, itself among them; none where it
--       has never agreed on a server and so holds nothing
-- Returns '' while the server is not open, else '1' where all were heard and '0' where not; the
-- processes that are missing; the term, and the last term in which not everybody was heard.
--
-- Fields: `t` token, `t0` first check-in, `busy` last healing, `old` somebody remembers, `open` '1'
-- after all were heard, '0' else, `left` when the last process left in order (leave.lua), `whole`
-- all had left in order before this server, so that nobody holds anything that it lacks, `n` term,
-- `owed` last term in which not everybody was heard,
-- `in:<process>`, `ex:<process>` expected.

if not is_here(ARGV[1]) then
    return stale
end
local now = now_ms()
local before = redis.call('HMGET', KEYS[1], 't', 'open', 'n', 'owed', 'left')
local term, owed = int(before[3], 0, 'barrier'), int(before[4], 0, 'barrier')
local open = before[1] == ARGV[1] and before[2]
if open then
    return { open, {}, term, owed }
end
if before[1] ~= ARGV[1] then
    -- The terms of a server that was here before go on.
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 't', ARGV[1], 't0', digits(now))
    -- Older data with such a note may be a copy that was made then and put back later.
    local left, left_max = tonumber(before[5] or ''), 3600 * 1000
    if left and left <= now and now - left <= left_max and has_file() then
        redis.call('HSET', KEYS[1], 'whole', '1')
    end
end
term, owed = math.max(term, tonumber(ARGV[5])), math.max(owed, tonumber(ARGV[6]))
redis.call('HSET', KEYS[1], 'n', digits(term), 'owed', digits(owed))

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

local begun = int(barrier.t0, nil, 'barrier')
if not begun then
    begun = now
    redis.call('HSET', KEYS[1], 't0', digits(now))
end
barrier.t0 = digits(begun)
barrier.busy = digits(int(barrier.busy, 0, 'barrier'))
if tonumber(barrier.t0) > now or tonumber(barrier.busy) > now then
    -- The clock was set back; nobody is waited for as long as that.
    barrier.t0, barrier.busy = digits(now), '0'
    redis.call('HSET', KEYS[1], 't0', barrier.t0, 'busy', '0')
end
local waited = now - math.max(tonumber(barrier.t0), tonumber(barrier.busy))
if barrier.old and #missing == 0 then
    open = '1'
elseif waited > tonumber(barrier.old and ARGV[3] or ARGV[4]) then
    -- By now the file has it that the note of who left is gone.
    open = barrier.whole and not barrier.old and '1' or '0'
end
if open then
    term = term + 1
    if open == '0' then
        owed = term
    end
    redis.call('HSET', KEYS[1], 'open', open, 'n', digits(term), 'owed', digits(owed))
end
return { open or '', missing, term, owed }
