-- The prelude: shared functions, which precede every script. The gateway puts `archive_backlog_max` in
-- front of it.
--
-- Values in Redis are untrusted: an operator, a restore or another program may have written them. A
-- value that no gateway wrote counts as absent, and is repaired where a script has a better one. It
-- never raises an error, since its room would not be accessible any more.

-- The kinds of invalid values that were found; the gateway counts them.
local invalid = {}

local function report_invalid(kind)
    invalid[#invalid + 1] = kind
end

-- The largest number of an entry is 2^53-1. Logs do not continue above this limit, so that it is
-- never
-- reached.
local seq_max = 9007199254740991 - 1099511627776

-- A whole number that was read; `default` if it is absent or no gateway wrote it.
local function int(value, default, kind)
    if not value then
        return default
    end
    local read = tonumber(value)
    if read and read >= 0 and read <= 9007199254740991 and read % 1 == 0 then
        return read
    end
    report_invalid(kind)
    return default
end

-- The type that gateways give a key, by the last part of its name.
local function type_of(key)
    local part = string.match(key, '([^:]*)$')
    if part == 'log' or part == 'orders' or part == 'archive' then
        return 'stream'
    elseif part == 'rooms' or part == 'users' or part == 'seen' then
        return 'zset'
    elseif part == 'list' then
        return 'string'
    end
    return 'hash'
end

local function reply_or_retry(script)
    local done, reply = pcall(script)
    if done then
        return reply
    end
    local text = type(reply) == 'table' and reply.err or tostring(reply)
    if not string.find(text, 'WRONGTYPE', 1, true) then
        -- An error of a command begins with its code, an error of Lua does not.
        return redis.error_reply(string.find(text, '^%u+ ') and text or 'ERR ' .. text)
    end
    for _, key in ipairs(KEYS) do
        local is = redis.call('TYPE', key)
        is = type(is) == 'table' and is.ok or is
        if is ~= 'none' and is ~= type_of(key) then
            report_invalid('key_type')
            redis.call('DEL', key)
        end
    end
    return script()
end

-- Runs a script. If a key has a type that no gateway gives it, deletes the key and runs the script
-- again: errors of that kind come before the script's first write. If invalid values were found,
-- the reply is `!bad`, their kinds, and the reply of the script.
local function run(script)
    local reply = reply_or_retry(script)
    if #invalid > 0 and not (type(reply) == 'table' and reply.err) then
        return { '!bad', table.concat(invalid, ' '), reply }
    end
    return reply
end

local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- tostring would write numbers above 10^14 as 1e+15.
local function digits(number)
    return string.format('%.0f', number)
end

-- The two hashes of ids at this moment: of the present window and of the last one, and when the
-- first one expires. A hash expires when its turn comes again, so that forgetting ids costs nothing
-- and a room always has the same keys.
local function id_hashes(one, two, now, window)
    local turn = math.floor(now / window)
    local expires = digits((turn + 2) * window)
    if turn % 2 == 0 then
        return one, two, expires
    end
    return two, one, expires
end

local unagreed = redis.error_reply('STALE the nodes have not agreed on this server under this token')

-- The agreement of the nodes on this server: its generation, and the last incomplete generation;
-- nil without an agreement. Generations count agreements, over all servers.
local function agreement(barrier, server_id)
    local agreed = redis.call('HMGET', barrier, 't', 'open', 'n', 'owed')
    if agreed[1] == server_id and agreed[2] then
        return int(agreed[3], 0, 'barrier'), int(agreed[4], 0, 'barrier')
    end
end

-- Whether this is the server of a server id: a run of a server and the data set that it replicates.
local function is_this_server(server_id)
    local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
    return server_id == string.sub(run_id, 1, 8) .. string.sub(history, 1, 8)
end

-- Sets the retention of a user's sessions. `new_ttl`: the retention if the user had none;
-- existing sessions are not kept for a shorter time because of it.
local function expire_sessions(sessions, data, ttl, new_ttl)
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

-- Whether every write goes into the append-only file. A snapshot alone may be old.
local function has_append_only_file()
    return string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1', 1, true) ~= nil
end

local function ordinal(epoch)
    return math.min(tonumber(string.match(epoch, '^(%d+)-')) or 0, 9007199254740990)
end

local function is_epoch(text)
    return #text <= 32 and string.find(text, '^[%w_-]+$') ~= nil
end

-- An epoch with the ordinal above `number`. `random` is ARGV 3 of the scripts of a room.
local function epoch_above(number, random)
    return digits(number + 1) .. '-' .. string.match(random, '^%w*')
end

-- Keys and arguments that the scripts of a room share:
--
-- KEYS  1 log (stream)  2 meta (hash)  3, 4 ids (two hashes that take turns)  5 barrier
--       6 unconfirmed publishes (hash), from restore_unconfirmed.lua  7 archive (stream)
-- ARGV  1 server id  2 channel  3 random part of an epoch; with an archive also "<ordinal> <seq>", above
--       which a room begins that Redis does not have  4 ttl of the log, ms  5 ttl of the meta, ms
--       6 dedup window, ms; arguments of a script of its own from 7 on
--
-- Bytes 3 to 26 of an envelope are its dedup key.
local function key_of(envelope)
    return string.sub(envelope, 3, 26)
end

-- The number of an entry, from its id in the stream.
local function seq_of(id)
    return string.match(id, '^%d+')
end

-- Epoch, origin and envelope of an entry of the stream; nil if no gateway wrote it. The largest one
-- that a gateway writes is a message of 16 MiB.
local function parse_entry(entry)
    local fields = entry[2]
    if #fields == 6 and fields[1] == 'e' and fields[3] == 't' and fields[5] == 'p'
        and #fields[6] >= 46 and #fields[6] <= 16842752 and is_epoch(fields[2]) then
        return fields[2], fields[4], fields[6]
    end
    report_invalid('entry')
end

-- Epoch, origin and envelope of the entry with a number; nil if the log does not have it.
local function entry_at(seq)
    local id = digits(seq) .. '-0'
    local there = redis.call('XRANGE', KEYS[1], id, id)[1]
    if there then
        return parse_entry(there)
    end
end

-- Adds a record of a room, not of an inbox, to the archive stream, from which the gateways copy it to
-- the archive: `envelope` of the entry at `position`, or the position that a deletion began, without an
-- envelope. If the stream has no space for an entry, notes the room, whose log is copied later.
local function archive(position, envelope, has_no_space)
    if archive_backlog_max == 0 or string.find(ARGV[2], '}:u:', 1, true) then
        return
    elseif envelope and (has_no_space or redis.call('XLEN', KEYS[7]) >= archive_backlog_max) then
        redis.call('SADD', KEYS[7] .. ':behind', ARGV[2])
    else
        redis.call('XADD', KEYS[7], '*', 'c', ARGV[2], 'n', position, 'p', envelope or '')
    end
end

-- `ids`: `newer`, `older` and `expires` of id_hashes.
local function append(epoch, seq, entry, ids)
    local position = epoch .. ':' .. digits(seq)
    redis.call('XADD', KEYS[1], digits(seq) .. '-0', 'e', epoch, 't', entry.origin, 'p', entry.envelope)
    redis.call('HSET', KEYS[2], 's', digits(seq))
    redis.call('HSET', ids.newer, key_of(entry.envelope), position)
    redis.call('PEXPIREAT', ids.newer, ids.expires)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    redis.call('PUBLISH', ARGV[2], position .. ':' .. entry.origin .. '\n' .. entry.envelope)
    archive(position, entry.envelope)
end

-- Keeps an inbox like any other from now on, which was limited as that of an unseen user. Its ids
-- were looked up in the log itself.
local function keep_without_limits()
    local ids = {}
    ids.newer, ids.older, ids.expires = id_hashes(KEYS[3], KEYS[4], now_ms(), tonumber(ARGV[6]))
    redis.call('HSET', KEYS[2], 'u', '1')
    local count = redis.call('XLEN', KEYS[1])
    if count == 0 or count > 1000 then
        return
    end
    for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 64)) do
        local position = entry[2][2] .. ':' .. string.match(entry[1], '^%d+')
        redis.call('HSET', ids.newer, key_of(entry[2][6]), position)
    end
    redis.call('PEXPIREAT', ids.newer, ids.expires)
    redis.call('PEXPIRE', KEYS[1], ARGV[4])
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
end

local function is_logged(envelope, ids)
    local key = key_of(envelope)
    return redis.call('HEXISTS', ids.newer, key) == 1 or redis.call('HEXISTS', ids.older, key) == 1
end

-- Appends unconfirmed publishes, each acknowledged one with its number, as far as numbers follow
-- the top without a gap. A gap belonged to a publish without an answer: with `may_fill`, such a
-- publish takes it. Returns the top; whether every acknowledged publish has its number; and those
-- that have not, in their
-- order.
--
-- Fields: `t` server id; `<epoch>:<seq>` origin and envelope of a publish that was acknowledged at
-- this position; `?<process>:<number>` of a publish without an answer: the last position that was
-- acknowledged to that process, or nothing, and the envelope.
local function restore_unconfirmed(epoch, top, may_fill, ids)
    local rows = redis.call('HGETALL', KEYS[6])
    local known, acknowledged, unanswered, last = {}, {}, {}, 0
    for i = 1, #rows, 2 do
        local field, value = rows[i], rows[i + 1]
        if field == 't' and value ~= ARGV[1] then
            -- Handed in to a former server.
            return top, true, {}
        elseif field ~= 't' then
            local head_end = string.find(value, '\n', 1, true) or 0
            local head, envelope = string.sub(value, 1, head_end - 1), string.sub(value, head_end + 1)
            local process, send_number = string.match(field, '^%?(.*):(%d+)$')
            local of_epoch, seq = string.match(field, '^(.*):(%d+)$')
            if head_end == 0 or #envelope < 46 or not of_epoch or tonumber(seq) > seq_max then
                report_invalid('unconfirmed')
            elseif process then
                of_epoch, seq = string.match(head, '^(.*):(%d+)$')
                unanswered[#unanswered + 1] = {
                    process = process, number = tonumber(send_number), envelope = envelope,
                    after = of_epoch == epoch and tonumber(seq) or 0,
                }
            else
                -- No node can have left such a gap, and filling it would take for
                -- ever.
                if of_epoch == epoch and tonumber(seq) > top + 1000000 then
                    report_invalid('unconfirmed')
                elseif of_epoch == epoch then
                    last = math.max(last, tonumber(seq))
                    acknowledged[tonumber(seq)] = { seq = tonumber(seq), origin = head, envelope = envelope }
                    known[key_of(envelope)] = true
                end
            end
        end
    end
    local is_restored = true
    for seq, entry in pairs(acknowledged) do
        local _, _, there = entry_at(seq)
        if seq <= top and there and key_of(there) ~= key_of(entry.envelope) then
            is_restored = false
        end
    end

    -- By process, since a publish of one process may have to wait for a later number while
    -- another's is next.
    table.sort(unanswered, function(a, b)
        return a.process < b.process or a.process == b.process and a.number < b.number
    end)
    local queues = {}
    for _, publish in ipairs(unanswered) do
        local queue = queues[#queues]
        if not queue or queue.process ~= publish.process then
            queue = { process = publish.process, next_at = 1 }
            queues[#queues + 1] = queue
        end
        queue[#queue + 1] = publish
    end
    local function next_unanswered(seq)
        for _, queue in ipairs(queues) do
            while queue[queue.next_at] and queue[queue.next_at].after < seq do
                local publish = queue[queue.next_at]
                local key = key_of(publish.envelope)
                queue.next_at = queue.next_at + 1
                if not known[key] and not is_logged(publish.envelope, ids) then
                    known[key] = true
                    return { origin = ARGV[1], envelope = publish.envelope }
                end
            end
        end
    end
    while top < last do
        local entry = acknowledged[top + 1] or may_fill and next_unanswered(top + 1)
        if not entry then
            is_restored = false
            break
        end
        top = top + 1
        append(epoch, top, entry, ids)
    end
    if is_restored then
        return top, true, {}
    end
    local remaining = {}
    for _, entry in pairs(acknowledged) do
        if not is_logged(entry.envelope, ids) then
            remaining[#remaining + 1] = entry
        end
    end
    table.sort(remaining, function(a, b) return a.seq < b.seq end)
    return top, false, remaining
end

-- The retention of a room's meta, ms: minutes if its epoch has given no number and no deletion has
-- to be remembered.
local function head_ttl(top, deleted)
    if top > 0 or deleted then
        return ARGV[5]
    end
    return digits(math.min(tonumber(ARGV[5]), 300000))
end

-- Repairs the meta of a room whose epoch or number no gateway wrote, or whose log has entries above
-- its number. The room continues in a new epoch, whose former epoch and number are those that the
-- log shows, so that members are notified. `fields` is the meta as it was read.
local function repair(fields, generation)
    report_invalid('log_meta')
    local epoch = fields[1] and is_epoch(fields[1]) and fields[1]
    local top = tonumber(fields[2])
    top = top and top >= 0 and top <= seq_max and top % 1 == 0 and top or 0
    local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
    if last then
        local at = tonumber(seq_of(last[1]))
        if at > seq_max then
            -- Redis accepts no entry behind it.
            redis.call('DEL', KEYS[1])
        else
            epoch, top = epoch or parse_entry(last), math.max(top, at)
        end
    end
    local former = epoch
    epoch = epoch_above(former and ordinal(former) or 0, ARGV[3])
    redis.call('HDEL', KEYS[2], 'pe', 'ps', 'at', 'from', 'prev', 'xe', 'xs')
    redis.call('HSET', KEYS[2], 'e', epoch, 's', digits(top), 'r', ARGV[1], 'n', digits(generation))
    if former then
        redis.call('HSET', KEYS[2], 'pe', former, 'ps', digits(top))
    end
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
    local repaired_fields = { epoch, digits(top) }
    repaired_fields[9] = fields[9]
    return epoch, top, repaired_fields
end

-- Opens a room. Returns its epoch and top, and the fields of its meta as they were read; nothing if
-- the nodes have not agreed on this server. The first access after an agreement restores
-- unconfirmed publishes, and records the server id and generation under which the room was opened.
-- The room continues in a new epoch if a process that may have held more of it was missing since
-- the room was opened last, or if another message has a number that was acknowledged; acknowledged
-- publishes without a number are appended there. The new epoch remembers the former one, even if no
-- node has accessed the room on the server that the former one was on.
local function open_room()
    local server_id = ARGV[1]
    local meta = redis.call('HMGET', KEYS[2], 'e', 's', 'r', 'n', 'at', 'from', 'prev', 'd', 'u')
    local epoch, top = meta[1], tonumber(meta[2])
    local is_good = epoch and top and top >= 0 and top <= seq_max and top % 1 == 0 and is_epoch(epoch)
    if is_good and meta[3] == server_id then
        return epoch, top, meta
    end
    if epoch and meta[3] == server_id then
        return repair(meta, int(meta[4], 0, 'log_meta'))
    end
    local generation, last_incomplete = agreement(KEYS[5], server_id)
    if not generation then
        return nil
    end
    if epoch and not is_good then
        return repair(meta, generation)
    elseif not epoch then
        -- The numbers are lost, so that the entries that may be left cannot be continued.
        redis.call('DEL', KEYS[1])
        local archived_ordinal, archived_seq = string.match(ARGV[3], ' (%d+) (%d+)$')
        epoch, top = epoch_above(tonumber(archived_ordinal or 0), ARGV[3]), tonumber(archived_seq or 0)
        redis.call('HSET', KEYS[2], 'e', epoch, 's', digits(top), 'r', server_id, 'n', digits(generation))
    else
        local is_complete = int(meta[4], 0, 'log_meta') >= last_incomplete
        local ids, is_restored, remaining = {}
        ids.newer, ids.older, ids.expires = id_hashes(KEYS[3], KEYS[4], now_ms(), tonumber(ARGV[6]))
        top, is_restored, remaining = restore_unconfirmed(epoch, top, is_complete, ids)
        redis.call('HSET', KEYS[2], 'r', server_id, 'n', digits(generation))
        if not (is_complete and is_restored) then
            local former = epoch
            epoch = epoch_above(ordinal(former), ARGV[3])
            redis.call('HSET', KEYS[2], 'e', epoch, 'pe', former, 'ps', digits(top))
            for _, entry in ipairs(remaining) do
                top = top + 1
                append(epoch, top, entry, ids)
            end
        end
    end
    redis.call('DEL', KEYS[6])
    redis.call('PEXPIRE', KEYS[2], head_ttl(top, meta[8]))
    return epoch, top, meta
end
