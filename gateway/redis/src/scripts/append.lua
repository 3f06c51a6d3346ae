-- Appends an entry to a room's log and publishes it, in one atomic step.
--
-- KEYS, ARGV to 6 as in the prelude
-- KEYS  8 of an inbox: last activity of offline users (sorted set)  9 online users (hash)
-- ARGV  7 dedup key: author and id  8 envelope
--       9 retention: entries kept in any case  10 window of further entries, ms  11 bytes of the log
--       12, 13 epoch and seq that were acknowledged for this entry before, or empty
--       14 memory pressure: empty, `high` above the watermark, `full` if no memory is left
--       15 of an inbox: its user  16 if that user is unseen: `reject` the first entry, keep the inbox
--       `limited`, or `unlimited`
--       17, 18, 19 the most entries, the most bytes and the ttl in ms of a limited inbox
-- Returns epoch, seq, and 1 if the entry was there before, 2 if it is the first of a limited inbox.
--
-- All checks come first, and XADD is the first write: an error leaves everything as it was. A room
-- whose only entry was rejected is closed again, so that rejected entries for ever new names keep
-- no memory.

local epoch, top, meta = open_room()
if not epoch then
    return unagreed
end

-- Above the watermark a log takes no more memory than before, except for entries as small as
-- messages that people type.
local small_entry_bytes, ids_max_when_full = 4096, 2000
local full = 'FULL memory is above the watermark'

local function rejected(reason)
    if not meta[1] then
        redis.call('DEL', KEYS[2])
    end
    return redis.error_reply(reason)
end

-- The first number to keep, so that the entries before it make room for the new one; nil if they do
-- not suffice.
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
    return #ARGV[8] <= small_entry_bytes and digits(top + 1) or nil
end

-- Appends to the inbox of an unseen user, which may never be read. It has no hashes of ids.
local function append_to_limited()
    local entries = redis.call('XRANGE', KEYS[1], '-', '+')
    local bytes = #ARGV[8]
    for _, entry in ipairs(entries) do
        local of_epoch, _, envelope = parse_entry(entry)
        if of_epoch and key_of(envelope) == ARGV[7] then
            return { of_epoch, seq_of(entry[1]), 1 }
        end
        bytes = bytes + #(entry[2][6] or '')
    end
    local bytes_max, number = tonumber(ARGV[18]), digits(top + 1)
    if #ARGV[8] > bytes_max then
        return rejected('UNSEENBYTES larger than the inbox of an unseen user may be')
    elseif #entries == 0 and ARGV[14] ~= '' then
        return rejected(full)
    elseif #entries == 0 and ARGV[16] == 'reject' then
        return rejected('UNSEENQUOTA too many inboxes of unseen users')
    end
    if ARGV[14] ~= '' then
        bytes_max = math.max(bytes - #ARGV[8], small_entry_bytes)
        if #ARGV[8] > bytes_max then
            return rejected(full)
        end
    end
    local dropped = 0
    while #entries - dropped >= tonumber(ARGV[17]) or bytes > bytes_max and dropped < #entries do
        dropped = dropped + 1
        bytes = bytes - #(entries[dropped][2][6] or '')
    end
    redis.call('XADD', KEYS[1], number .. '-0', 'e', epoch, 't', ARGV[1], 'p', ARGV[8])
    if dropped > 0 then
        redis.call('XTRIM', KEYS[1], 'MAXLEN', #entries + 1 - dropped)
    end
    redis.call('HSET', KEYS[2], 's', number)
    redis.call('PEXPIRE', KEYS[1], ARGV[19])
    redis.call('PEXPIRE', KEYS[2], ARGV[19])
    redis.call('PUBLISH', ARGV[2], epoch .. ':' .. number .. ':' .. ARGV[1] .. '\n' .. ARGV[8])
    archive(epoch .. ':' .. number, ARGV[8], ARGV[14] ~= '')
    return { epoch, number, #entries == 0 and 2 or 0 }
end

if KEYS[8] and not meta[9] then
    local is_unlimited = ARGV[16] == 'unlimited' or redis.call('ZSCORE', KEYS[8], ARGV[15])
        or redis.call('HEXISTS', KEYS[9], ARGV[15]) == 1
        -- A gateway of an earlier version has kept it without limits.
        or redis.call('XLEN', KEYS[1]) > tonumber(ARGV[17])
    if not is_unlimited then
        return append_to_limited()
    end
    keep_without_limits()
end

local now = now_ms()
local newer, older, expires = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[6]))
local known = redis.call('HGET', newer, ARGV[7]) or redis.call('HGET', older, ARGV[7])
if known then
    local of_epoch, seq = string.match(known, '^([%w_-]+):(%d+)$')
    if of_epoch and #of_epoch <= 32 and #seq <= 16 then
        return { of_epoch, seq, 1 }
    end
    report_invalid('dedup_id')
end
if ARGV[12] == epoch and tonumber(ARGV[13]) <= top then
    local _, _, there = entry_at(tonumber(ARGV[13]))
    if not there or key_of(there) == ARGV[7] then
        return { epoch, ARGV[13], 1 }
    end
end

local keep_from_when_full
if ARGV[14] ~= '' then
    local is_new = redis.call('EXISTS', KEYS[1]) == 0
    -- Ids cannot be forgotten within their window, so that a room with many ids has to wait.
    local ids = ARGV[14] == 'full' and redis.call('HLEN', newer) + redis.call('HLEN', older) or 0
    keep_from_when_full = first_kept()
    if is_new or ids > ids_max_when_full or not keep_from_when_full then
        return rejected(full)
    end
end

-- at, from, prev: when the present window of retention began, its first entry, and the first entry
-- of the window before. Entries before `prev` are older than a window.
local seq, number, at, from, prev, is_new_window
local function add()
    seq = top + 1
    number = digits(seq)
    at, from = int(meta[5], nil, 'log_meta'), int(meta[6], nil, 'log_meta')
    prev = int(meta[7], nil, 'log_meta')
    is_new_window = not at or not prev or not from or now - at >= tonumber(ARGV[10]) or now < at
    if is_new_window then
        at, from, prev = now, seq, from or seq
    end
    local keep_from = math.min(seq - tonumber(ARGV[9]) + 1, prev)
    if keep_from > 1 then
        return redis.pcall('XADD', KEYS[1], 'MINID', '~', digits(keep_from), number .. '-0',
            'e', epoch, 't', ARGV[1], 'p', ARGV[8])
    end
    return redis.pcall('XADD', KEYS[1], number .. '-0', 'e', epoch, 't', ARGV[1], 'p', ARGV[8])
end
local added = add()
if type(added) == 'table' and added.err and (string.find(added.err, 'XADD', 1, true)
    or string.find(added.err, 'exhausted', 1, true)) then
    -- The log has entries above the number in its meta.
    epoch, top, meta = repair(meta, int(meta[4], 0, 'log_meta'))
    added = add()
end
if type(added) == 'table' and added.err then
    error(added)
end
if is_new_window then
    redis.call('HSET', KEYS[2], 's', number, 'at', digits(at), 'from', digits(from),
        'prev', digits(prev))
else
    redis.call('HSET', KEYS[2], 's', number)
end

-- The size of a stream costs a sample of it, so that it is checked now and then: at every 64th
-- entry, and at each large one.
if keep_from_when_full then
    redis.call('XTRIM', KEYS[1], 'MINID', keep_from_when_full)
elseif seq % 64 == 0 or #ARGV[8] > 65536 then
    local bytes = redis.call('MEMORY', 'USAGE', KEYS[1])
    local bytes_max = tonumber(ARGV[11])
    if bytes > bytes_max then
        local keep = math.floor(redis.call('XLEN', KEYS[1]) * bytes_max / bytes)
        redis.call('XTRIM', KEYS[1], 'MAXLEN', math.max(keep, 1))
    end
end

redis.call('HSET', newer, ARGV[7], epoch .. ':' .. number)
redis.call('PEXPIREAT', newer, expires)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('PUBLISH', ARGV[2], epoch .. ':' .. number .. ':' .. ARGV[1] .. '\n' .. ARGV[8])
archive(epoch .. ':' .. number, ARGV[8], ARGV[14] ~= '')
return { epoch, number, 0 }
