-- take back: nothing of this change was sent, so its claim may go; unless somebody marked it to finish it.
-- KEYS  1 claim  2 claims    ARGV  1 change id  2 claims member
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
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
