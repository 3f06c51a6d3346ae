#!lua flags=allow-oom
-- Finds the commands that gateways use and that Redis denies the user of this connection.
--
-- KEYS  1 a key that nothing else uses
-- ARGV  1 a channel below `gw:`
-- Returns the names of the commands.
--
-- Redis checks permissions before anything else: a call that fails with another error is permitted.

local calls = {
    { 'HSET', KEYS[1], 'f', '1' }, { 'HGET', KEYS[1], 'f' }, { 'HMGET', KEYS[1], 'f' },
    { 'HGETALL', KEYS[1] }, { 'HKEYS', KEYS[1] }, { 'HVALS', KEYS[1] }, { 'HLEN', KEYS[1] },
    { 'HEXISTS', KEYS[1], 'f' }, { 'HSETNX', KEYS[1], 'f', '1' }, { 'HSCAN', KEYS[1], '0' },
    { 'HDEL', KEYS[1], 'g' }, { 'EXISTS', KEYS[1] }, { 'TYPE', KEYS[1] },
    { 'PEXPIRE', KEYS[1], '60000' }, { 'PTTL', KEYS[1] },
    { 'PEXPIREAT', KEYS[1], '4102444800000' }, { 'PERSIST', KEYS[1] },
    { 'XADD', KEYS[1], '1-0', 'f', '1' }, { 'XRANGE', KEYS[1], '-', '+' },
    { 'XREVRANGE', KEYS[1], '+', '-' }, { 'XLEN', KEYS[1] }, { 'XTRIM', KEYS[1], 'MAXLEN', '1' },
    { 'ZADD', KEYS[1], '0', 'm' }, { 'ZREM', KEYS[1], 'm' }, { 'ZCARD', KEYS[1] },
    { 'ZREMRANGEBYSCORE', KEYS[1], '0', '0' }, { 'ZREMRANGEBYRANK', KEYS[1], '0', '0' },
    { 'ZRANGEBYLEX', KEYS[1], '-', '+' }, { 'ZMSCORE', KEYS[1], 'm' },
    { 'ZSCORE', KEYS[1], 'm' }, { 'ZRANGE', KEYS[1], '0', '0' }, { 'GET', KEYS[1] },
    { 'SET', KEYS[1], '1', 'NX' }, { 'RPUSH', KEYS[1], '1' }, { 'LRANGE', KEYS[1], '0', '0' },
    { 'MEMORY', 'USAGE', KEYS[1] }, { 'TIME' }, { 'INFO', 'server' }, { 'PUBLISH', ARGV[1], '' },
    { 'DEL', KEYS[1] },
}
if archive_backlog_max > 0 then
    for _, call in ipairs({
        { 'XREADGROUP', 'GROUP', 'g', 'c', 'STREAMS', KEYS[1], '>' }, { 'XACK', KEYS[1], 'g', '1-0' },
        { 'XDEL', KEYS[1], '1-0' }, { 'XAUTOCLAIM', KEYS[1], 'g', 'c', '1', '0-0' },
        { 'XGROUP', 'CREATE', KEYS[1], 'g', '0' }, { 'SADD', KEYS[1], 'm' }, { 'SCARD', KEYS[1] },
        { 'SRANDMEMBER', KEYS[1] }, { 'SREM', KEYS[1], 'm' }, { 'DEL', KEYS[1] },
    }) do
        calls[#calls + 1] = call
    end
end
local denied = {}
for _, call in ipairs(calls) do
    local reply = redis.pcall(unpack(call))
    -- The error texts of Redis 7.0 and 7.2 for a command in a script.
    local text = type(reply) == 'table' and reply.err or ''
    if string.find(text, 'The user executing the script', 1, true)
        or string.find(text, 'ACL failure', 1, true) or string.find(text, 'NOPERM', 1, true) then
        denied[#denied + 1] = string.lower(call[1])
    end
end
return denied
