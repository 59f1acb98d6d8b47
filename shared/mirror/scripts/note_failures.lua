-- note failures: stores why PostgreSQL does not have a state yet, for readers of the entity.
-- KEYS  per state: doc, pending, failed    ARGV  per state: change id, failure as JSON
-- Replies the positions (from 1) of the states that the doc does not have: a later state, or the mirror lacks it until now.
local reply = {}
for i = 1, #ARGV / 2 do
  local k, change = (i - 1) * 3, ARGV[2 * i - 1]
  local id = string.match(KEYS[k + 1], '[^:]+$')
  if redis.call('HGET', KEYS[k + 1], 'c') ~= change then
    reply[#reply + 1] = i
  elseif redis.call('ZSCORE', KEYS[k + 2], id) then
    redis.call('HSET', KEYS[k + 3], id, ARGV[2 * i])
  end
end
return reply
