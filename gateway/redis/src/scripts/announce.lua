#!lua flags=allow-oom
-- Announces that all presence entries of a process are written.
--
-- KEYS  1 announcements (hash)
-- ARGV  1 process  2 digest of the agreed servers

redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
