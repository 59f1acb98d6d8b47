-- with stock.lua, order_number.lua
-- claim: reserves the next version of an entity for one change, or says why it cannot.
-- KEYS  1 doc  2 claim  3 claims  4 warm stamp  5 number counter
-- ARGV  1 change id  2 version  3 base version (0: creation)  4 base change id  5 event
--       6 whether the change needs an order number (0/1)  7 the order number must be higher than this
--       8 claims member  9 age at which a claim is stale (ms)  10 the stock that the change holds (see stock.lua)
--       11 deadline (ms, on this server's clock; '': none). Without it, a server that was frozen would execute the claim
--          long after the caller has given up, and a creation would exist twice.
-- Replies
--   {"claimed", number}                     the change holds the claim (also if this call was executed before)
--   {"cold"}                                the mirror was not filled since it started
--   {"late"}                                the deadline has passed; nothing was claimed
--   {"busy"}                                another change holds a fresh claim
--   {"stale", change id, event, number}     another change holds a stale claim, which is now marked: finish it first
--   {"head_moved", version, change id, state}  the base is not the head (for a creation: the entity exists)
--   {"short", item, left, item, left...}    the stock has less than the change wants
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
if redis.call('GET', KEYS[4]) ~= server then
  return {'cold'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local doc = redis.call('HMGET', KEYS[1], 'v', 'c', 'd')
local version = tonumber(doc[1]) or 0
local claim = redis.call('HMGET', KEYS[2], 'c', 'v', 'e', 'n', 'at', 'server')
if claim[1] and claim[6] ~= server then
  -- Another Redis process stored this claim, and this process may have loaded it from an old copy on disk. The owner may
  -- have taken the claim back after that copy was made, so its change must not be finished.
  give_back(KEYS[1], redis.call('HGET', KEYS[2], 'h'))
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[8])
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
    redis.call('ZREM', KEYS[3], ARGV[8])
  elseif now - tonumber(claim[5]) < tonumber(ARGV[9]) then
    return {'busy'}
  else
    redis.call('HSET', KEYS[2], 'marked', 1)
    return {'stale', claim[1], claim[3], claim[4]}
  end
end
-- If there is no doc, the entity has left the live window. The caller has then read the base from PostgreSQL, and the
-- script trusts it.
if doc[1] and (version ~= tonumber(ARGV[3]) or doc[2] ~= ARGV[4]) then
  return {'head_moved', doc[1], doc[2], doc[3]}
end

if ARGV[11] ~= '' and now > tonumber(ARGV[11]) then
  return {'late'}
end
local short, reserved = nil, ''
if ARGV[10] ~= '' then
  short, reserved = reserve(KEYS[1], ARGV[10])
  if short then
    return short
  end
end
local number = ''
if ARGV[6] == '1' then
  number = next_order_number(KEYS[5], tonumber(ARGV[7]))
end
redis.call('HSET', KEYS[2], 'c', ARGV[1], 'v', ARGV[2], 'e', ARGV[5], 'n', number, 'at', now,
  'server', server, 'h', reserved)
redis.call('ZADD', KEYS[3], now, ARGV[8])
return {'claimed', number}
