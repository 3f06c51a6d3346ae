-- Appends a control command to the queue that all nodes poll.
--
-- KEYS  1 queue (stream)  2 id of the queue (text)
-- ARGV  1 command  2 the most commands to keep  3 a random id, which tells a new queue from a lost one
-- Returns the id of the command.

redis.call('SET', KEYS[2], ARGV[3], 'NX')
local time = redis.call('TIME')
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*',
    'o', ARGV[1], 'at', digits(time[1] * 1000000 + time[2]))
