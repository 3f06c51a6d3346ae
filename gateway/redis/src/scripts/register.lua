#!lua flags=allow-oom
-- Makes an incarnation known, under which a process has users at places.
--
-- KEYS  1 incarnations (hash): "<process> <when it said goodbye, ms, or 0>"
-- ARGV  1 incarnation  2 process

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' 0')
return 1
