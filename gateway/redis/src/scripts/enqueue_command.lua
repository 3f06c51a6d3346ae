-- Gives an order to all nodes.
--
-- KEYS  1 orders (stream)  2 which list of orders this is (text)
-- ARGV  1 order  2 how many orders are kept  3 what tells this list from one that was lost
-- Returns its id.

redis.call('SET', KEYS[2], ARGV[3], 'NX')
local time = redis.call('TIME')
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*',
    'o', ARGV[1], 'at', digits(time[1] * 1000000 + time[2]))
