-- sync state: notes what PostgreSQL has committed, or what has failed on the way there.
-- KEYS  per state: doc, pending, failed, claim
-- ARGV  1 failure as JSON ('' when committed)  then per state: version, change id
-- A doc with a later head keeps its sync state: a later call changes it. For a change that the doc does not have yet, the
-- claim notes the commit: PostgreSQL was faster than the reveal, which would call the change pending.
for i = 1, (#ARGV - 1) / 2 do
  local k, a = (i - 1) * 4, 1 + (i - 1) * 2
  local id = string.match(KEYS[k + 1], '[^:]+$')
  local doc = redis.call('HMGET', KEYS[k + 1], 'v', 'c')
  local head = tonumber(doc[1])
  -- The head in PostgreSQL is at least what it committed: a doc at or below that is synced.
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
