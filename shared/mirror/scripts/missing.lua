-- missing: finds the changes for which apply.lua would write something. The mirror writer calls it before it decodes and
-- sends states, because most changes were already revealed by their requests.
-- KEYS  per change: doc, claim    ARGV  per change: version, change id
-- Replies the positions (from 1) of the changes whose state is missing here or whose claim still exists.
local reply = {}
for i = 1, #KEYS / 2 do
  local doc, version, change = KEYS[2 * i - 1], tonumber(ARGV[2 * i - 1]), ARGV[2 * i]
  local found = redis.call('HMGET', doc, 'v', 'c')
  local head = tonumber(found[1])
  if
    not head
    or version > head
    or (version == head and (change > found[2] or (change == found[2] and redis.call('HEXISTS', doc, 'd') == 0)))
  then
    reply[#reply + 1] = i
  else
    local claimed = tonumber(redis.call('HGET', KEYS[2 * i], 'v'))
    if claimed and claimed <= head then
      reply[#reply + 1] = i
    end
  end
end
return reply
