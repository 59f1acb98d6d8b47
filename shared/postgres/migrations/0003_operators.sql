-- Tables for operators: dead letters, their replays, the audit, and the changes on the retry ladder, which the ledger
-- needs to account for every change by its id.

-- A dead letter has one row. If its message dies again, `deaths` increases.
create table dead_letters (
    id uuid primary key default gen_random_uuid(),
    digest bytea not null unique,  -- SHA-256 of the body
    queue text not null,           -- the dead-letter queue of the lane, or that of the mirror writer
    lane text,                     -- the lane that a replay uses; null for a dead letter of the mirror writer alone
    sinks text[] not null,         -- the sinks that could not take the message: postgres, mirror
    restaurant_id uuid,            -- null if the event names no readable restaurant
    change_id uuid,
    entity text,
    entity_id uuid,
    version int,
    type text,
    source text,
    terminal_id text,
    trace_id text,
    mixed boolean not null default false,  -- the event names two restaurants, so only operators may see it
    reason text not null,          -- the stable name of the cause, such as contract_broken
    error text not null,           -- error type and message, for people
    place text not null,           -- the function where our code failed, as module:function
    fingerprint text not null,     -- hash of reason, error type and place; groups dead letters
    attempts json not null,        -- [{"at", "reason", "error", "place"}], oldest first
    deaths int not null default 1,
    first_failed_at timestamptz not null,
    last_failed_at timestamptz not null,
    headers json not null,
    body bytea not null,           -- the exact bytes that were received
    status text not null default 'open' check (status in ('open', 'replaying', 'resolved', 'discarded')),
    revision int not null default 1,  -- every action and every death increments it; an action that names an older one is refused
    replaced_by uuid,              -- the change that an edit or a discard committed in place of the dead letter
    why text,                      -- the reason of a discard
    kept_at timestamptz not null default now(),
    closed_at timestamptz,         -- the time when the dead letter was resolved or discarded
    xid xid8 not null default pg_current_xact_id()  -- the transaction that wrote the row last
);
create index dead_letters_by_xid on dead_letters (xid);
create function note_xid() returns trigger language plpgsql as $$
begin
    new.xid := pg_current_xact_id();
    return new;
end $$;
create trigger dead_letter_written before update on dead_letters for each row execute function note_xid();
create index dead_letters_newest on dead_letters (last_failed_at desc, id desc);
create index dead_letters_open on dead_letters (fingerprint, last_failed_at desc) where status in ('open', 'replaying');
create index dead_letters_of_restaurant on dead_letters (restaurant_id, last_failed_at desc, id desc);
create index dead_letters_of_change on dead_letters (restaurant_id, change_id);
create index dead_letters_of_entity on dead_letters (restaurant_id, entity, entity_id);
create index dead_letters_closed on dead_letters (closed_at) where closed_at is not null;

-- The edits of dead letters. `event` is the event of the operator, `difference` compares it with the dead letter.
create table dead_letter_edits (
    id uuid primary key default gen_random_uuid(),
    dead_letter_id uuid not null references dead_letters on delete cascade,
    at timestamptz not null default now(),
    actor text not null,
    why text,
    event json not null,
    difference json not null,      -- [{"path", "before", "after"}]
    change_id uuid not null
);
create index dead_letter_edits_of_dead_letter on dead_letter_edits (dead_letter_id, at);

-- Each replay, dry run, discard or restore of many dead letters is a row, so that it survives the sync worker that runs it.
create table replay_jobs (
    id uuid primary key default gen_random_uuid(),
    kind text not null check (kind in ('replay', 'dry_run', 'discard', 'restore')),
    state text not null default 'waiting'
        check (state in ('waiting', 'running', 'done', 'cancelled', 'stopped')),  -- stopped: the job stopped by itself
    selection json not null,       -- the ids or the filter that selected the dead letters
    actor text not null,
    why text,
    per_second double precision not null default 50,
    canary boolean not null default true,
    total int not null default 0,
    cancel_requested boolean not null default false,
    undo_of uuid references replay_jobs on delete set null,  -- the discard whose dead letters this job restores
    message text,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    worker uuid,                   -- the worker that runs the job
    heartbeat_at timestamptz,      -- when that worker last renewed its claim; after a silence another worker takes the job
    finished_at timestamptz
);
create index ops_jobs_open on replay_jobs (created_at) where state in ('waiting', 'running');
create table replay_job_items (
    job_id uuid not null references replay_jobs on delete cascade,
    position int not null,
    dead_letter_id uuid not null references dead_letters on delete cascade,
    fingerprint text not null,     -- the fingerprint of the dead letter when the job was made
    -- null until the job handles the item. A replay: sending, sent, resolved, failed, skipped. A dry run: would_write,
    -- superseded, would_fail, skipped. A discard: discarded, failed, skipped. A restore: restored, skipped.
    outcome text,
    same_cause boolean,            -- true if the dead letter failed again with the same fingerprint; null if it did not fail
    detail text,
    at timestamptz,
    primary key (job_id, position)
);
create index replay_job_items_under_way on replay_job_items (dead_letter_id) where outcome in ('sending', 'sent');
create index replay_job_items_of_dead_letter on replay_job_items (dead_letter_id);

-- The audit of operator actions. Operators read all of it, and admins the part about their own restaurant.
create table audit (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    actor text not null,
    role text not null,
    restaurant_id uuid,
    action text not null,          -- the action, such as dead_letter.discard
    target text not null,          -- what the action changed, such as dead_letter/<id>
    why text,
    details json not null default '{}'
);
create index audit_newest on audit (at desc, id desc);
create index audit_of_target on audit (target, at desc);
create index audit_of_restaurant on audit (restaurant_id, at desc);

-- The changes on the retry ladder. A row is inserted when the broker has confirmed the change in a retry queue, and
-- deleted when the change is committed or dead.
create table retries (
    restaurant_id uuid not null,
    change_id uuid not null,
    lane text not null,
    entity text not null,
    entity_id uuid not null,
    attempt int not null,
    reason text not null,
    error text not null,
    failed_at timestamptz not null,
    xid xid8 not null default pg_current_xact_id(),  -- the transaction that wrote the row last
    primary key (restaurant_id, change_id)
);
create trigger retry_written before update on retries for each row execute function note_xid();

-- Finds the entities that have an open conflict.
create index conflicts_open on conflicts (restaurant_id, entity, entity_id) where resolved_at is null;

do $$
declare
    t text;
begin
    foreach t in array array['dead_letters', 'audit', 'retries'] loop
        execute format('alter table %I enable row level security', t);
        execute format('alter table %I force row level security', t);
        execute format('create policy tenant on %I for select to ticketrail_api using '
            '(restaurant_id = (select nullif(current_setting(''app.tenant'', true), '''')::uuid)%s)',
            t, case when t = 'dead_letters' then ' and not mixed' else '' end);
        execute format('create policy writer on %I for all to ticketrail_writer using (true) with check (true)', t);
        execute format('create policy ops on %I for all to ticketrail_ops using (true) with check (true)', t);
        execute format('grant select on %I to ticketrail_api', t);
    end loop;
end $$;
grant select, insert, update, delete on dead_letters, dead_letter_edits, replay_jobs, replay_job_items, retries to ticketrail_writer;
grant select, insert on audit to ticketrail_writer, ticketrail_ops;
grant select on retries to ticketrail_ops;
grant select, update on dead_letters to ticketrail_ops;
grant select, insert, update on dead_letter_edits, replay_jobs, replay_job_items to ticketrail_ops;
