-- with identity.lua, stock.lua, order_number.lua
-- claim: reserves the next version of an entity for one change, or says why it cannot.
-- KEYS  1 doc  2 claim  3 claims  4 warm stamp  5 number counter  6 ticketrail:keys
-- ARGV  1 change id  2 version  3 base version (0: creation)  4 base change id  5 event
--       6 whether the change needs an order number (0/1)  7 claims member  8 age at which a claim is stale (ms)
--       9 the stock that the change holds (see stock.lua)
--       10 deadline (ms, on this server's clock; '': none). Without it, a server that was frozen would execute the claim
--          long after the caller has given up, and a creation would exist twice.
--       11 the lane in which the change will be recorded, also by another process that finishes the claim
--       12 whether a creation may be the repeat of one that only PostgreSQL has (0/1)
-- Replies
--   {"claimed", number}                     the change holds the claim (also if this call was executed before)
--   {"cold"}                                the mirror writer has not filled this mirror
--   {"late"}                                the deadline has passed; nothing was claimed
--   {"ask"}                                 the mirror does not know all keys yet: look in PostgreSQL first
--   {"busy"}                                another change holds a fresh claim
--   {"stale", change id, event, number, lane}  another change holds a stale claim, which is now marked: finish it first
--   {"head_moved", version, change id, state}  the base is not the head (for a creation: the entity exists)
--   {"short", item, left, item, left...}    the stock has less than the change wants
--   {"restamp", item, µs, item, µs...}      a hold is below the count, or a count not above the holds: take these times
local mirror, prefix, prefix_until = warm_identity(KEYS[4])
if not mirror then
  return {'cold'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local doc = redis.call('HMGET', KEYS[1], 'v', 'c', 'd')
local version = tonumber(doc[1]) or 0
local claim = redis.call('HMGET', KEYS[2], 'c', 'v', 'e', 'n', 'at', 'mirror', 'l')
if claim[1] and claim[6] ~= mirror then
  -- The claim was made in another mirror and came here with an older copy of its data. The owner may have taken the claim
  -- back after that copy was made, so its change must not be finished.
  give_back(KEYS[1], redis.call('HGET', KEYS[2], 'h'))
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[7])
  claim = {}
end
if claim[1] == ARGV[1] then
  return {'claimed', claim[4]}
end
if claim[1] then
  if tonumber(claim[2]) <= version then
    -- The head has reached the version of the claim, so there is nothing to finish.
    give_back(KEYS[1], redis.call('HGET', KEYS[2], 'h'))
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[3], ARGV[7])
  else
    local age = now - tonumber(claim[5])
    -- The age is negative if this server's clock has jumped back. Nobody knows how old the claim is, so it counts as stale.
    if age >= 0 and age < tonumber(ARGV[8]) then
      return {'busy'}
    end
    redis.call('HSET', KEYS[2], 'marked', 1)
    return {'stale', claim[1], claim[3], claim[4], claim[7]}
  end
end
-- If there is no doc, the entity has left the live window. The caller has then read the base from PostgreSQL, and the
-- script trusts it.
if doc[1] and (version ~= tonumber(ARGV[3]) or doc[2] ~= ARGV[4]) then
  return {'head_moved', doc[1], doc[2], doc[3]}
end

if ARGV[10] ~= '' and now > tonumber(ARGV[10]) then
  return {'late'}
end
if ARGV[12] == '1' and not doc[1] and redis.call('EXISTS', KEYS[6]) == 0 then
  return {'ask'}
end
local refused, reserved = nil, ''
if ARGV[9] ~= '' then
  refused, reserved = reserve(KEYS[1], ARGV[9])
  if refused then
    return refused
  end
end
local number = ''
if ARGV[6] == '1' then
  local day = string.match(KEYS[5], '[^:]+$')
  number = next_order_number(KEYS[5], day <= prefix_until and prefix or '')
end
redis.call('HSET', KEYS[2], 'c', ARGV[1], 'v', ARGV[2], 'e', ARGV[5], 'n', number, 'at', now,
  'mirror', mirror, 'h', reserved, 'l', ARGV[11])
redis.call('ZADD', KEYS[3], now, ARGV[7])
return {'claimed', number}
