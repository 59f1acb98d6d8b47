-- with stock.lua
-- stock holds: sets the holds of orders outside the live window, while a mirror is being filled.
-- KEYS  docs of orders    ARGV  per order: the stock that it holds (see stock.lua)
-- Skips an order that has a doc, because its holds come from its state.
for i = 1, #ARGV do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    keep(KEYS[i], ARGV[i])
  end
end
return #ARGV
