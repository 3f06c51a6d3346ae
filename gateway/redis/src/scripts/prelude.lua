-- What all scripts share; it stands in front of each.
--
-- What stands in Redis is not trusted: an operator, a restore or another program may have written
-- it. A value that no gateway wrote is taken for absent, and repaired where a script knows better.
-- It never raises an error, since the room it is in could then not be touched any more.

-- The kinds of what was found so, which the gateway counts.
local found = {}

local function bad(kind)
    found[#found + 1] = kind
end

-- The largest number of an entry is 2^53-1. Above this no log is continued, so that it is not
-- reached.
local seq_max = 9007199254740991 - 1099511627776

-- A whole number that was read, or `default`, also where it is none of a gateway's.
local function int(value, default, kind)
    if not value then
        return default
    end
    local read = tonumber(value)
    if read and read >= 0 and read <= 9007199254740991 and read % 1 == 0 then
        return read
    end
    bad(kind)
    return default
end

-- The type that a gateway gives a key, by the last part of its name.
local function type_of(key)
    local part = string.match(key, '([^:]*)$')
    if part == 'log' or part == 'orders' then
        return 'stream'
    elseif part == 'rooms' or part == 'users' or part == 'seen' then
        return 'zset'
    elseif part == 'list' then
        return 'string'
    end
    return 'hash'
end

local function reply_of(script)
    local done, reply = pcall(script)
    if done then
        return reply
    end
    local text = type(reply) == 'table' and reply.err or tostring(reply)
    if not string.find(text, 'WRONGTYPE', 1, true) then
        -- An error of a command begins with its code, one of Lua does not.
        return redis.error_reply(string.find(text, '^%u+ ') and text or 'ERR ' .. text)
    end
    for _, key in ipairs(KEYS) do
        local is = redis.call('TYPE', key)
        is = type(is) == 'table' and is.ok or is
        if is ~= 'none' and is ~= type_of(key) then
            bad('key_type')
            redis.call('DEL', key)
        end
    end
    return script()
end

-- Runs a script. Where a key turns out to be of a type that no gateway gives it, it is deleted, as
-- if it had never been there, and the script runs again: errors of that kind come before its first
-- write. Where something was found that no gateway wrote, the reply is `!bad`, what that was, and
-- the reply.
local function run(script)
    local reply = reply_of(script)
    if #found > 0 and not (type(reply) == 'table' and reply.err) then
        return { '!bad', table.concat(found, ' '), reply }
    end
    return reply
end

local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Numbers above 10^14 would be written as 1e+15 by tostring.
local function digits(number)
    return string.format('%.0f', number)
end

-- The two hashes of ids at this moment: that of this window, that of the last, and when the first
-- is forgotten. A hash expires when its turn comes again, so that forgetting costs nothing and a
-- room has the same keys always.
local function id_hashes(one, two, now, window)
    local turn = math.floor(now / window)
    local gone = digits((turn + 2) * window)
    if turn % 2 == 0 then
        return one, two, gone
    end
    return two, one, gone
end

local stale = redis.error_reply('STALE the nodes have not agreed on this server under this token')

-- Whether the nodes have agreed on this server: nil, or the term of that agreement, and the last
-- term in which not everybody was heard. Terms count agreements, over all servers.
local function opened(barrier, token)
    local agreed = redis.call('HMGET', barrier, 't', 'open', 'n', 'owed')
    if agreed[1] == token and agreed[2] then
        return int(agreed[3], 0, 'barrier'), int(agreed[4], 0, 'barrier')
    end
end

-- Whether this is the server that the token names: a run of it, and what it replicates.
local function is_here(token)
    local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
    return token == string.sub(run_id, 1, 8) .. string.sub(history, 1, 8)
end

-- Has the sessions of a user be kept from now on. `new_ttl`: how long, where the user had none;
-- those that were there are not kept for a shorter time by that.
local function keep_sessions(sessions, data, ttl, new_ttl)
    for _, key in ipairs({ sessions, data }) do
        if new_ttl == '' then
            redis.call('PEXPIRE', key, ttl)
        elseif redis.call('PTTL', key) == -1 then
            redis.call('PEXPIRE', key, new_ttl)
        else
            redis.call('PEXPIRE', key, new_ttl, 'GT')
        end
    end
end

-- Whether all that is written goes into the append-only file. A snapshot alone may be from long
-- ago.
local function has_file()
    return string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1', 1, true) ~= nil
end

local function ordinal(epoch)
    return math.min(tonumber(string.match(epoch, '^(%d+)-')) or 0, 9007199254740990)
end

local function is_epoch(text)
    return #text <= 32 and string.find(text, '^[%w_-]+$') ~= nil
end

local function epoch_above(number, random)
    return digits(number + 1) .. '-' .. random
end

-- What the scripts of a room share:
--
-- KEYS  1 log (stream)  2 meta (hash)  3, 4 ids (two hashes that take turns)  5 barrier
--       6 unheard (hash): what restore_unconfirmed.lua was given
-- ARGV  1 token  2 channel  3 random part of an epoch  4 log ttl, ms  5 meta ttl, ms
--       6 dedup window, ms; a script's own from 7 on
--
-- Bytes 3 to 26 of an envelope are its id key.
local function key_of(envelope)
    return string.sub(envelope, 3, 26)
end

-- The number of an entry, by its id in the stream.
local function seq_of(id)
    return string.match(id, '^%d+')
end

-- Epoch, stamp and envelope of an entry of the stream; nil where no gateway wrote it. The largest
-- that one writes is a message of 16 MiB.
local function parts_of_entry(entry)
    local fields = entry[2]
    if #fields == 6 and fields[1] == 'e' and fields[3] == 't' and fields[5] == 'p'
        and #fields[6] >= 46 and #fields[6] <= 16842752 and is_epoch(fields[2]) then
        return fields[2], fields[4], fields[6]
    end
    bad('entry')
end

-- The entry at a number of the log: its epoch, stamp and envelope; nil where there is none.
local function entry_at(seq)
    local id = digits(seq) .. '-0'
    local there = redis.call('XRANGE', KEYS[1], id, id)[1]
    if there then
        return parts_of_entry(there)
    end
end

-- `ids`: `newer`, `older` and `gone` of id_hashes.
local function append(epoch, seq, entry, ids)
    local position = epoch .. ':' .. digits(seq)
    redis.call('XADD', KEYS[1], digits(seq) .. '-0', 'e', epoch, 't', entry.stamp, 'p', entry.envelope)
    redis.call('HSET', KEYS[2], 's', digits(seq))
    redis.call('HSET', ids.newer, key_of(entry.envelope), position)
    redis.call('PEXPIREAT', ids.newer, ids.gone)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    redis.call('PUBLISH', ARGV[2], position .. ':' .. entry.stamp .. '\n' .. entry.envelope)
end

-- An inbox was kept as that of a user who was never connected, whose ids are looked for in the log
-- itself. From now on it is kept as any.
local function keep_as_any()
    local ids = {}
    ids.newer, ids.older, ids.gone = id_hashes(KEYS[3], KEYS[4], now_ms(), tonumber(ARGV[6]))
    redis.call('HSET', KEYS[2], 'u', '1')
    local count = redis.call('XLEN', KEYS[1])
    if count == 0 or count > 1000 then
        return
    end
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 64)) do
        local position = entry[2][2] .. ':' .. string.match(entry[1], '^%d+')
        redis.call('HSET', ids.newer, key_of(entry[2][6]), position)
    end
    redis.call('PEXPIREAT', ids.newer, ids.gone)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
end

local function is_logged(envelope, ids)
    local key = key_of(envelope)
    return redis.call('HEXISTS', ids.newer, key) == 1 or redis.call('HEXISTS', ids.older, key) == 1
end

-- Puts what was acknowledged and reached nobody where it was, as far as numbers follow the top. A
-- number that lies between belonged to a publish that has no answer: where `may_fill`, one of those
-- takes it. Returns the top; whether all is where it was acknowledged; and what is not, in its
-- order.
--
-- Fields: `t` token, `<epoch>:<seq>` stamp and envelope of what was acknowledged there,
-- `?<process>:<number>` of what has no answer: last position at which that process was
-- acknowledged, or nothing, and envelope.
local function give_numbers_back(epoch, top, may_fill, ids)
    local rows = redis.call('HGETALL', KEYS[6])
    local known, acknowledged, unanswered, last = {}, {}, {}, 0
    for i = 1, #rows, 2 do
        local field, value = rows[i], rows[i + 1]
        if field == 't' and value ~= ARGV[1] then
            -- Given to a server that was here before.
            return top, true, {}
        elseif field ~= 't' then
            local break_at = string.find(value, '\n', 1, true) or 0
            local head, envelope = string.sub(value, 1, break_at - 1), string.sub(value, break_at + 1)
            local process, place = string.match(field, '^%?(.*):(%d+)$')
            local of, seq = string.match(field, '^(.*):(%d+)$')
            if break_at == 0 or #envelope < 46 or not of or tonumber(seq) > seq_max then
                bad('unconfirmed')
            elseif process then
                of, seq = string.match(head, '^(.*):(%d+)$')
                unanswered[#unanswered + 1] = {
                    process = process, number = tonumber(place), envelope = envelope,
                    after = of == epoch and tonumber(seq) or 0,
                }
            else
                -- A step that no node can have left is none of theirs: filling it would take for
                -- ever.
                if of == epoch and tonumber(seq) > top + 1000000 then
                    bad('unconfirmed')
                elseif of == epoch then
                    last = math.max(last, tonumber(seq))
                    acknowledged[tonumber(seq)] = { seq = tonumber(seq), stamp = head, envelope = envelope }
                    known[key_of(envelope)] = true
                end
            end
        end
    end
    local is_whole = true
    for seq, entry in pairs(acknowledged) do
        local _, _, there = entry_at(seq)
        if seq <= top and there and key_of(there) ~= key_of(entry.envelope) then
            is_whole = false
        end
    end

    -- By process, since what one of them waits for may be further on, and another's is next.
    table.sort(unanswered, function(a, b)
        return a.process < b.process or a.process == b.process and a.number < b.number
    end)
    local queues = {}
    for _, one in ipairs(unanswered) do
        local queue = queues[#queues]
        if not queue or queue.process ~= one.process then
            queue = { process = one.process, next_at = 1 }
            queues[#queues + 1] = queue
        end
        queue[#queue + 1] = one
    end
    local function next_unanswered(seq)
        for _, queue in ipairs(queues) do
            while queue[queue.next_at] and queue[queue.next_at].after < seq do
                local one = queue[queue.next_at]
                local key = key_of(one.envelope)
                queue.next_at = queue.next_at + 1
                if not known[key] and not is_logged(one.envelope, ids) then
                    known[key] = true
                    return { stamp = ARGV[1], envelope = one.envelope }
                end
            end
        end
    end
    while top < last do
        local entry = acknowledged[top + 1] or may_fill and next_unanswered(top + 1)
        if not entry then
            is_whole = false
            break
        end
        top = top + 1
        append(epoch, top, entry, ids)
    end
    if is_whole then
        return top, true, {}
    end
    local left = {}
    for _, entry in pairs(acknowledged) do
        if not is_logged(entry.envelope, ids) then
            left[#left + 1] = entry
        end
    end
    table.sort(left, function(a, b) return a.seq < b.seq end)
    return top, false, left
end

-- How long the meta of a room is kept, ms: for minutes where nothing has a number in its epoch, and
-- no deletion has to be remembered.
local function head_ttl(top, deleted)
    if top > 0 or deleted then
        return ARGV[5]
    end
    return digits(math.min(tonumber(ARGV[5]), 300000))
end

-- Repairs the meta of a room whose epoch or number no gateway wrote, or whose log has gone on above
-- it. The room goes on in a new epoch, which continues the former one as far as the log tells where
-- that was, so that members are told. What `fields` has is the meta as it was read.
local function repaired(fields, term)
    bad('log_meta')
    local epoch = fields[1] and is_epoch(fields[1]) and fields[1]
    local top = tonumber(fields[2])
    top = top and top >= 0 and top <= seq_max and top % 1 == 0 and top or 0
    local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
    if last then
        local at = tonumber(seq_of(last[1]))
        if at > seq_max then
            -- Redis takes no entry behind it.
            redis.call('DEL', KEYS[1])
        else
            epoch, top = epoch or parts_of_entry(last), math.max(top, at)
        end
    end
    local former = epoch
    epoch = epoch_above(former and ordinal(former) or 0, ARGV[3])
    redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev', 'xe', 'xs')
    redis.call('HSET', KEYS[2], 'e', epoch, 's', digits(top), 'r', ARGV[1], 'n', digits(term))
    if former then
        redis.call('HSET', KEYS[2], 'pe', former, 'ps', digits(top))
    end
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
    local repaired_fields = { epoch, digits(top) }
    repaired_fields[9] = fields[9]
    return epoch, top, repaired_fields
end

-- The room's epoch and top, and the fields of its meta as they were read; nothing where the nodes
-- have not agreed on this server. The first touch after that gives numbers back, and declares the
-- room whole under the token and in its term. Where somebody was not heard since it was so declared
-- last, who may have had more of it, or where a number that was acknowledged is another's, the room
-- goes on in a new epoch, with what was acknowledged and has no number else. The epoch remembers
-- the former one: also where that was on a server that is gone, and nobody touched the room there.
local function whole()
    local token = ARGV[1]
    local meta = redis.call('HMGET', KEYS[2], 'e', 's', 'r', 'n', 'at', 'from', 'prev', 'd', 'u')
    local epoch, top = meta[1], tonumber(meta[2])
    local is_good = epoch and top and top >= 0 and top <= seq_max and top % 1 == 0 and is_epoch(epoch)
    if is_good and meta[3] == token then
        return epoch, top, meta
    end
    if epoch and meta[3] == token then
        return repaired(meta, int(meta[4], 0, 'log_meta'))
    end
    local term, owed = opened(KEYS[5], token)
    if not term then
        return nil
    end
    if epoch and not is_good then
        return repaired(meta, term)
    elseif not epoch then
        -- The numbers are lost, and a log that may be left cannot be continued.
        redis.call('DEL', KEYS[1])
        epoch, top = epoch_above(0, ARGV[3]), 0
        redis.call('HSET', KEYS[2], 'e', epoch, 's', '0', 'r', token, 'n', digits(term))
    else
        local all_heard = int(meta[4], 0, 'log_meta') >= owed
        local ids, is_whole, left = {}
        ids.newer, ids.older, ids.gone = id_hashes(KEYS[3], KEYS[4], now_ms(), tonumber(ARGV[6]))
        top, is_whole, left = give_numbers_back(epoch, top, all_heard, ids)
        redis.call('HSET', KEYS[2], 'r', token, 'n', digits(term))
        if not (all_heard and is_whole) then
            local former = epoch
            epoch = epoch_above(ordinal(former), ARGV[3])
            redis.call('HSET', KEYS[2], 'e', epoch, 'pe', former, 'ps', digits(top))
            for _, entry in ipairs(left) do
                top = top + 1
                append(epoch, top, entry, ids)
            end
        end
    end
    redis.call('DEL', KEYS[6])
    redis.call('PEXPIRE', KEYS[2], head_ttl(top, meta[8]))
    return epoch, top, meta
end
