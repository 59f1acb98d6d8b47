-- with stock.lua
-- take back: removes the claim of a change that was never sent, unless it is marked and being finished.
-- KEYS  1 claim  2 claims  3 doc    ARGV  1 change id  2 claims member
-- Replies 1: the claim is gone, and the change will not be recorded; 0: it may be recorded.
-- On a mirror that came back after a loss it replies 0, because a mark may have been lost too.
local claim = redis.call('HMGET', KEYS[1], 'c', 'marked', 'server')
if
  claim[1] ~= ARGV[1]
  or claim[2]
  or claim[3] ~= string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
then
  return 0
end
give_back(KEYS[3], redis.call('HGET', KEYS[1], 'h'))
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
