#!lua flags=allow-oom
-- Resumes or creates the session of a connection, and reads the state of the user's inbox.
--
-- KEYS, ARGV to 6 as in the prelude, of the inbox
-- KEYS  8 sessions (hash): "<digest> <created> <used> <connection or -> <connection info>" of each
--       9 data of sessions (hash)
-- ARGV  7 author: the user's hash, as in envelopes  8 session to resume or empty  9 its digest
--       10 session to create otherwise  11 its digest  12 connection  13 connection info
--       14 retention of a session, ms  15 the most sessions
--       16 above the watermark of memory: retention of the sessions of a user that has none,
--       ms; or
--       empty
-- Returns session, connection info of the former connection or nothing, time in microseconds, and of
-- the inbox epoch, top, acknowledged number, oldest entry kept or 0, unread entries.

local epoch, top, meta = open_room()
if not epoch then
    return unagreed
end
if not meta[9] then
    keep_without_limits()
end

local time = redis.call('TIME')
local now, ttl = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[14])

local function parse_row(row)
    local digest, created, used, connection, about = string.match(row, '^(%x+) (%d+) (%d+) (%S+) (.*)$')
    if not digest then
        report_invalid('session')
    end
    return digest, created, tonumber(used), connection, about
end

local session, former, created
local row = ARGV[8] ~= '' and redis.call('HGET', KEYS[8], ARGV[8])
if row then
    local digest, row_created, used, connection, about = parse_row(row)
    if digest and digest == ARGV[9] and used + ttl > now then
        session, former, created = ARGV[8], about, row_created
        if connection ~= '-' and connection ~= ARGV[12] then
            redis.call('PUBLISH', ARGV[2], '!x ' .. session .. ' ' .. ARGV[12])
        end
    end
end
local digest = ARGV[9]
if not session then
    session, digest, created = ARGV[10], ARGV[11], digits(now)
    -- Expired sessions are removed, and the least recently used one if there are too
    -- many.
    local rows = redis.call('HGETALL', KEYS[8])
    local count, oldest, oldest_used = 0
    for i = 1, #rows, 2 do
        local _, _, used, connection = parse_row(rows[i + 1])
        -- Sessions in use are removed last.
        local rank = used and used + (connection == '-' and 0 or ttl)
        -- Rows that no gateway wrote are removed as well.
        if not used or used + ttl <= now then
            redis.call('HDEL', KEYS[8], rows[i])
            redis.call('HDEL', KEYS[9], rows[i])
        else
            count = count + 1
            if not oldest or rank < oldest_used then
                oldest, oldest_used = rows[i], rank
            end
        end
    end
    if count >= tonumber(ARGV[15]) then
        redis.call('HDEL', KEYS[8], oldest)
        redis.call('HDEL', KEYS[9], oldest)
    end
end
redis.call('HSET', KEYS[8], session,
    digest .. ' ' .. created .. ' ' .. digits(now) .. ' ' .. ARGV[12] .. ' ' .. ARGV[13])
expire_sessions(KEYS[8], KEYS[9], ARGV[14], ARGV[16])

local acked = math.min(int(redis.call('HGET', KEYS[2], 'a'), 0, 'log_meta'), top)
-- At most a MiB of entries is checked: those behind it count as written by others.
local unread, bytes, cursor = 0, 1048576, '(' .. digits(acked) .. '-0'
while acked < top do
    local some = redis.call('XRANGE', KEYS[1], cursor, '+', 'COUNT', 16)
    for _, entry in ipairs(some) do
        local _, _, envelope = parse_entry(entry)
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
