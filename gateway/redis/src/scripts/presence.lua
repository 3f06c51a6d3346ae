-- What scripts share that change who is present at a place: a room, or the cluster.
--
-- KEYS  1 who (hash): of each user "<connections> <since> <active> <name>", and under `#` the
--       version, "<epoch> <number> <since>"
--       2 of one process (hash): of each user that it has at the place "<epoch> <connections>"
--       3 the places where that process has somebody (hash)
--       4 record of a managed room (hash)  5 index (sorted set): rooms, or the users of the cluster
--       6 of the cluster, when users who have left did something last (sorted set)
-- ARGV  1 place, `*` for the cluster  2 channel of the room; of the cluster, what the channels of
--       users' statuses begin with  3 how long an empty managed room stays, ms

local is_room = ARGV[1] ~= '*'

local function row_of(user)
    local row = redis.call('HGET', KEYS[1], user)
    if row then
        local total, since, active, name = string.match(row, '^(%d+) (%d+) (%d+) (.*)$')
        if not total or #total > 9 or #since > 15 or #active > 15 then
            bad('presence')
            return nil
        end
        return tonumber(total), since, active, name
    end
end

-- The version, and its parts; nothing where nobody is present.
local function version()
    local row = redis.call('HGET', KEYS[1], '#')
    if row then
        local epoch, number, since = string.match(row, '^(%d+) (%d+) (%d+)$')
        if not epoch or #epoch > 15 or #number > 15 or #since > 15 then
            bad('presence')
            return nil
        end
        return epoch, tonumber(number), since
    end
end

-- How many connections a process has of a user, in this epoch: what it had before was of a room
-- that is no more.
local function had(row, epoch)
    local of, connections = string.match(row or '', '^(%d+) (%d+)$')
    return of and of == epoch and tonumber(connections) or 0
end

-- Notes how many connections a process has of a user.
local function seat(user, connections, epoch)
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

-- A user has come to the cluster, or left it, having done something last at `active`.
local function tell_status(user, active)
    if active then
        local kept_ms, kept_max = 30 * 24 * 3600 * 1000, 200000
        redis.call('ZADD', KEYS[6], active, user)
        redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', digits(tonumber(active) - kept_ms))
        redis.call('ZREMRANGEBYRANK', KEYS[6], 0, -kept_max - 1)
    end
    redis.call('PUBLISH', ARGV[2] .. user, '!s')
end

-- Notes that the users who were there have changed, as `lines` say, and passes that on.
local function changed(epoch, number, since, lines)
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
