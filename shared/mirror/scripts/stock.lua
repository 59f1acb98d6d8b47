-- stock: the stock that orders hold. It is a part of the scripts whose first line names it.
-- {restaurant}:stock:<item>  hash  count     the counted amount
--                                  since     the time of the count (µs)
--                                  next      the time of a count that is claimed and not revealed yet (µs)
--                                  sum       the sum of the holds of all orders
--                                  <order>   "<quantity>@<µs>,...": what the state of the order holds, and since when
--                                  <order>+  the same for the claim of the order
-- The hold of an order is the larger one of the two. The amount left is count - sum. Entries are set and never added
-- to, so that a repeated or late call changes nothing. A quantity from before the count does not count as a hold,
-- because the count already lacks it.
--
-- The times are stamps. A claim proposes its own clock, and this server decides: a new hold may not be below the count,
-- and a new count must be above every hold. So a wrong clock of any machine costs a round trip and never a piece.
--
-- Texts:  h<item>=<quantity>@<µs>,...  what an order holds; an item may occur several times
--         s<count>|<µs>                the count of an inventory item; a single s means that it is no longer counted
--         In a claim, ! follows the time of a new hold or count, and H instead of h skips the check.
local function stock_key(doc, item)
  return string.match(doc, '^{[^}]*}') .. ':stock:' .. item
end

-- Returns the items of a text in its order, and two tables: item -> "<quantity>@<µs>,...", item -> the earliest new time.
local function parts(text)
  local items, pieces, new = {}, {}, {}
  for item, piece, at, mark in string.gmatch(text, '([%x-]+)=(%d+@(%d+))(!?)') do
    if pieces[item] then
      pieces[item] = pieces[item] .. ',' .. piece
    else
      items[#items + 1] = item
      pieces[item] = piece
    end
    if mark == '!' then
      new[item] = math.min(new[item] or tonumber(at), tonumber(at))
    end
  end
  return items, pieces, new
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

-- Sets one hold and updates the sum. suffix: '' for the hold of the state, '+' for the hold of the claim.
local function put(doc, item, suffix, pieces)
  local key, id = stock_key(doc, item), string.match(doc, '[^:]+$')
  local found = redis.call('HMGET', key, 'since', id, id .. '+')
  local since, place = found[1], suffix == '+' and 3 or 2
  local before = math.max(taken(found[2], since), taken(found[3], since))
  if taken(pieces, since) > 0 then
    redis.call('HSET', key, id .. suffix, pieces)
  elseif found[place] then
    redis.call('HDEL', key, id .. suffix)
  end
  found[place] = pieces
  local after = math.max(taken(found[2], since), taken(found[3], since))
  if after ~= before then
    redis.call('HINCRBY', key, 'sum', string.format('%.0f', after - before))
  end
end

-- Notes the time of a new count, which later holds must reach even before the count is revealed.
local function reserve_count(doc, requested)
  local at = string.match(requested, '|(%d+)!')
  if not at then
    return nil, ''
  end
  local key, least = stock_key(doc, string.match(doc, '[^:]+$')), 0
  local found = redis.call('HGETALL', key)
  for i = 1, #found, 2 do
    if found[i] == 'since' then
      least = math.max(least, tonumber(found[i + 1]))
    end
    for held_at in string.gmatch(found[i + 1], '@(%d+)') do
      least = math.max(least, tonumber(held_at) + 1)
    end
  end
  if tonumber(at) < least then
    return {'restamp', string.match(doc, '[^:]+$'), string.format('%.0f', least)}
  end
  redis.call('HSET', key, 'next', at)
  return nil, 's'
end

-- Reserves only the additional amounts of a change. Amounts that the change gives back become free when it is revealed.
-- Returns {'restamp', item, µs, ...} or {'short', item, left, ...} or nil, and what was reserved, for give_back.
local function reserve(doc, requested)
  if string.sub(requested, 1, 1) == 's' then
    return reserve_count(doc, requested)
  end
  local restamp, short, grown = {'restamp'}, {'short'}, {}
  local checked = string.sub(requested, 1, 1) == 'h'
  local items, pieces, new = parts(requested)
  for _, item in ipairs(items) do
    local found =
      redis.call('HMGET', stock_key(doc, item), 'count', 'since', 'sum', string.match(doc, '[^:]+$'), 'next')
    local least = math.max(tonumber(found[2]) or 0, tonumber(found[5]) or 0)
    if new[item] and new[item] < least then
      restamp[#restamp + 1] = item
      restamp[#restamp + 1] = string.format('%.0f', least)
    end
    local held, more = taken(found[4], found[2]), taken(pieces[item], found[2])
    if more > held then
      grown[#grown + 1] = item
      local left = found[1] and tonumber(found[1]) - (tonumber(found[3]) or 0) + held
      if checked and left and more > left then
        short[#short + 1] = item
        short[#short + 1] = string.format('%.0f', math.max(0, left))
      end
    end
  end
  if #restamp > 1 then
    return restamp
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
  if reserved == 's' then
    redis.call('HDEL', stock_key(doc, string.match(doc, '[^:]+$')), 'next')
    return
  end
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

-- Sets the holds (or the count) of the new head. text: from its state; before: from the state of the previous head.
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
