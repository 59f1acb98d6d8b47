-- with stock.lua
-- mark: marks a stale claim, so that the caller can finish its change.
-- KEYS  1 doc  2 claim  3 claims    ARGV  1 claims member  2 age at which a claim is stale (ms)
-- Replies {} when there is nothing to finish, otherwise {change id, event, number}.
-- A claim of a lost mirror is removed, not finished: it may have been taken back after this copy was made.
local claim = redis.call('HMGET', KEYS[2], 'c', 'v', 'e', 'n', 'at', 'server')
if
  not claim[1]
  or claim[6] ~= string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  or tonumber(claim[2]) <= (tonumber(redis.call('HGET', KEYS[1], 'v')) or 0)
then
  give_back(KEYS[1], redis.call('HGET', KEYS[2], 'h'))
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[1])
  return {}
end
local time = redis.call('TIME')
if time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(claim[5]) < tonumber(ARGV[2]) then
  return {}
end
redis.call('HSET', KEYS[2], 'marked', 1)
return {claim[1], claim[3], claim[4]}
