#!lua flags=allow-oom
-- Registers an incarnation, under which a process has presence entries.
--
-- KEYS  1 incarnations (hash): "<process> <when it deregistered, ms, or 0>"
-- ARGV  1 incarnation  2 process

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' 0')
return 1
