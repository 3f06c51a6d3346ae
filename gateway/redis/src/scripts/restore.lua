#!lua flags=allow-oom
-- Restores a room's log: appends the entries that a node holds of it and the server lacks.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 the node's epoch  8 its top  9, 10 its former epoch and the last seq of that, or empty
--       11 "compare" or "restore"
--       12 origin and 13 dedup key of its top entry, or empty if the node does not hold
--       it
--       14 the generation under which the node knows the room to have been opened last
--       15 seq, 16 origin and 17 dedup key of the oldest entry that it holds, or 0 and empty
--       18 count of entries  then per entry: seq, epoch, origin, envelope
--       then per older id: dedup key, position
-- Returns "complete" (the log lacks nothing), "epoch_changed" (the room continues in another epoch),
-- "incomplete" (call again with "restore" and the entries), "restored", or "conflict" (two
-- histories share numbers, or the node has delivered entries that neither it nor the log has: the
-- room continues in a new epoch).

local server_id, epoch, top, random = ARGV[1], ARGV[7], tonumber(ARGV[8]), ARGV[3]
if not is_this_server(server_id) then
    return unagreed
end
local now = now_ms()
local meta = redis.call('HMGET', KEYS[2], 'e', 's')
local log_epoch, log_top = meta[1], int(meta[2], 0, 'log_meta')
if log_epoch and not is_epoch(log_epoch) then
    -- Like an epoch before all others: the room continues above the node's epoch.
    report_invalid('log_meta')
    log_epoch = '0-unreadable'
end

-- Whether the log's entry `seq` has this origin and dedup key; nil if the log has no such
-- entry.
local function holds(seq, origin, key)
    local _, logged_origin, logged = entry_at(tonumber(seq))
    if logged then
        return logged_origin == origin and key_of(logged) == key
    end
end

-- Handles a conflict: numbers continue, in an epoch without a former one.
local function conflict(above)
    redis.call('HSET', KEYS[2], 'e', epoch_above(above, random))
    redis.call('HDEL', KEYS[2], 'pe', 'ps')
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
    return 'conflict'
end

-- Whether the node has delivered entries that are neither in the log, which continues in another
-- epoch, nor held by the node any more: another server took them meanwhile, too many to hold.
-- Members on other nodes may have been notified of the new epoch before those entries were
-- acknowledged, so they are notified once more. `xe` and `xs` of the meta: the epoch and number up
-- to which this was done.
local function has_lost_delivered_entries()
    local meta = redis.call('HMGET', KEYS[2], 'd', 'pe', 'ps', 'xe', 'xs')
    local oldest = tonumber(ARGV[15])
    if oldest <= 1 or ordinal(epoch) < int(meta[1], 0, 'log_meta')
        or meta[4] == epoch and top <= int(meta[5], 0, 'log_meta') then
        return false
    end
    if meta[2] == epoch then
        return oldest > int(meta[3], 0, 'log_meta') + 1
    end
    return not holds(ARGV[15], ARGV[16], ARGV[17])
end

if log_epoch and log_epoch ~= epoch and ordinal(log_epoch) >= ordinal(epoch) then
    if has_lost_delivered_entries() then
        redis.call('HSET', KEYS[2], 'xe', epoch, 'xs', digits(top))
        return conflict(ordinal(log_epoch))
    end
    return 'epoch_changed'
end
if log_epoch == epoch and log_top >= top then
    local holds_top = top > 0 and ARGV[12] ~= ''
    if not holds_top or holds(top, ARGV[12], ARGV[13]) ~= false then
        return 'complete'
    end
end
if ARGV[11] == 'compare' then
    return 'incomplete'
end

local newer, older, expires = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[6]))
local count = tonumber(ARGV[18])
local entries = {}
for i = 0, count - 1 do
    local at = 19 + 4 * i
    entries[i + 1] = {
        seq = tonumber(ARGV[at]), epoch = ARGV[at + 1], origin = ARGV[at + 2], envelope = ARGV[at + 3],
        key = key_of(ARGV[at + 3]),
    }
end
local first = count > 0 and entries[1].seq or top + 1

local replaces = not log_epoch
if log_epoch and log_epoch ~= epoch then
    -- The server has an older state, from before the node's epoch.
    if agreement(KEYS[5], server_id) then
        return conflict(ordinal(epoch))
    end
    -- Ids of discarded entries are forgotten; those of the node's entries are recorded again below.
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
        local _, _, envelope = parse_entry(entry)
        if envelope then
            redis.call('HDEL', newer, key_of(envelope))
            redis.call('HDEL', older, key_of(envelope))
        end
    end
    replaces = true
end
if replaces then
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[2], 'e', epoch, 's', digits(first - 1), 'at', digits(now),
        'from', digits(first), 'prev', digits(first), 'r', 'healing', 'u', '1',
        -- A node that restores to an open server has not checked in there: others may have held
        -- more.
        'n', agreement(KEYS[5], server_id) and '-1' or ARGV[14])
    if ARGV[9] ~= '' then
        redis.call('HSET', KEYS[2], 'pe', ARGV[9], 'ps', ARGV[10])
    else
        redis.call('HDEL', KEYS[2], 'pe', 'ps')
    end
    log_top = first - 1
elseif count > 0 then
    local ids = {}
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], digits(first) .. '-0', digits(top) .. '-0')) do
        local _, origin, envelope = parse_entry(entry)
        if envelope then
            ids[tonumber(seq_of(entry[1]))] = origin .. key_of(envelope)
        end
    end
    for _, entry in ipairs(entries) do
        if ids[entry.seq] and ids[entry.seq] ~= entry.origin .. entry.key then
            return conflict(ordinal(log_epoch))
        end
    end
end
if first > log_top + 1 then
    -- No node holds the entries in between: the log begins behind them.
    redis.call('DEL', KEYS[1])
end

local added = false
for _, entry in ipairs(entries) do
    local position = entry.epoch .. ':' .. digits(entry.seq)
    if entry.seq > log_top then
        local reply = redis.pcall('XADD', KEYS[1], digits(entry.seq) .. '-0',
            'e', entry.epoch, 't', entry.origin, 'p', entry.envelope)
        if type(reply) == 'table' and reply.err then
            -- The log has entries above the number in its meta.
            report_invalid('log_meta')
            redis.call('DEL', KEYS[1])
            return conflict(math.max(ordinal(log_epoch or epoch), ordinal(epoch)))
        end
        redis.call('PUBLISH', ARGV[2], position .. ':' .. entry.origin .. '\n' .. entry.envelope)
        archive(position, entry.envelope)
        added = true
    end
    if redis.call('HEXISTS', older, entry.key) == 0 then
        redis.call('HSETNX', newer, entry.key, position)
    end
end
for i = 19 + 4 * count, #ARGV, 2 do
    if redis.call('HEXISTS', older, ARGV[i]) == 0 then
        redis.call('HSETNX', newer, ARGV[i], ARGV[i + 1])
    end
end
if top > log_top then
    redis.call('HSET', KEYS[2], 's', digits(top))
end
redis.call('PEXPIREAT', newer, expires)
if added then
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if redis.call('HGET', KEYS[5], 't') == server_id then
    redis.call('HSET', KEYS[5], 'busy', digits(now))
end
return 'restored'
