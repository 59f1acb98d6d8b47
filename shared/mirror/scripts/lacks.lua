-- lacks: which changes would `apply` do anything for? The mirror writer asks before it reads states and sends them: most
-- were revealed by the request that made them.
-- KEYS  per change: doc, claim    ARGV  per change: version, change id
-- Replies positions (from 1) of those whose state is missing here, or whose claim still stands.
local reply = {}
for i = 1, #KEYS / 2 do
  local doc, version, change = KEYS[2 * i - 1], tonumber(ARGV[2 * i - 1]), ARGV[2 * i]
  local found = redis.call('HMGET', doc, 'v', 'c')
  local standing = tonumber(found[1])
  if
    not standing
    or version > standing
    or (version == standing and (change > found[2] or (change == found[2] and redis.call('HEXISTS', doc, 'd') == 0)))
  then
    reply[#reply + 1] = i
  else
    local claimed = tonumber(redis.call('HGET', KEYS[2 * i], 'v'))
    if claimed and claimed <= standing then
      reply[#reply + 1] = i
    end
  end
end
return reply
