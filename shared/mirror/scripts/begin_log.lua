-- begin log: starts to fill a mirror that contains nothing of the log. The mirror is cold until warm.lua runs.
-- KEYS  1 ticketrail:log  2 warm stamp    ARGV  1 offset and 2 CRC of the position before the first entry
-- Replies 1, or 0 if the mirror has a position. If another mirror writer has set it, both fill the mirror at the same
-- time.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'offset', ARGV[1], 'crc', ARGV[2])
return 1
