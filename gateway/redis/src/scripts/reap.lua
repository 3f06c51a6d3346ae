-- Removes users of an ended process from a scope, some at a time.
--
-- KEYS, ARGV to 3 as in presence.lua
-- ARGV  4 the most users to remove
-- Returns how many are left.

-- The scan of a hash that was large before passes many empty slots.
local cursor, rows = '0'
repeat
    cursor, rows = unpack(redis.call('HSCAN', KEYS[2], cursor, 'COUNT', ARGV[4]))
until #rows > 0 or cursor == '0'
local epoch, number, since_version = version()
if not epoch then
    -- It was lost, or no gateway wrote it: a subscriber reads the whole presence.
    local now = digits(now_ms())
    epoch, number, since_version = now, 0, now
end
local left = {}
for i = 1, #rows, 2 do
    local user, connections = rows[i], connections_in(rows[i + 1], epoch)
    local total, since, active, name = row_of(user)
    if total and connections == 0 then
        -- The row was of a room that was deleted.
    elseif total and total > connections then
        total = digits(total - connections)
        redis.call('HSET', KEYS[1], user, total .. ' ' .. since .. ' ' .. active .. ' ' .. name)
    elseif total then
        redis.call('HDEL', KEYS[1], user)
        left[#left + 1] = user
        if not is_room then
            redis.call('ZREM', KEYS[5], user)
            publish_status(user, active)
        end
    end
    set_connections(user, 0, epoch)
end
if #left > 0 then
    publish_change(epoch, number + 1, since_version, '-' .. table.concat(left, '\n-') .. '\n')
end
local remaining = redis.call('HLEN', KEYS[2])
if remaining == 0 then
    redis.call('HDEL', KEYS[3], ARGV[1])
end
return remaining
