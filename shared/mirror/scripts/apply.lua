-- with identity.lua, stock.lua, position.lua
-- apply: writes states into the mirror, each under the guard (version, change id). The reveal of a commit, the batches of
-- the mirror writer and the rebuild of a mirror all use this script, so that the guard exists only once.
-- KEYS  1 ticketrail:log  2 ticketrail:claims  3 warm stamp  then per state: doc, claim, live, pending, number series
-- ARGV  1 offset ('': any) and 2 CRC of the position that the mirror must have reached
--       3 offset ('': keep it) and 4 CRC of its new position; an earlier one than the present is ignored
--       5 the server that the caller has filled ('': any)  6 write only to a warm mirror (0/1), because the caller
--       sends only the states that this mirror lacked
--       then per state: version, change id, state, index score, accepted at (ms), claims member, how, number,
--       the stock that an order holds or the count of an inventory item (see stock.lua)
--       how: 'reveal'  the state becomes pending
--            'stored'  the state comes from PostgreSQL
--            'late'    an event of the log, perhaps an old one: if the doc is missing, or its state (see trim.lua), the
--                      script reports the state instead of writing it, and the caller compares it with PostgreSQL
-- Replies {'rewind'} if this is not the mirror that the caller filled, otherwise
--         {'applied', positions (from 1) of late states whose doc is missing...}
if ARGV[1] ~= '' then
  local reached, lost = has_reached(KEYS[1], ARGV[1], ARGV[2])
  if lost then
    -- The mirror has lost what the caller applied, for example because somebody restored an old copy. It may have lost
    -- claims and the states of other changes too, so it takes no claims until it has been filled again.
    redis.call('DEL', KEYS[3])
  end
  if not reached then
    return {'rewind'}
  end
end
if ARGV[5] ~= '' and this_server() ~= ARGV[5] or ARGV[6] == '1' and not warm_identity(KEYS[3]) then
  return {'rewind'}
end
local reply = {'applied'}
local count = (#ARGV - 6) / 9
for i = 1, count do
  local k, a = 3 + (i - 1) * 5, 6 + (i - 1) * 9
  local version, change = tonumber(ARGV[a + 1]), ARGV[a + 2]
  local doc = redis.call('HMGET', KEYS[k + 1], 'v', 'c', 'd', 'h')
  local claimed = redis.call('HMGET', KEYS[k + 2], 'v', 'h')
  local head = tonumber(doc[1])
  local how = ARGV[a + 7]
  if how == 'late' and (not head or version == head and change == doc[2] and not doc[3]) then
    reply[#reply + 1] = i
  else
    -- An equal head is also written if the state is missing: the entity had left the live window and returns to it.
    if
      not head
      or version > head
      or (version == head and (change > doc[2] or (change == doc[2] and not doc[3])))
    then
      -- This write must come first: a full server refuses a script only at its first write, and only if that write may
      -- need more memory.
      redis.call('HSET', KEYS[k + 1], 'v', version, 'c', change, 'd', ARGV[a + 3], 'p', ARGV[a + 5])
      redis.call('PERSIST', KEYS[k + 1])
      local id = string.match(KEYS[k + 1], '[^:]+$')
      redis.call('ZADD', KEYS[k + 3], ARGV[a + 4], id)
      -- The stored failure belongs to the previous state.
      if head then
        redis.call('HDEL', (string.gsub(KEYS[k + 4], ':pending:', ':failed:', 1)), id)
      end
      if how == 'stored' then
        redis.call('ZREM', KEYS[k + 4], id)
      else
        redis.call('ZADD', KEYS[k + 4], ARGV[a + 4], id)
      end
      head = version
      doc[2] = change
    elseif how == 'stored' and version == head and change == doc[2] then
      -- A request has revealed the state before, for example to a cold mirror, and PostgreSQL has it meanwhile.
      local id = string.match(KEYS[k + 1], '[^:]+$')
      redis.call('ZREM', KEYS[k + 4], id)
      redis.call('HDEL', (string.gsub(KEYS[k + 4], ':pending:', ':failed:', 1)), id)
    end
    if version == head and change == doc[2] and (ARGV[a + 9] ~= '' or doc[4]) then
      keep(KEYS[k + 1], ARGV[a + 9], doc[4])
      redis.call('HSET', KEYS[k + 1], 'h', ARGV[a + 9])
    end
    -- A claim is finished when any change has taken its version.
    if claimed[1] and tonumber(claimed[1]) <= head then
      give_back(KEYS[k + 1], claimed[2])
      redis.call('DEL', KEYS[k + 2])
      redis.call('ZREM', KEYS[2], ARGV[a + 6])
    end
  end
  -- An order number that a state contains is never given again (see order_number.lua).
  local prefix, digits = string.match(ARGV[a + 8], '^(%u*)(%d+)$')
  if digits and tonumber(digits) > tonumber(redis.call('HGET', KEYS[k + 5], prefix) or 0) then
    redis.call('HSET', KEYS[k + 5], prefix, tonumber(digits))
    redis.call('EXPIRE', KEYS[k + 5], 691200)
  end
end
if ARGV[3] ~= '' then
  local at = redis.call('HMGET', KEYS[1], 'offset', 'broken')
  if tonumber(ARGV[3]) > tonumber(at[1] or -1) then
    redis.call('HSET', KEYS[1], 'offset', ARGV[3], 'crc', ARGV[4])
    if at[2] and tonumber(ARGV[3]) > tonumber(at[2]) then
      redis.call('HDEL', KEYS[1], 'broken')
    end
  end
end
return reply
