-- settle: tells the mirror which states PostgreSQL has, and how far the feed loop has read.
-- KEYS  1 ticketrail:feed  then per entity: doc, pending, failed, live
-- ARGV  1 xid that the feed position of this mirror must have reached ('': any)
--       2 feed position to note ('': none)  3 its xid  4 note it even if the mirror is ahead, because the feed begins again (0/1)
--       5 mark docs as pending that are above the state in PostgreSQL (0/1)
--       then per entity: version in PostgreSQL (0: PostgreSQL lacks the entity), change id
-- Replies {'rewind'} if this mirror has not read the feed that far, because another mirror has replaced it; otherwise
--         {'settled', positions (from 1) of entities that the mirror lacks or has in an older state...}
-- The position is noted only if no entity is reported: the caller loads those first.
local at = redis.call('HGET', KEYS[1], 'xid')
if ARGV[1] ~= '' and (not at or tonumber(at) < tonumber(ARGV[1])) then
  return {'rewind'}
end
local reply = {'settled'}
for i = 1, (#ARGV - 5) / 2 do
  local k, version, change = 1 + (i - 1) * 4, tonumber(ARGV[4 + 2 * i]), ARGV[5 + 2 * i]
  local doc = redis.call('HMGET', KEYS[k + 1], 'v', 'c')
  local head = tonumber(doc[1])
  if version > 0 and (not head or head < version or (head == version and doc[2] < change)) then
    reply[#reply + 1] = i
  else
    local id = string.match(KEYS[k + 1], '[^:]+$')
    if head == version and doc[2] == change then
      redis.call('ZREM', KEYS[k + 2], id)
      redis.call('HDEL', KEYS[k + 3], id)
    elseif head and ARGV[5] == '1' then
      local score = redis.call('ZSCORE', KEYS[k + 4], id)
      if score then
        redis.call('ZADD', KEYS[k + 2], score, id)
      end
    end
  end
end
if #reply == 1 and ARGV[2] ~= '' and (ARGV[4] == '1' or not at or tonumber(at) <= tonumber(ARGV[3])) then
  redis.call('HSET', KEYS[1], 'position', ARGV[2], 'xid', ARGV[3])
end
return reply
