-- Has users leave a place whose process has ended, some at a time.
--
-- KEYS, ARGV as in presence.lua; ARGV 4: how many at most
-- Returns how many are left.

-- A hash that was large is scanned through many places that are empty.
local cursor, rows = '0'
repeat
    cursor, rows = unpack(redis.call('HSCAN', KEYS[2], cursor, 'COUNT', ARGV[4]))
until #rows > 0 or cursor == '0'
local epoch, number, begun = version()
if not epoch then
    -- It was lost, or no gateway wrote it: whoever follows the place reads all of it.
    local now = digits(now_ms())
    epoch, number, begun = now, 0, now
end
local left = {}
for i = 1, #rows, 2 do
    local user, connections = rows[i], had(rows[i + 1], epoch)
    local total, since, active, name = row_of(user)
    if total and connections == 0 then
        -- It had the user in a room that is no more.
    elseif total and total > connections then
        total = digits(total - connections)
        redis.call('HSET', KEYS[1], user, total .. ' ' .. since .. ' ' .. active .. ' ' .. name)
    elseif total then
        redis.call('HDEL', KEYS[1], user)
        left[#left + 1] = user
        if not is_room then
            redis.call('ZREM', KEYS[5], user)
            tell_status(user, active)
        end
    end
    seat(user, 0, epoch)
end
if #left > 0 then
    changed(epoch, number + 1, begun, '-' .. table.concat(left, '\n-') .. '\n')
end
local rest = redis.call('HLEN', KEYS[2])
if rest == 0 then
    redis.call('HDEL', KEYS[3], ARGV[1])
end
return rest
