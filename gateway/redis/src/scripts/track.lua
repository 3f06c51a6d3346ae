-- Sets how many connections a user has in a scope on one process.
--
-- KEYS  to 6 as in presence.lua  7 read marks (hash)  8 meta of the room's log
-- ARGV  to 3 as in presence.lua
--       4 user  5 name  6 connections  7 since, ms  8 last activity of the user, ms
--       9 a random number  10 1 to check the conditions of a join, or empty
--       11 the password hash that the password matches, or empty
--       12 1 if the join may create the room, or empty
--       13 1 if the user is admitted, so that it may become present, or empty
--       14 with conditions: 1 if creating a room is within the quota and memory, `high` if not because
--       of memory, or empty
-- Returns the result, and for `ok` epoch, number, how many users are present, the user's read mark, the
-- ordinal of the epoch that the room's last deletion began, and 1 if the join has created the room.

local user, name, connections = ARGV[4], ARGV[5], tonumber(ARGV[6])
local total, since, active, former_name = row_of(user)
local was_present = total ~= nil
local epoch, number, since_version = version()
local count = epoch and redis.call('HLEN', KEYS[1]) - 1 or 0
local is_created = false

if ARGV[10] == '1' then
    local settings = redis.call('HMGET', KEYS[4], 'owner', 'password', 'max')
    if not settings[1] and not epoch and ARGV[12] ~= '1' then
        return { 'not_found' }
    end
    if settings[2] and settings[2] ~= ARGV[11] then
        return { 'wrong_password' }
    end
    local capacity = int(settings[3], nil, 'room_config')
    if capacity and not was_present and count >= capacity then
        return { 'full' }
    end
    is_created = not settings[1] and not epoch and redis.call('EXISTS', KEYS[8]) == 0
    if is_created and ARGV[14] ~= '1' then
        return { ARGV[14] == 'high' and 'high' or 'quota' }
    end
end

if was_present then
    total = total + connections - connections_in(redis.call('HGET', KEYS[2], user), epoch)
    active = tonumber(ARGV[8]) > tonumber(active) and ARGV[8] or active
    -- A report of a user that leaves this process has no name.
    name = name ~= '' and name or former_name
else
    connections = ARGV[13] == '1' and connections or 0
    total, since, active = connections, ARGV[7], ARGV[8]
end
local is_first = total > 0 and not epoch
if is_first then
    epoch, number, since_version = ARGV[9], 0, ARGV[7]
end
set_connections(user, connections, epoch)
if total > 0 then
    redis.call('HSET', KEYS[1], user, digits(total) .. ' ' .. since .. ' ' .. active .. ' ' .. name)
    if not was_present then
        if is_first then
            redis.call('PERSIST', KEYS[4])
        end
        redis.call('ZADD', KEYS[5], 0, is_room and ARGV[1] or user)
        number, count = number + 1, count + 1
        redis.call('HSET', KEYS[1], '#', epoch .. ' 0 ' .. since_version)
        publish_change(epoch, number, since_version, '+' .. user .. ' ' .. name .. '\n')
        if not is_room then
            publish_status(user)
        end
    end
elseif was_present then
    redis.call('HDEL', KEYS[1], user)
    if not is_room then
        redis.call('ZREM', KEYS[5], user)
        publish_status(user, active)
    end
    number, count = number + 1, count - 1
    publish_change(epoch, number, since_version, '-' .. user .. '\n')
end

local read = is_room and int(redis.call('HGET', KEYS[7], user), 0, 'read_mark') or 0
local meta = is_room and redis.call('HMGET', KEYS[8], 's', 'd') or {}
local top, deleted = int(meta[1], 0, 'log_meta'), digits(int(meta[2], 0, 'log_meta'))
local created = is_created and '1' or '0'
return { 'ok', epoch or '0', digits(number or 0), count, digits(math.min(read, top)), deleted, created }
