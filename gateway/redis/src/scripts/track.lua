-- Notes how many connections a user has at a place on one process.
--
-- KEYS  as in presence.lua  7 how far users have read (hash)  8 meta of the room's log
-- ARGV  as in presence.lua
--       4 user  5 name  6 connections  7 since, ms  8 when the user did something last, ms
--       9 a random number  10 whether to keep to rules: 1 or empty
--       11 the hash that the password fits, or empty  12 whether the room may be made: 1 or empty
--       13 whether the user may come to be present by this: 1 or empty
--       14 with rules, whether a room may come to be that is not there: 1, `high` or empty
-- Returns what became of it, and for `ok` epoch, number, how many are present, how far the user has
-- read, the ordinal of the epoch that the room's last deletion began, and 1 where the room has come
-- to be.

local user, name, here = ARGV[4], ARGV[5], tonumber(ARGV[6])
local total, since, active, known_as = row_of(user)
local was_present = total ~= nil
local epoch, number, begun = version()
local count = epoch and redis.call('HLEN', KEYS[1]) - 1 or 0
local is_made = false

if ARGV[10] == '1' then
    local record = redis.call('HMGET', KEYS[4], 'owner', 'password', 'max')
    if not record[1] and not epoch and ARGV[12] ~= '1' then
        return { 'not_found' }
    end
    if record[2] and record[2] ~= ARGV[11] then
        return { 'wrong_password' }
    end
    local most = int(record[3], nil, 'room_config')
    if most and not was_present and count >= most then
        return { 'full' }
    end
    is_made = not record[1] and not epoch and redis.call('EXISTS', KEYS[8]) == 0
    if is_made and ARGV[14] ~= '1' then
        return { ARGV[14] == 'high' and 'high' or 'quota' }
    end
end

if was_present then
    total = total + here - had(redis.call('HGET', KEYS[2], user), epoch)
    active = tonumber(ARGV[8]) > tonumber(active) and ARGV[8] or active
    -- Who leaves here and is elsewhere tells no name.
    name = name ~= '' and name or known_as
else
    here = ARGV[13] == '1' and here or 0
    total, since, active = here, ARGV[7], ARGV[8]
end
local is_first = total > 0 and not epoch
if is_first then
    epoch, number, begun = ARGV[9], 0, ARGV[7]
end
seat(user, here, epoch)
if total > 0 then
    redis.call('HSET', KEYS[1], user, digits(total) .. ' ' .. since .. ' ' .. active .. ' ' .. name)
    if not was_present then
        if is_first then
            redis.call('PERSIST', KEYS[4])
        end
        redis.call('ZADD', KEYS[5], 0, is_room and ARGV[1] or user)
        number, count = number + 1, count + 1
        redis.call('HSET', KEYS[1], '#', epoch .. ' 0 ' .. begun)
        changed(epoch, number, begun, '+' .. user .. ' ' .. name .. '\n')
        if not is_room then
            tell_status(user)
        end
    end
elseif was_present then
    redis.call('HDEL', KEYS[1], user)
    if not is_room then
        redis.call('ZREM', KEYS[5], user)
        tell_status(user, active)
    end
    number, count = number + 1, count - 1
    changed(epoch, number, begun, '-' .. user .. '\n')
end

local read = is_room and int(redis.call('HGET', KEYS[7], user), 0, 'read_mark') or 0
local meta = is_room and redis.call('HMGET', KEYS[8], 's', 'd') or {}
local top, deleted = int(meta[1], 0, 'log_meta'), digits(int(meta[2], 0, 'log_meta'))
local made = is_made and '1' or '0'
return { 'ok', epoch or '0', digits(number or 0), count, digits(math.min(read, top)), deleted, made }
