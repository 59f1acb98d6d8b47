-- Returns the next number of a series, such as "0042". Each restaurant and business day has a series. This is a part of
-- claim.lua, so that the number and the claim are atomic. `floor`: the highest number that the caller knows, for a mirror
-- that lost its counter. The counter expires after eight days, when no order of that business day can be created any more.
local function next_order_number(series, floor)
  local number = math.max(tonumber(redis.call('GET', series) or 0), floor) + 1
  redis.call('SET', series, number, 'EX', 691200)
  return string.format('%04d', number)
end
