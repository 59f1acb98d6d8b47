-- begin log: starts to fill a mirror that contains nothing of this log. The mirror is cold until warm.lua runs.
-- KEYS  1 ticketrail:log  2 warm stamp    ARGV  1 epoch  2 offset
-- Replies 1, or 0 if another mirror writer has already started. Both then fill the mirror at the same time.
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'offset', ARGV[2])
return 1
