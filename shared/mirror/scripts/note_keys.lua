-- with identity.lua
-- note keys: loads the heads of entities that may have been created with an Idempotency-Key, without their states, so that
-- a repeated request does not create an entity again that has left the live window. trim.lua keeps the same.
-- KEYS  1 warm stamp  2 ticketrail:keys  then docs
-- ARGV  1 identity of the mirror that the caller loads  2 whether it has all of them with this call (0/1)
--       then per doc: version, change id
-- Replies 1, or 0 if this is another mirror; then nothing is written.
if warm_identity(KEYS[1]) ~= ARGV[1] then
  return 0
end
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    redis.call('HSET', KEYS[i], 'v', ARGV[2 * i - 3], 'c', ARGV[2 * i - 2])
    redis.call('EXPIRE', KEYS[i], 2592000)
  end
end
if ARGV[2] == '1' then
  redis.call('SET', KEYS[2], ARGV[1])
end
return 1
