-- warm: makes the mirror warm, after the mirror writer has read the log to its end. From now on the mirror takes claims.
-- KEYS  1 ticketrail:log  2 warm stamp  then number counters of the present business day of each restaurant
-- ARGV  1 epoch  2 offset that the log state must have reached
--       3 gap: how many numbers to skip, because the last mirror may have given them before it was lost (0: none was lost)
-- Replies 1, or 0 if this is not the mirror that the caller filled.
local at = redis.call('HMGET', KEYS[1], 'epoch', 'offset')
if at[1] ~= ARGV[1] or tonumber(at[2]) < tonumber(ARGV[2]) then
  return 0
end
redis.call('HDEL', KEYS[1], 'lost')
if tonumber(ARGV[3]) > 0 then
  for i = 3, #KEYS do
    redis.call('INCRBY', KEYS[i], ARGV[3])
    redis.call('EXPIRE', KEYS[i], 691200)
  end
end
redis.call('SET', KEYS[2], string.match(redis.call('INFO', 'server'), 'run_id:(%w+)'))
return 1
