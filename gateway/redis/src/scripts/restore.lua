#!lua flags=allow-oom
-- Gives a room back to a server what a node holds of it and the server lacks.
--
-- KEYS, ARGV to 6 as in the prelude
-- ARGV  7 the node's epoch  8 its top  9, 10 its former epoch and that one's last seq, or empty
--       11 "ask" or "give"  12 stamp and 13 id key of its top entry, or empty where it has not got
--       it
--       14 the term in which the node knows the room to have been declared whole last
--       15 seq, 16 stamp and 17 id key of the oldest entry it has, or 0 and empty
--       18 count of entries  then per entry: seq, epoch, stamp, envelope  then per older id: id
--       key, position
-- Returns "whole" (nothing was missing), "other" (the room has gone on in another epoch), "ask"
-- (call again with "give" and the entries), "healed", or "conflict" (two histories share numbers,
-- or the node passed more on than it still has and the log lacks it: the room goes on in a new
-- epoch).

local token, epoch, top, random = ARGV[1], ARGV[7], tonumber(ARGV[8]), ARGV[3]
if not is_here(token) then
    return stale
end
local now = now_ms()
local meta = redis.call('HMGET', KEYS[2], 'e', 's')
local here, here_top = meta[1], int(meta[2], 0, 'log_meta')
if here and not is_epoch(here) then
    -- As one from before all others: it goes on above the node's.
    bad('log_meta')
    here = '0-unreadable'
end

-- Whether the log's entry `seq` is that with this stamp and id key; nil where the log does not have
-- one.
local function holds(seq, stamp, key)
    local _, there_stamp, there = entry_at(tonumber(seq))
    if there then
        return there_stamp == stamp and key_of(there) == key
    end
end

-- A conflict: numbers go on, and nothing of either history is continued.
local function lift(above)
    redis.call('HSET', KEYS[2], 'e', epoch_above(above, random))
    redis.call('HDEL', KEYS[2], 'pe', 'ps')
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
    return 'conflict'
end

-- Whether the node has passed entries on that are neither in the log, which has gone on in another
-- epoch, nor with the node any more: another server took them meanwhile, and too many to be held.
-- Members elsewhere may have been told of the new epoch before those were acknowledged, so they are
-- told once more. `xe` and `xs` of the meta: up to where this was done, in which epoch.
local function has_lost_more_than_it_holds()
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

if here and here ~= epoch and ordinal(here) >= ordinal(epoch) then
    if has_lost_more_than_it_holds() then
        redis.call('HSET', KEYS[2], 'xe', epoch, 'xs', digits(top))
        return lift(ordinal(here))
    end
    return 'other'
end
if here == epoch and here_top >= top then
    local is_known = top > 0 and ARGV[12] ~= ''
    if not is_known or holds(top, ARGV[12], ARGV[13]) ~= false then
        return 'whole'
    end
end
if ARGV[11] == 'ask' then
    return 'ask'
end

local newer, older, gone = id_hashes(KEYS[3], KEYS[4], now, tonumber(ARGV[6]))
local count = tonumber(ARGV[18])
local entries = {}
for i = 0, count - 1 do
    local at = 19 + 4 * i
    entries[i + 1] = {
        seq = tonumber(ARGV[at]), epoch = ARGV[at + 1], stamp = ARGV[at + 2], envelope = ARGV[at + 3],
        key = key_of(ARGV[at + 3]),
    }
end
local first = count > 0 and entries[1].seq or top + 1

local replaces = not here
if here and here ~= epoch then
    -- The server is at an older state, from before the node's epoch.
    if opened(KEYS[5], token) then
        return lift(ordinal(epoch))
    end
    -- What is thrown out is not known any more; what the node has is noted again below.
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
        local _, _, envelope = parts_of_entry(entry)
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
        -- Who gives it back to a server that is open was not heard there: others may have had more.
        'n', opened(KEYS[5], token) and '-1' or ARGV[14])
    if ARGV[9] ~= '' then
        redis.call('HSET', KEYS[2], 'pe', ARGV[9], 'ps', ARGV[10])
    else
        redis.call('HDEL', KEYS[2], 'pe', 'ps')
    end
    here_top = first - 1
elseif count > 0 then
    local ids = {}
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], digits(first) .. '-0', digits(top) .. '-0')) do
        local _, stamp, envelope = parts_of_entry(entry)
        if envelope then
            ids[tonumber(seq_of(entry[1]))] = stamp .. key_of(envelope)
        end
    end
    for _, entry in ipairs(entries) do
        if ids[entry.seq] and ids[entry.seq] ~= entry.stamp .. entry.key then
            return lift(ordinal(here))
        end
    end
end
if first > here_top + 1 then
    -- What lies between is with nobody: the log begins behind it.
    redis.call('DEL', KEYS[1])
end

local added = false
for _, entry in ipairs(entries) do
    local position = entry.epoch .. ':' .. digits(entry.seq)
    if entry.seq > here_top then
        local reply = redis.pcall('XADD', KEYS[1], digits(entry.seq) .. '-0',
            'e', entry.epoch, 't', entry.stamp, 'p', entry.envelope)
        if type(reply) == 'table' and reply.err then
            -- The log has entries above the number that stands in its meta.
            bad('log_meta')
            redis.call('DEL', KEYS[1])
            return lift(math.max(ordinal(here or epoch), ordinal(epoch)))
        end
        redis.call('PUBLISH', ARGV[2], position .. ':' .. entry.stamp .. '\n' .. entry.envelope)
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
if top > here_top then
    redis.call('HSET', KEYS[2], 's', digits(top))
end
redis.call('PEXPIREAT', newer, gone)
if added then
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if redis.call('HGET', KEYS[5], 't') == token then
    redis.call('HSET', KEYS[5], 'busy', digits(now))
end
return 'healed'
