-- stale claims: lists claims that are old, and claims from the future: this server's clock has jumped back since.
-- KEYS  1 claims    ARGV  1 age at which a claim is stale (ms)  2 maximum number of members
-- Replies members of the claims index, oldest first.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]), 'LIMIT', 0, ARGV[2])
local future = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', now), '+inf', 'LIMIT', 0, ARGV[2] - #found)
for i = 1, #future do
  found[#found + 1] = future[i]
end
return found
