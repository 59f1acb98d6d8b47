-- trim: removes docs from the live window, unless they are pending or have changed since the caller looked at them. If an
-- entity may have been created with an Idempotency-Key, its version and change id stay for 30 days without the state, so
-- that a repeated request does not create it again.
-- KEYS  1 live  2 pending  then docs
-- ARGV  1 whether the entities may have been created with a key (0/1)  2 the text that their states then contain
--       then the change ids that the caller saw
-- Replies the number of removed docs.
local removed = 0
for i = 1, #ARGV - 2 do
  local key = KEYS[2 + i]
  local id = string.match(key, '[^:]+$')
  local change = redis.call('HGET', key, 'c')
  if (not change or change == ARGV[2 + i]) and not redis.call('ZSCORE', KEYS[2], id) then
    local state = redis.call('HGET', key, 'd')
    if ARGV[1] == '1' and state and string.find(state, ARGV[2], 1, true) then
      redis.call('HDEL', key, 'd', 'p')
      redis.call('EXPIRE', key, 2592000)
    else
      redis.call('DEL', key)
    end
    redis.call('ZREM', KEYS[1], id)
    removed = removed + 1
  end
end
return removed
