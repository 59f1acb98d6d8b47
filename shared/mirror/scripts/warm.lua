-- with identity.lua, position.lua
-- warm: makes the mirror warm, after the mirror writer has read the log to its end. From now on the mirror takes claims.
-- KEYS  1 ticketrail:log  2 warm stamp
-- ARGV  1 offset and 2 CRC of the position that the mirror must have reached  3 the server that the caller filled
--       4 identity of the mirror from now on  5 prefix of its order numbers  6 last business day whose numbers have it
-- Replies 1, or 0 if this is not the mirror that the caller filled. Does nothing if the mirror is already warm.
local server = this_server()
if not has_reached(KEYS[1], ARGV[1], ARGV[2]) or server ~= ARGV[3] then
  return 0
end
if redis.call('HGET', KEYS[2], 'server') ~= server then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], 'server', server, 'identity', ARGV[4], 'prefix', ARGV[5], 'until', ARGV[6])
end
return 1
