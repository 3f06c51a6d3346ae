#!lua flags=allow-oom
-- Has a connection take its session, or makes one; and looks at the user's inbox.
--
-- KEYS, ARGV to 6 as in the prelude, of the inbox
-- KEYS  7 sessions (hash): "<digest> <created> <used> <connection or -> <about>" of each
--       8 data of sessions (hash)
-- ARGV  7 author: the user, as envelopes name it  8 session presented or empty  9 its digest
--       10 session that is made otherwise  11 its digest  12 connection  13 about it
--       14 how long a session is kept, ms  15 the most sessions
--       16 above the watermark of memory: how long the sessions of a user are kept who has none,
--       ms, or empty
-- Returns session, about of the connection before or nothing, time in microseconds, and of the
-- inbox epoch, top, acknowledged, oldest entry kept or 0, unread.

local epoch, top, meta = whole()
if not epoch then
    return stale
end
if not meta[9] then
    keep_as_any()
end

local time = redis.call('TIME')
local now, ttl = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[14])

local function parts_of(row)
    local digest, created, used, connection, about = string.match(row, '^(%x+) (%d+) (%d+) (%S+) (.*)$')
    if not digest then
        bad('session')
    end
    return digest, created, tonumber(used), connection, about
end

local session, former, created
local row = ARGV[8] ~= '' and redis.call('HGET', KEYS[7], ARGV[8])
if row then
    local digest, began, used, connection, about = parts_of(row)
    if digest and digest == ARGV[9] and used + ttl > now then
        session, former, created = ARGV[8], about, began
        if connection ~= '-' and connection ~= ARGV[12] then
            redis.call('PUBLISH', ARGV[2], '!x ' .. session .. ' ' .. ARGV[12])
        end
    end
end
local digest = ARGV[9]
if not session then
    session, digest, created = ARGV[10], ARGV[11], digits(now)
    -- Room for it: those whose time is over go, and the one used longest ago where there are too
    -- many.
    local rows = redis.call('HGETALL', KEYS[7])
    local count, oldest, oldest_used = 0
    for i = 1, #rows, 2 do
        local _, _, used, connection = parts_of(rows[i + 1])
        -- Those that are in use go last.
        local rank = used and used + (connection == '-' and 0 or ttl)
        -- So do those that no gateway wrote.
        if not used or used + ttl <= now then
            redis.call('HDEL', KEYS[7], rows[i])
            redis.call('HDEL', KEYS[8], rows[i])
        else
            count = count + 1
            if not oldest or rank < oldest_used then
                oldest, oldest_used = rows[i], rank
            end
        end
    end
    if count >= tonumber(ARGV[15]) then
        redis.call('HDEL', KEYS[7], oldest)
        redis.call('HDEL', KEYS[8], oldest)
    end
end
redis.call('HSET', KEYS[7], session,
    digest .. ' ' .. created .. ' ' .. digits(now) .. ' ' .. ARGV[12] .. ' ' .. ARGV[13])
keep_sessions(KEYS[7], KEYS[8], ARGV[14], ARGV[16])

local acked = math.min(int(redis.call('HGET', KEYS[2], 'a'), 0, 'log_meta'), top)
-- Large ones are not all looked at: above a MiB the others count as from somebody else.
local unread, bytes, cursor = 0, 1048576, '(' .. digits(acked) .. '-0'
while acked < top do
    local some = redis.call('XRANGE', KEYS[1], cursor, '+', 'COUNT', 16)
    for _, entry in ipairs(some) do
        local _, _, envelope = parts_of_entry(entry)
        if envelope then
            bytes = bytes - #envelope
            if string.sub(envelope, 3, 10) ~= ARGV[7] then
                unread = unread + 1
            end
        end
    end
    if #some < 16 then
        break
    end
    if bytes < 0 then
        unread = unread + math.max(top - tonumber(seq_of(some[16][1])), 0)
        break
    end
    cursor = '(' .. some[16][1]
end
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local oldest = first and seq_of(first[1]) or '0'
local micros = digits(time[1] * 1000000 + time[2])
return { session, former or false, micros, epoch, digits(top), digits(acked), oldest, digits(unread) }
