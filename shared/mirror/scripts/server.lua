-- with identity.lua
-- server: says which server this is.
-- KEYS  1 warm stamp
-- Replies {"<run_id>:<master_replid>", the identity of the mirror ('' if it is cold)}.
return {this_server(), warm_identity(KEYS[1]) or ''}
