-- with stock.lua
-- take back: nothing of this change was sent, so its claim may go; unless somebody marked it to finish it.
-- KEYS  1 claim  2 claims  3 doc    ARGV  1 change id  2 claims member
-- Replies 1: it is gone, and nobody will record it; 0: somebody may.
-- On a mirror that came back after a loss nobody can tell: the mark may have been lost with it.
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
