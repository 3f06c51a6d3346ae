-- Appends an entry to a room's log and passes it on, in one atomic step.
--
-- KEYS, ARGV to 6 as in the prelude
-- KEYS  7 of an inbox: when users who have left did something last (sorted set)
--       8 who is connected (hash)
-- ARGV  7 id key: author and id  8 envelope
--       9 retention: entries kept in any case  10 window of the others, ms  11 bytes of the log
--       12, 13 epoch and seq that this entry was acknowledged at before, or empty
--       14 memory: empty, `high` above the watermark, `full` where there is none left
--       15 of an inbox: its user  16 where that user was never connected: `refuse` the first entry,
--       be `small`, or `keep` the inbox as any
--       17, 18, 19 most entries, bytes, and ttl in ms of a small one
-- Returns epoch, seq, and 1 where it was there before, 2 where it has opened a small inbox.
--
-- All checks come first, and XADD is the first write: an error leaves everything as it was. A room
-- that only the refused entry has opened is closed again, so that ever new names keep nothing.

local epoch, top, meta = whole()
if not epoch then
    return stale
end

-- Above the watermark a log takes no more than before, but for entries as small as people write.
local small_entry, ids_max_when_full = 4096, 2000
local full = 'FULL memory is above the watermark'

local function refused(reason)
    if not meta[1] then
        redis.call('DEL', KEYS[2])
    end
    return redis.error_reply(reason)
end

-- The first number to keep, so that those before it make room for the new entry; nil where they do
-- not.
local function first_kept()
    local cursor, freed = '-', 0
    repeat
        local some = redis.call('XRANGE', KEYS[1], cursor, '+', 'COUNT', 64)
        for _, entry in ipairs(some) do
            freed = freed + #(entry[2][6] or '') + 64
            if freed >= #ARGV[8] then
                return digits(tonumber(string.match(entry[1], '^%d+')) + 1)
            end
            cursor = '(' .. entry[1]
        end
    until #some < 64
    return #ARGV[8] <= small_entry and digits(top + 1) or nil
end

-- The inbox of a user who was never connected, which nobody may ever read. It has no hashes of ids.
local function append_to_small()
    local entries = redis.call('XRANGE', KEYS[1], '-', '+')
    local bytes = #ARGV[8]
    for _, entry in ipairs(entries) do
        local of, _, envelope = parts_of_entry(entry)
        if of and key_of(envelope) == ARGV[7] then
            return { of, seq_of(entry[1]), 1 }
        end
        bytes = bytes + #(entry[2][6] or '')
    end
    local bytes_max, number = tonumber(ARGV[18]), digits(top + 1)
    if #ARGV[8] > bytes_max then
        return refused('UNSEENBYTES the inbox of a user who was never connected is small')
    elseif #entries == 0 and ARGV[14] ~= '' then
        return refused(full)
    elseif #entries == 0 and ARGV[16] == 'refuse' then
        return refused('UNSEENQUOTA too many users who were never connected')
    end
    if ARGV[14] ~= '' then
        bytes_max = math.max(bytes - #ARGV[8], small_entry)
        if #ARGV[8] > bytes_max then
            return refused(full)
        end
    end
    local gone = 0
    while #entries - gone >= tonumber(ARGV[17]) or bytes > bytes_max and gone < #entries do
        gone = gone + 1
        bytes = bytes - #(entries[gone][2][6] or '')
    end
    redis.call('XADD', KEYS[1], number .. '-0', 'e', epoch, 't', ARGV[1], 'p', ARGV[8])
    if gone > 0 then
        redis.call('XTRIM', KEYS[1], 'MAXLEN', #entries + 1 - gone)
    end
    redis.call('HSET', KEYS[2], 's', number)
    redis.call('PEXPIRE', KEYS[1], ARGV[19])
    redis.call('PEXPIRE', KEYS[2], ARGV[19])
    redis.call('PUBLISH', ARGV[2], epoch .. ':' .. number .. ':' .. ARGV[1] .. '\n' .. ARGV[8])
    return { epoch, number, #entries == 0 and 2 or 0 }
end

if KEYS[7] and not meta[9] then
    local is_seen = ARGV[16] == 'keep' or redis.call('ZSCORE', KEYS[7], ARGV[15])
        or redis.call('HEXISTS', KEYS[8], ARGV[15]) == 1
        -- A gateway of a version before this one has kept it.
        or redis.call('XLEN', KEYS[1]) > tonumber(ARGV[17])
    if not is_seen then
        return append_to_small()
    end
    keep_as_any()
end

local now = now_ms()
local newer, older, gone = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[6]))
local known = redis.call('HGET', newer, ARGV[7]) or redis.call('HGET', older, ARGV[7])
if known then
    local of, seq = string.match(known, '^([%w_-]+):(%d+)$')
    if of and #of <= 32 and #seq <= 16 then
        return { of, seq, 1 }
    end
    bad('dedup_id')
end
if ARGV[12] == epoch and tonumber(ARGV[13]) <= top then
    local _, _, there = entry_at(tonumber(ARGV[13]))
    if not there or key_of(there) == ARGV[7] then
        return { epoch, ARGV[13], 1 }
    end
end

local made_room
if ARGV[14] ~= '' then
    local is_new = redis.call('EXISTS', KEYS[1]) == 0
    -- Ids cannot be forgotten within their window, and so a room that has many waits.
    local ids = ARGV[14] == 'full' and redis.call('HLEN', newer) + redis.call('HLEN', older) or 0
    made_room = first_kept()
    if is_new or ids > ids_max_when_full or not made_room then
        return refused(full)
    end
end

-- at, from, prev: when the present window of retention began, its first entry, and the first entry
-- of the window before. What stands before `prev` is older than a window.
local seq, place, at, from, prev, turned
local function add()
    seq = top + 1
    place = digits(seq)
    at, from, prev = int(meta[5], nil, 'log_meta'), int(meta[6], nil, 'log_meta'), int(meta[7], nil, 'log_meta')
    turned = not at or not prev or not from or now - at >= tonumber(ARGV[10]) or now < at
    if turned then
        at, from, prev = now, seq, from or seq
    end
    local keep_from = math.min(seq - tonumber(ARGV[9]) + 1, prev)
    if keep_from > 1 then
        return redis.pcall('XADD', KEYS[1], 'MINID', '~', digits(keep_from), place .. '-0',
            'e', epoch, 't', ARGV[1], 'p', ARGV[8])
    end
    return redis.pcall('XADD', KEYS[1], place .. '-0', 'e', epoch, 't', ARGV[1], 'p', ARGV[8])
end
local added = add()
if type(added) == 'table' and added.err and (string.find(added.err, 'XADD', 1, true)
    or string.find(added.err, 'exhausted', 1, true)) then
    -- The log has entries above the number that stands in its meta.
    epoch, top, meta = repaired(meta, int(meta[4], 0, 'log_meta'))
    added = add()
end
if type(added) == 'table' and added.err then
    error(added)
end
if turned then
    redis.call('HSET', KEYS[2], 's', place, 'at', digits(at), 'from', digits(from),
        'prev', digits(prev))
else
    redis.call('HSET', KEYS[2], 's', place)
end

-- The size of a stream costs a sample of it, so it is looked at now and then: every 64th entry,
-- and at each that is large.
if made_room then
    redis.call('XTRIM', KEYS[1], 'MINID', made_room)
elseif seq % 64 == 0 or #ARGV[8] > 65536 then
    local bytes = redis.call('MEMORY', 'USAGE', KEYS[1])
    local bytes_max = tonumber(ARGV[11])
    if bytes > bytes_max then
        local keep = math.floor(redis.call('XLEN', KEYS[1]) * bytes_max / bytes)
        redis.call('XTRIM', KEYS[1], 'MAXLEN', math.max(keep, 1))
    end
end

redis.call('HSET', newer, ARGV[7], epoch .. ':' .. place)
redis.call('PEXPIREAT', newer, gone)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('PUBLISH', ARGV[2], epoch .. ':' .. place .. ':' .. ARGV[1] .. '\n' .. ARGV[8])
return { epoch, place, 0 }
