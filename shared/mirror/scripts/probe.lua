-- with identity.lua
-- probe: says whether this server can be a mirror. Every new connection runs it before anything else, without keys: a
-- server in cluster mode would refuse them.
-- ARGV  1 ticketrail:warm  2 ticketrail:log
-- Replies {'cluster'}            the server is in cluster mode
--         {'replica'}            the server takes no writes
--         {'evicts', policy}     the server may evict data
--         {'no_info', error}     scripts may not run INFO, or INFO does not name the server
--         {'primary', whether it is warm (0/1), offset of the log state}
local info = ''
for _, section in ipairs({'server', 'replication', 'memory', 'cluster'}) do
  local found = redis.pcall('INFO', section)
  if type(found) ~= 'string' then
    return {'no_info', found.err}
  end
  info = info .. found
end
if not (string.find(info, 'run_id:%w') and string.find(info, 'master_replid:%w') and string.find(info, 'role:%w')) then
  return {'no_info', 'INFO shows no run_id, master_replid or role'}
end
if string.find(info, 'cluster_enabled:1', 1, true) then
  return {'cluster'}
end
if not string.find(info, 'role:master', 1, true) then
  return {'replica'}
end
local policy = string.match(info, 'maxmemory_policy:([%w-]+)')
if policy ~= 'noeviction' then
  return {'evicts', policy or 'unknown'}
end
return {'primary', warm_identity(ARGV[1]) and 1 or 0, tonumber(redis.call('HGET', ARGV[2], 'offset') or 0)}
