-- What all scripts share; it stands in front of each.

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

-- Whether the nodes have agreed on this server: nil, or the term of that agreement, and the last term
-- in which not everybody was heard. Terms count agreements, over all servers.
local function opened(barrier, token)
    local agreed = redis.call('HMGET', barrier, 't', 'open', 'n', 'owed')
    if agreed[1] == token and agreed[2] then
        return tonumber(agreed[3] or '0'), tonumber(agreed[4] or '0')
    end
end

-- Whether this is the server that the token names: a run of it, and what it replicates.
local function is_here(token)
    local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    local history = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
    return token == string.sub(run, 1, 8) .. string.sub(history, 1, 8)
end

local function ordinal(epoch)
    return tonumber(string.match(epoch, '^(%d+)-')) or 0
end

local function epoch_above(number, random)
    return digits(number + 1) .. '-' .. random
end

-- The room's epoch and top, and the fields of its meta as they were read; nothing where the nodes have not agreed on this server. The first touch
-- after that declares the room whole under the token and in its term. Where somebody was not heard
-- since it was so declared last, who may have had more of it, the room goes on in a new epoch, which
-- remembers the former one: also where that was on a server that is gone, and nobody touched the room
-- there.
local function whole(meta_key, log_key, barrier, token, random, meta_ttl)
    local meta = redis.call('HMGET', meta_key, 'e', 's', 'r', 'n', 'at', 'from', 'prev')
    local epoch, top = meta[1], tonumber(meta[2])
    if epoch and meta[3] == token then
        return epoch, top, meta
    end
    local term, owed = opened(barrier, token)
    if not term then
        return nil
    end
    if not epoch then
        -- The numbers are lost, and a log that may be left cannot be continued.
        redis.call('DEL', log_key)
        epoch, top = epoch_above(0, random), 0
        redis.call('HSET', meta_key, 'e', epoch, 's', '0', 'r', token, 'n', digits(term))
    elseif tonumber(meta[4] or '0') >= owed then
        redis.call('HSET', meta_key, 'r', token, 'n', digits(term))
    else
        local former = epoch
        epoch = epoch_above(ordinal(former), random)
        redis.call('HSET', meta_key, 'e', epoch, 'r', token, 'n', digits(term),
            'pe', former, 'ps', digits(top))
    end
    redis.call('PEXPIRE', meta_key, meta_ttl)
    return epoch, top, meta
end
