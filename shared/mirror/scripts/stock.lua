-- stock: what orders hold of it. Stands before the scripts that begin with "with stock.lua".
-- {restaurant}:stock:<item>  hash  count, since (ms): as counted;  sum of what is held;  <order id> -> "<quantity>@<ms>"
--                                  for every order that holds some, with the moment that it was placed
-- Left is count - sum, and sum is always that of the entries: each of them belongs to an order id, so that whatever
-- comes twice changes nothing. Orders that were placed before the count hold nothing: they were counted as gone.
--
-- Texts:  h<ms>|<item>=<quantity>,...  what an order placed at <ms> holds
--         s<count>|<ms>                the count of an inventory item; s alone: it is not counted any more
local function stock_key(doc, item)
  return string.match(doc, '^{[^}]*}') .. ':stock:' .. item
end

local function set_hold(doc, item, quantity, placed)
  local key, id = stock_key(doc, item), string.match(doc, '[^:]+$')
  local found = redis.call('HMGET', key, id, 'since')
  local held = found[1] and tonumber(string.match(found[1], '^%d+')) or 0
  if found[2] and placed < tonumber(found[2]) then
    quantity = 0
  end
  if quantity == held then
    return held
  end
  if quantity == 0 then
    redis.call('HDEL', key, id)
  else
    redis.call('HSET', key, id, string.format('%.0f@%.0f', quantity, placed))
  end
  redis.call('HINCRBY', key, 'sum', string.format('%.0f', quantity - held))
  return held
end

-- {'short', item, left, ...}
local function shortage(doc, wanted)
  local reply = {'short'}
  local placed = tonumber(string.match(wanted, '^h(%d+)'))
  for item, text in string.gmatch(wanted, '([%x-]+)=(%d+)') do
    local found = redis.call('HMGET', stock_key(doc, item), 'count', 'since', 'sum', string.match(doc, '[^:]+$'))
    if found[1] and placed >= tonumber(found[2]) then
      local held = found[4] and tonumber(string.match(found[4], '^%d+')) or 0
      local left = tonumber(found[1]) - (tonumber(found[3]) or 0) + held
      if tonumber(text) > held and tonumber(text) > left then
        reply[#reply + 1] = item
        reply[#reply + 1] = string.format('%.0f', math.max(0, left))
      end
    end
  end
  return reply
end

-- Only what grows: what a change gives back is free when it is revealed. Returns what was held before, for give_back.
local function reserve(doc, wanted)
  local before = {}
  local placed = tonumber(string.match(wanted, '^h(%d+)'))
  for item, text in string.gmatch(wanted, '([%x-]+)=(%d+)') do
    local found = redis.call('HGET', stock_key(doc, item), string.match(doc, '[^:]+$'))
    local held = found and tonumber(string.match(found, '^%d+')) or 0
    if tonumber(text) > held then
      set_hold(doc, item, tonumber(text), placed)
      before[#before + 1] = string.format('%s=%.0f', item, held)
    end
  end
  if #before == 0 then
    return ''
  end
  return string.format('h%.0f|', placed) .. table.concat(before, ',')
end

local function give_back(doc, before)
  if before and before ~= '' then
    local placed = tonumber(string.match(before, '^h(%d+)'))
    for item, text in string.gmatch(before, '([%x-]+)=(%d+)') do
      set_hold(doc, item, tonumber(text), placed)
    end
  end
end

local function keep(doc, text)
  if string.sub(text, 1, 1) == 'h' then
    give_back(doc, text)
    return
  end
  local key = stock_key(doc, string.match(doc, '[^:]+$'))
  local count, since = string.match(text, '^s(-?%d+)|(%d+)')
  if not count then
    redis.call('HDEL', key, 'count', 'since')
    return
  end
  local before = redis.call('HGET', key, 'since')
  redis.call('HSET', key, 'count', count, 'since', since)
  if before == since then
    return
  end
  local sum, found = 0, redis.call('HGETALL', key)
  for i = 1, #found, 2 do
    local quantity, placed = string.match(found[i + 1], '^(%d+)@(%d+)$')
    if quantity then
      if tonumber(placed) < tonumber(since) then
        redis.call('HDEL', key, found[i])
      else
        sum = sum + tonumber(quantity)
      end
    end
  end
  redis.call('HSET', key, 'sum', string.format('%.0f', sum))
end
