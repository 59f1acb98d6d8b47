-- go back: moves the position of the mirror back, because the log does not prove the current one.
-- KEYS  1 ticketrail:log    ARGV  1 offset and 2 CRC of the current position  3 offset and 4 CRC of the new one
-- Replies 1, or 0 if the mirror has another position: another mirror writer was faster, or another mirror has come.
local at = redis.call('HMGET', KEYS[1], 'offset', 'crc', 'broken')
if at[1] ~= ARGV[1] or at[2] ~= ARGV[2] then
  return 0
end
-- Another mirror writer that still has a later position must not take this for a mirror that has lost data.
local broken = math.max(tonumber(at[1]), tonumber(at[3] or -1))
redis.call('HSET', KEYS[1], 'offset', ARGV[3], 'crc', ARGV[4], 'broken', broken)
return 1
