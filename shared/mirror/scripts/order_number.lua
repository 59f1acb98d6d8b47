-- Returns the next number of a series, such as "0042" or "A0043". Each restaurant and business day has a series. This is a
-- part of claim.lua, so that the number and the claim are atomic. The series is a hash: prefix -> last number; the numbers
-- without a prefix have the empty one. The number of a prefix is higher than those without a prefix, so that people see
-- one sequence. The series expires eight days after its last number. Only an import can create an order of such an old day.
local function next_order_number(series, prefix)
  local last = redis.call('HMGET', series, '', prefix)
  local number = math.max(tonumber(last[1] or 0), tonumber(last[2] or 0)) + 1
  redis.call('HSET', series, prefix, number)
  redis.call('EXPIRE', series, 691200)
  return prefix .. string.format('%04d', number)
end
