-- trim: documents out of the live window, unless they changed since they were looked at.
-- KEYS  1 live  2 pending  then docs    ARGV  change ids that the docs were seen with
-- Replies how many left.
local left = 0
for i = 1, #ARGV do
  local key = KEYS[2 + i]
  local id = string.match(key, '[^:]+$')
  local change = redis.call('HGET', key, 'c')
  if (not change or change == ARGV[i]) and not redis.call('ZSCORE', KEYS[2], id) then
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[1], id)
    left = left + 1
  end
end
return left
