-- with stock.lua
-- hold: what orders beyond the live window hold of the stock, for a mirror that is being filled.
-- KEYS  docs of orders    ARGV  per order: what it holds (see stock.lua)
-- An order whose doc is here holds what its state says.
for i = 1, #ARGV do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    keep(KEYS[i], ARGV[i])
  end
end
return #ARGV
