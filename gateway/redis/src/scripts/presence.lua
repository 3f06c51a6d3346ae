-- Shared by the scripts that change presence in a scope: a room, or the cluster.
--
-- KEYS  1 presence (hash): of each user "<connections> <since> <active> <name>", and under `#` the
--       version, "<epoch> <number> <since>"
--       2 entries of one incarnation (hash): of each user "<epoch> <connections>"
--       3 the scopes of that incarnation (hash)
--       4 settings of a managed room (hash)  5 index (sorted set): rooms, or online users
--       6 of the cluster, last activity of offline users (sorted set)
-- ARGV  1 scope, `*` for the cluster  2 channel of the room; of the cluster, the common start of the
--       channels of status rooms  3 retention of a managed room without members, ms

local is_room = ARGV[1] ~= '*'

local function row_of(user)
    local row = redis.call('HGET', KEYS[1], user)
    if row then
        local total, since, active, name = string.match(row, '^(%d+) (%d+) (%d+) (.*)$')
        if not total or #total > 9 or #since > 15 or #active > 15 then
            report_invalid('presence')
            return nil
        end
        return tonumber(total), since, active, name
    end
end

-- The version, in its parts; nothing if no user is present.
local function version()
    local row = redis.call('HGET', KEYS[1], '#')
    if row then
        local epoch, number, since = string.match(row, '^(%d+) (%d+) (%d+)$')
        if not epoch or #epoch > 15 or #number > 15 or #since > 15 then
            report_invalid('presence')
            return nil
        end
        return epoch, tonumber(number), since
    end
end

-- The connections of a user in an incarnation's row, in this epoch: an earlier row is of a room
-- that was deleted.
local function connections_in(row, epoch)
    local of, connections = string.match(row or '', '^(%d+) (%d+)$')
    return of and of == epoch and tonumber(connections) or 0
end

-- Sets the connections of a user in the incarnation.
local function set_connections(user, connections, epoch)
    if connections > 0 then
        redis.call('HSET', KEYS[2], user, epoch .. ' ' .. digits(connections))
        redis.call('HSET', KEYS[3], ARGV[1], 1)
    else
        redis.call('HDEL', KEYS[2], user)
        if redis.call('EXISTS', KEYS[2]) == 0 then
            redis.call('HDEL', KEYS[3], ARGV[1])
        end
    end
end

-- Publishes that a user has come online, or gone offline after activity at `active`.
local function publish_status(user, active)
    if active then
        local kept_ms, kept_max = 30 * 24 * 3600 * 1000, 200000
        redis.call('ZADD', KEYS[6], active, user)
        redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', digits(tonumber(active) - kept_ms))
        redis.call('ZREMRANGEBYRANK', KEYS[6], 0, -kept_max - 1)
    end
    redis.call('PUBLISH', ARGV[2] .. user, '!s')
end

-- Sets the version after a change of presence, and publishes the change, whose lines are `lines`.
local function publish_change(epoch, number, since, lines)
    if redis.call('HLEN', KEYS[1]) > 1 then
        redis.call('HSET', KEYS[1], '#', epoch .. ' ' .. digits(number) .. ' ' .. since)
    else
        redis.call('DEL', KEYS[1])
        if is_room and redis.call('EXISTS', KEYS[4]) == 1 then
            redis.call('PEXPIRE', KEYS[4], ARGV[3])
        elseif is_room then
            redis.call('ZREM', KEYS[5], ARGV[1])
        end
    end
    if is_room then
        redis.call('PUBLISH', ARGV[2], '!p ' .. epoch .. ' ' .. digits(number) .. '\n' .. lines)
    end
end
