-- settle: what PostgreSQL has committed, or what has failed on its way there.
-- KEYS  per state: doc, pending, failed, claim
-- ARGV  1 failure as JSON ('' when committed)  then per state: version, change id
-- A doc that has moved on keeps its state: a later change settles it. One that has not got there yet is noted on its
-- claim: PostgreSQL was quicker than the reveal, which would call it pending.
for i = 1, (#ARGV - 1) / 2 do
  local k, a = (i - 1) * 4, 1 + (i - 1) * 2
  local id = string.match(KEYS[k + 1], '[^:]+$')
  local doc = redis.call('HMGET', KEYS[k + 1], 'v', 'c')
  local standing = tonumber(doc[1])
  -- PostgreSQL stands at least as far as what it committed: a doc at or below that is synced.
  local version = tonumber(ARGV[a + 1])
  local ours = standing and (standing < version or (standing == version and doc[2] <= ARGV[a + 2]))
  if ARGV[1] == '' then
    if ours or not standing then
      redis.call('ZREM', KEYS[k + 2], id)
      redis.call('HDEL', KEYS[k + 3], id)
    end
    if (standing or 0) < version and redis.call('HGET', KEYS[k + 4], 'c') == ARGV[a + 2] then
      redis.call('HSET', KEYS[k + 4], 'stored', 1)
    end
  elseif standing == version and doc[2] == ARGV[a + 2] and redis.call('ZSCORE', KEYS[k + 2], id) then
    redis.call('HSET', KEYS[k + 3], id, ARGV[1])
  end
end
return #ARGV
