-- with identity.lua, stock.lua
-- take back: removes the claim of a change that was never sent, unless it is marked and being finished.
-- KEYS  1 claim  2 claims  3 doc  4 warm stamp    ARGV  1 change id  2 claims member
-- Replies 1: the claim is gone, and the change will not be recorded; 0: it may be recorded.
-- For a claim of another mirror it replies 0, because a mark may have been lost with that mirror.
local claim = redis.call('HMGET', KEYS[1], 'c', 'marked', 'mirror')
if claim[1] ~= ARGV[1] or claim[2] or claim[3] ~= warm_identity(KEYS[4]) then
  return 0
end
give_back(KEYS[3], redis.call('HGET', KEYS[1], 'h'))
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
