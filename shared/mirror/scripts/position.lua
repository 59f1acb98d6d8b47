-- position: part of the scripts that write only to the mirror that their caller has filled.

-- Returns whether the mirror has applied the log at least up to this position, and whether it has lost what it had
-- applied. The mirror may be ahead of the caller, if another mirror writer was faster. That is harmless, because applying a
-- change is idempotent. A mirror behind the caller has lost nothing if a mirror writer has moved its position back from
-- there (go_back.lua).
local function has_reached(key, offset, crc)
  local at = redis.call('HMGET', key, 'offset', 'crc', 'broken')
  if not at[1] then
    return false, false
  end
  local ahead = tonumber(at[1]) - tonumber(offset)
  local lost = ahead < 0 and tonumber(offset) > tonumber(at[3] or -1)
  return ahead > 0 or (ahead == 0 and at[2] == crc), lost
end
