-- with identity.lua
-- read: returns docs of one kind of entity with their sync states.
-- KEYS  1 warm stamp  2 pending  3 failed  4 conflicts  then docs
-- ARGV  1 prefix of the members of the conflicts  then ids, in the order of the docs
-- Replies {warm (0/1), then per doc: version, change id, state, pending (0/1), failure or '', conflict (0/1)};
--         The version is false if the doc is missing.
local reply = {warm_identity(KEYS[1]) and 1 or 0}
for i = 2, #ARGV do
  local id = ARGV[i]
  local doc = redis.call('HMGET', KEYS[3 + i], 'v', 'c', 'd')
  reply[#reply + 1] = doc[1]
  reply[#reply + 1] = doc[2]
  reply[#reply + 1] = doc[3]
  reply[#reply + 1] = redis.call('ZSCORE', KEYS[2], id) and 1 or 0
  reply[#reply + 1] = redis.call('HGET', KEYS[3], id) or ''
  reply[#reply + 1] = redis.call('SISMEMBER', KEYS[4], ARGV[1] .. id)
end
return reply
