-- The first schema. The owner of the database runs it, after shared/postgres/migrate.py has created the roles:
--   writer  the sync worker: it is trusted and sees every tenant
--   api     the requests of clients: it sees the tenant that its transaction has set, and nothing if none is set
--   ops     the tools of operators: it reads every tenant
-- There are no foreign keys between entities, because a dish may arrive after its order. Labels are not unique, because
-- no constraint may refuse a change that the contract accepts. Every key begins with restaurant_id, so that no upsert
-- can touch a row of another tenant.

-- Identity. These are plain rows without events.
create table restaurants (
    id uuid primary key,
    slug text not null unique,
    name text not null,
    -- Orders copy the next columns, so their values must obey the contract of orders.
    currency text not null default 'EUR' check (currency ~ '^[A-Z]{3}$'),
    time_zone text not null default 'UTC' check (now() at time zone time_zone is not null),
    cutoff_hour int not null default 4 check (cutoff_hour between 0 and 23),
    tax_basis_points int not null default 500 check (tax_basis_points between 0 and 10000),
    created_at timestamptz not null default now()
);
create table users (
    id uuid primary key,
    restaurant_id uuid references restaurants,
    email text not null unique,
    role text not null check (role in ('admin', 'staff', 'customer', 'operator')),
    created_at timestamptz not null default now()
);
create table terminals (
    id uuid primary key,
    restaurant_id uuid not null references restaurants,
    name text not null,
    created_at timestamptz not null default now()
);

-- All changes; the table is append-only. Feeds page by (xid, seq), and only up to the oldest running transaction.
create table changes (
    restaurant_id uuid not null,
    change_id uuid not null,
    entity text not null,
    entity_id uuid not null,
    version int not null,
    base_change_id uuid,
    type text not null,
    source text not null,
    lane text not null,
    accepted_at timestamptz not null,
    traceparent text,
    data json not null,  -- json, not jsonb, keeps the exact text, including the fields that a newer producer adds
    written_at timestamptz not null default now(),
    xid xid8 not null default pg_current_xact_id(),
    seq bigint generated always as identity,
    primary key (restaurant_id, change_id)
);
create index changes_by_version on changes (restaurant_id, entity, entity_id, version);
create index changes_by_base on changes (restaurant_id, base_change_id) where base_change_id is not null;
create index changes_by_seq on changes (xid, seq);

-- A fork: two changes that claim the same version, or that have the same base. Both stay in `changes`.
create table conflicts (
    restaurant_id uuid not null,
    entity text not null,
    entity_id uuid not null,
    version int not null,
    change_id uuid not null,
    other_change_id uuid not null,
    opened_at timestamptz not null default now(),
    resolved_at timestamptz,
    primary key (restaurant_id, change_id, other_change_id)
);

-- The heartbeats of the last hour that PostgreSQL has committed: what was before them in their lane has left the lane.
create table heartbeats (
    id uuid primary key,
    lane text not null,
    sent_at timestamptz not null,
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default now()
);
create index heartbeats_of_lane on heartbeats (lane, xid desc, sent_at desc);
create index heartbeats_by_time on heartbeats (at);
-- The last one is the one that was committed last: its sender's clock may be behind or ahead by hours.
create view last_heartbeats as
    select distinct on (lane) lane, id, sent_at, at as stored_at from heartbeats
    order by lane, xid desc, sent_at desc;

-- Tables for readers: the current state of every entity.
create table orders (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    order_number text not null,
    business_day date not null,
    status text not null,
    table_id uuid,
    customer_name text,
    customer_phone text,
    customer_session_id text,
    currency text not null,
    subtotal bigint not null,
    tax_basis_points int not null,
    tax_amount bigint not null,
    tip_amount bigint not null,
    discount_amount bigint not null,
    deposit_used bigint not null,
    total bigint not null,
    payment_method text,
    payment_status text not null,
    notes text,
    special_instructions text,
    placed_by text,
    request_hash text,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create index orders_newest on orders (restaurant_id, created_at desc, id desc);

create table order_items (
    restaurant_id uuid not null,
    order_id uuid not null,
    position int not null,
    menu_item_id uuid not null,
    name text not null,
    quantity int not null,
    unit_price bigint not null,
    line_total bigint not null,
    special_instructions text,
    customizations jsonb not null,
    primary key (restaurant_id, order_id, position)
);

create table payments (
    restaurant_id uuid not null,
    id uuid not null,
    order_id uuid not null,
    amount bigint not null,
    method text not null,
    reference text,
    created_at timestamptz not null,
    request_key uuid,
    primary key (restaurant_id, id)
);
create index payments_of_order on payments (restaurant_id, order_id);

create table menu_items (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    name text not null,
    price bigint not null,
    category text not null,
    description text,
    is_available boolean not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);

create table tables (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    label text not null,
    seats int not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);

-- Privileges. The api role only reads these tables, because the services write entities through the rail.
do $$
declare
    t text;
begin
    foreach t in array array['orders', 'order_items', 'payments', 'menu_items', 'tables', 'changes', 'conflicts'] loop
        execute format('alter table %I enable row level security', t);
        execute format('alter table %I force row level security', t);
        execute format('create policy tenant on %I for select to ticketrail_api using '
            '(restaurant_id = (select nullif(current_setting(''app.tenant'', true), '''')::uuid))', t);
        execute format('create policy writer on %I for all to ticketrail_writer using (true) with check (true)', t);
        execute format('create policy ops on %I for select to ticketrail_ops using (true)', t);
        execute format('grant select on %I to ticketrail_api, ticketrail_ops', t);
        execute format('grant select, insert, update, delete on %I to ticketrail_writer', t);
    end loop;
end $$;
-- `changes` is append-only for every role.
revoke update, delete on changes from ticketrail_writer;

grant select, insert, delete on heartbeats to ticketrail_writer;
grant select on last_heartbeats to ticketrail_writer;
grant select on heartbeats, last_heartbeats to ticketrail_api, ticketrail_ops;
-- The services read restaurants before they know the tenant of the caller. They do not need users and terminals then.
grant select on restaurants to ticketrail_api, ticketrail_writer, ticketrail_ops;
grant select, insert, update on users, terminals to ticketrail_writer;
grant insert, update on restaurants to ticketrail_writer;
-- Operators see who exists, and neither hashes of passwords nor those of keys.
grant select (id, restaurant_id, email, role, created_at) on users to ticketrail_ops;
grant select (id, restaurant_id, name, created_at) on terminals to ticketrail_ops;
