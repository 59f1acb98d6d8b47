-- The feed: changes are read in the order (xid, seq) from `changes` (shared/postgres/feed.py).

-- The newest points up to which log and feed agree. A feed position names one of them, so that a reader whose position is
-- not in this database any more (a failover without the last commits, a restored backup) begins there again.
create table checkpoints (
    id uuid primary key default gen_random_uuid(),
    -- Positions in the log (shared/messaging/position.py): offset, and CRC-32 of the message there. -1: before the first.
    log_low bigint not null,       -- log entries up to this one are in `changes`, or dead
    log_low_crc bigint not null,
    log_at bigint not null,        -- the last log entry that was read
    log_at_crc bigint not null,
    feed_xid xid8 not null,        -- changes up to (feed_xid, feed_seq) are in the log up to log_at
    feed_seq bigint not null,
    counts json not null default '{}',
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default now()
);
create index checkpoints_by_xid on checkpoints (xid);

-- The server that assigned the xids in this database. After a dump was restored into another server, they mean nothing
-- there: `ticketrail migrate` then sets them to 0.
create table database_server (
    only_row boolean primary key default true check (only_row),
    system_identifier text not null
);

-- Returns '<system identifier>-<timeline of the write-ahead log>-<start of the server>'. A managed server may hide the first
-- two. The control file would name the former timeline for a while after a promotion. The start tells a restored snapshot of
-- the disk, which has the same timeline. Services may call this function even if only the owner may call those in it.
create function feed_timeline() returns text language plpgsql stable security definer set search_path = pg_catalog as $$
declare
    started text := (extract(epoch from pg_postmaster_start_time()) * 1000000)::int8::text;
begin
    return (select system_identifier from pg_control_system()) || '-' || left(pg_walfile_name(pg_current_wal_lsn()), 8)
        || '-' || started;
exception
    when insufficient_privilege or undefined_function or feature_not_supported then
        return '--' || started;
    when object_not_in_prerequisite_state then
        raise sqlstate '25006' using message = 'this server is a standby, which has no feed';
end $$;

grant select on checkpoints, database_server to ticketrail_api, ticketrail_writer, ticketrail_ops;
grant insert, delete on checkpoints to ticketrail_writer;
