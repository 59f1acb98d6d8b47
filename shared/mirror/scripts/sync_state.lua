-- sync state: stores that PostgreSQL has committed states, or that writing them failed.
-- KEYS  per state: doc, pending, failed, claim
-- ARGV  1 failure as JSON ('' when committed)  then per state: version, change id
-- A doc with a later head keeps its sync state, because a later call will set it. If PostgreSQL was faster than the
-- reveal, the doc does not have the change yet. The commit is then noted in the claim, so that the reveal does not make the
-- change pending.
for i = 1, (#ARGV - 1) / 2 do
  local k, a = (i - 1) * 4, 1 + (i - 1) * 2
  local id = string.match(KEYS[k + 1], '[^:]+$')
  local doc = redis.call('HMGET', KEYS[k + 1], 'v', 'c')
  local head = tonumber(doc[1])
  -- PostgreSQL has this change or a later one as its head, so a doc at or below this change is synced.
  local version = tonumber(ARGV[a + 1])
  local ours = head and (head < version or (head == version and doc[2] <= ARGV[a + 2]))
  if ARGV[1] == '' then
    if ours or not head then
      redis.call('ZREM', KEYS[k + 2], id)
      redis.call('HDEL', KEYS[k + 3], id)
    end
    if (head or 0) < version and redis.call('HGET', KEYS[k + 4], 'c') == ARGV[a + 2] then
      redis.call('HSET', KEYS[k + 4], 'stored', 1)
    end
  elseif head == version and doc[2] == ARGV[a + 2] and redis.call('ZSCORE', KEYS[k + 2], id) then
    redis.call('HSET', KEYS[k + 3], id, ARGV[1])
  end
end
return #ARGV
