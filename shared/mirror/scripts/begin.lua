-- begin: a mirror that holds nothing of this log is to be filled. Cold from here on, until `warm`.
-- KEYS  1 ticketrail:log  2 warm stamp    ARGV  1 epoch  2 offset
-- Replies 1, or 0 when somebody has begun it already: two writers fill it side by side.
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'offset', ARGV[2])
return 1
