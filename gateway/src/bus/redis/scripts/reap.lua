-- Has users leave a place whose process has ended, some at a time.
--
-- KEYS, ARGV as in present.lua; ARGV 4: how many at most
-- Returns how many are left.

local rows = redis.call('HSCAN', KEYS[2], '0', 'COUNT', ARGV[4])[2]
local epoch, number, begun = version()
local left = {}
for i = 1, #rows, 2 do
    local user, connections = rows[i], tonumber(rows[i + 1])
    local total, since, active, name = row_of(user)
    if total and total > connections then
        total = digits(total - connections)
        redis.call('HSET', KEYS[1], user, total .. ' ' .. since .. ' ' .. active .. ' ' .. name)
    elseif total then
        redis.call('HDEL', KEYS[1], user)
        left[#left + 1] = user
        if not is_room then
            redis.call('ZREM', KEYS[5], user)
        end
    end
    seat(user, 0)
end
if #left > 0 then
    changed(epoch, number + 1, begun, '-' .. table.concat(left, '\n-') .. '\n')
end
if #rows == 0 then
    redis.call('HDEL', KEYS[3], ARGV[1])
end
return redis.call('HLEN', KEYS[2])
