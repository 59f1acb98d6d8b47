-- bucket: takes tokens out of a bucket that fills steadily; atomic for all instances of all services.
-- KEYS  1 bucket: hash t tokens, at (ms)
-- ARGV  1 capacity  2 tokens per second  3 maximum number of tokens to take  4 minimum number of tokens to take
-- If both are -1, it puts one token back.
-- Replies {taken, left (whole tokens), ms until the bucket has the minimum}. If the bucket has less than the minimum, it
-- takes none.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local capacity, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = redis.call('HMGET', KEYS[1], 't', 'at')
local tokens = capacity
if found[1] then
  tokens = math.min(capacity, tonumber(found[1]) + math.max(0, now - tonumber(found[2])) * rate / 1000)
end
local taken, wait = 0, 0
if tokens >= tonumber(ARGV[4]) then
  taken = math.max(tonumber(ARGV[4]), math.min(tonumber(ARGV[3]), math.floor(tokens)))
  tokens = tokens - taken
else
  wait = math.ceil((tonumber(ARGV[4]) - tokens) * 1000 / rate)
end
redis.call('HSET', KEYS[1], 't', string.format('%.3f', tokens), 'at', now)
redis.call('PEXPIRE', KEYS[1], math.ceil(capacity * 1000 / rate) + 1000)
return {taken, math.floor(tokens), wait}
