-- with identity.lua, stock.lua
-- mark: marks a stale claim, so that the caller can finish its change.
-- KEYS  1 doc  2 claim  3 claims  4 warm stamp    ARGV  1 claims member  2 age at which a claim is stale (ms)
-- Replies {} when there is nothing to finish, otherwise {change id, event, number, lane}.
-- A claim of another mirror is removed, not finished: it may have been taken back after this copy was made.
local claim = redis.call('HMGET', KEYS[2], 'c', 'v', 'e', 'n', 'at', 'mirror', 'l')
if
  not claim[1]
  or claim[6] ~= warm_identity(KEYS[4])
  or tonumber(claim[2]) <= (tonumber(redis.call('HGET', KEYS[1], 'v')) or 0)
then
  give_back(KEYS[1], redis.call('HGET', KEYS[2], 'h'))
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
  return {}
end
local time = redis.call('TIME')
local age = time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(claim[5])
-- The age is negative if this server's clock has jumped back. Nobody knows how old the claim is, so it counts as stale.
if age >= 0 and age < tonumber(ARGV[2]) then
  return {}
end
redis.call('HSET', KEYS[2], 'marked', 1)
return {claim[1], claim[3], claim[4], claim[7]}
