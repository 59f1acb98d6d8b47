-- identity: says which server runs the script, and which mirror it is. It is a part of the scripts whose first line
-- names it. A server is named by its run id and its replication id: "<run_id>:<master_replid>". The run id changes with
-- each start of the process. The replication id changes with each promotion, even when a server that never stopped
-- becomes the primary again. So data that another server wrote, or that this one wrote before it was a replica, has
-- another name in its stamp. ticketrail:warm, the warm stamp: server, identity, prefix, until (see keys.py) Both ids
-- have 40 characters. Every claim and read runs this: two calls of INFO with one section each and a plain search take 6
-- us, one call with both sections and patterns takes 16 us.
local function id_in(section, name)
  local info = redis.call('INFO', section)
  local _, last = string.find(info, name, 1, true)
  return string.sub(info, last + 1, last + 40)
end

local function this_server()
  return id_in('server', 'run_id:') .. ':' .. id_in('replication', 'master_replid:')
end

-- Returns the identity of this mirror if it is warm, the prefix of its order numbers, and the last business day whose
-- numbers have the prefix. Returns nil if the mirror is cold.
local function warm_identity(stamp)
  local found = redis.call('HMGET', stamp, 'server', 'identity', 'prefix', 'until')
  if found[1] and found[1] == this_server() then
    return found[2], found[3], found[4]
  end
end
