-- stock: what orders hold of it. Stands before the scripts that begin with "with stock.lua".
-- {restaurant}:stock:<item>  hash  count, since (µs): as counted;  sum of what is held;
--                                  <order id>  -> "<quantity>@<µs>,..."  what its state takes, and since when
--                                  <order id>+ -> the same, of what its claim wants beyond that
-- An order holds the larger of the two. Left is count - sum, and sum is always that over all orders: an entry is set and
-- never added to, so that whatever comes twice, or late, changes nothing. What was taken before the count holds nothing:
-- it was counted as gone.
--
-- Texts:  h<item>=<quantity>@<µs>,...  what an order takes; an item may stand there several times
--         s<count>|<µs>                the count of an inventory item; s alone: it is not counted any more
local function stock_key(doc, item)
  return string.match(doc, '^{[^}]*}') .. ':stock:' .. item
end

-- The items of a text in its order, and item -> "<quantity>@<µs>,...".
local function parts(text)
  local items, pieces = {}, {}
  for item, piece in string.gmatch(text, '([%x-]+)=(%d+@%d+)') do
    if pieces[item] then
      pieces[item] = pieces[item] .. ',' .. piece
    else
      items[#items + 1] = item
      pieces[item] = piece
    end
  end
  return items, pieces
end

local function taken(pieces, since)
  local sum = 0
  for quantity, at in string.gmatch(pieces or '', '(%d+)@(%d+)') do
    if not since or tonumber(at) >= tonumber(since) then
      sum = sum + tonumber(quantity)
    end
  end
  return sum
end

-- whose: '' the state's, '+' the claim's.
local function put(doc, item, whose, pieces)
  local key, id = stock_key(doc, item), string.match(doc, '[^:]+$')
  local found = redis.call('HMGET', key, 'since', id, id .. '+')
  local since, place = found[1], whose == '+' and 3 or 2
  local before = math.max(taken(found[2], since), taken(found[3], since))
  if taken(pieces, since) > 0 then
    redis.call('HSET', key, id .. whose, pieces)
  elseif found[place] then
    redis.call('HDEL', key, id .. whose)
  end
  found[place] = pieces
  local after = math.max(taken(found[2], since), taken(found[3], since))
  if after ~= before then
    redis.call('HINCRBY', key, 'sum', string.format('%.0f', after - before))
  end
end

-- Only what grows: what a change gives back is free when it is revealed.
-- Returns {'short', item, left, ...} or nil, and the items that it reserved of, for give_back.
local function reserve(doc, wanted)
  local short, grown = {'short'}, {}
  local items, pieces = parts(wanted)
  for _, item in ipairs(items) do
    local found = redis.call('HMGET', stock_key(doc, item), 'count', 'since', 'sum', string.match(doc, '[^:]+$'))
    local held, more = taken(found[4], found[2]), taken(pieces[item], found[2])
    if more > held then
      grown[#grown + 1] = item
      local left = found[1] and tonumber(found[1]) - (tonumber(found[3]) or 0) + held
      if left and more > left then
        short[#short + 1] = item
        short[#short + 1] = string.format('%.0f', math.max(0, left))
      end
    end
  end
  if #short > 1 then
    return short
  end
  for _, item in ipairs(grown) do
    put(doc, item, '+', pieces[item])
  end
  return nil, table.concat(grown, ',')
end

local function give_back(doc, reserved)
  for item in string.gmatch(reserved or '', '[%x-]+') do
    put(doc, item, '+', '')
  end
end

local function count(doc, text)
  local key = stock_key(doc, string.match(doc, '[^:]+$'))
  local counted, since = string.match(text, '^s(-?%d+)|(%d+)')
  if not counted then
    redis.call('HDEL', key, 'count', 'since')
    return
  end
  local before = redis.call('HGET', key, 'since')
  redis.call('HSET', key, 'count', counted, 'since', since)
  if before == since then
    return
  end
  local sum, held = 0, {}
  local found = redis.call('HGETALL', key)
  for i = 1, #found, 2 do
    if string.find(found[i + 1], '@', 1, true) then
      local id, quantity = string.gsub(found[i], '%+$', ''), taken(found[i + 1], since)
      if quantity == 0 then
        redis.call('HDEL', key, found[i])
      elseif quantity > (held[id] or 0) then
        sum = sum + quantity - (held[id] or 0)
        held[id] = quantity
      end
    end
  end
  redis.call('HSET', key, 'sum', string.format('%.0f', sum))
end

-- What a state says that stands now; before: what the one said that stood here until now.
local function keep(doc, text, before)
  if string.sub(text, 1, 1) == 's' then
    count(doc, text)
    return
  end
  local items, pieces = parts(text)
  for _, item in ipairs(parts(before or '')) do
    if not pieces[item] then
      put(doc, item, '', '')
    end
  end
  for _, item in ipairs(items) do
    put(doc, item, '', pieces[item])
  end
end
