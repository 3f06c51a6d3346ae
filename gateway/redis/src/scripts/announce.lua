#!lua flags=allow-oom
-- Notes that a process has told all its seats.
--
-- KEYS  1 told (hash)
-- ARGV  1 process  2 the agreements since which it has

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
