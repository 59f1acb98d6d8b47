-- The decision about a conflict: who decided it and why, the change that is kept, and the change that enforced it.
alter table conflicts
    add column id uuid not null unique default gen_random_uuid(),
    add column resolved_by text,
    add column why text,
    add column kept_change_id uuid,
    add column resolved_change_id uuid;  -- null if the entity already had the values of the kept change

grant update (resolved_at, resolved_by, why, kept_change_id, resolved_change_id) on conflicts to ticketrail_ops;
create policy ops_decide on conflicts for update to ticketrail_ops using (true) with check (true);
