-- Menu, tables, bays, jobs, customers and stock; who signs in; who changed what.

-- Entities.
alter table orders add customer_id uuid, add external_id text;
create index orders_of_customer on orders (restaurant_id, customer_id) where customer_id is not null;
create index orders_at_table on orders (restaurant_id, table_id, created_at desc, id desc) where table_id is not null;
create index orders_by_status on orders (restaurant_id, status, created_at desc, id desc);
-- Days are summed up from the index alone.
create index orders_by_day on orders (restaurant_id, business_day)
    include (status, total, subtotal, tax_amount, tip_amount, discount_amount, payment_status) where deleted_at is null;

-- The id of a payment is the client's: it is unique within its order.
alter table payments drop constraint payments_pkey, add primary key (restaurant_id, order_id, id);
drop index payments_of_order;
create index payments_newest on payments (restaurant_id, created_at desc, id desc);

create table order_holds (
    restaurant_id uuid not null,
    order_id uuid not null,
    position int not null,
    inventory_item_id uuid not null,
    quantity bigint not null,
    primary key (restaurant_id, order_id, position)
);
create index order_holds_of_item on order_holds (restaurant_id, inventory_item_id);

alter table menu_items
    add brand text,
    add image_url text,
    add customizations jsonb not null default '[]',
    add consumes jsonb not null default '[]';
alter table tables add state text not null default 'free';

create table categories (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    name text not null,
    description text,
    image_url text,
    position int not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create table brands (like categories including all);

create table bays (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    name text not null,
    kind text,
    is_open boolean not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create table jobs (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    bay_id uuid not null,
    order_id uuid,
    title text not null,
    stage text not null,
    place bigint not null,
    scheduled_at timestamptz,
    expected_minutes int,
    notes text,
    assigned_to text,
    started_at timestamptz,
    finished_at timestamptz,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create index jobs_of_bay on jobs (restaurant_id, bay_id, stage);

create table customers (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    name text not null,
    phone text,
    email text,
    notes text,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create index customers_by_phone on customers (restaurant_id, phone) where phone is not null;
create table loyalty_moves (
    restaurant_id uuid not null,
    id uuid not null,
    customer_id uuid not null,
    points int not null,
    reason text,
    created_at timestamptz not null,
    primary key (restaurant_id, customer_id, id)
);

create table inventory_items (
    restaurant_id uuid not null,
    id uuid not null,
    version int not null,
    change_id uuid not null,
    name text not null,
    quantity bigint not null,
    unit text not null,
    low_at bigint,
    counted_at timestamptz not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    deleted_at timestamptz,
    primary key (restaurant_id, id)
);
create table stock_moves (
    restaurant_id uuid not null,
    id uuid not null,
    inventory_item_id uuid not null,
    quantity bigint not null,
    reason text,
    created_at timestamptz not null,
    primary key (restaurant_id, inventory_item_id, id)
);

-- Who changed what: read by time, or by entity (changes_by_version).
alter table changes add actor text;
create index changes_newest on changes (restaurant_id, accepted_at desc, change_id desc);

do $$
declare
    t text;
begin
    foreach t in array array['order_holds', 'categories', 'brands', 'bays', 'jobs', 'customers', 'loyalty_moves',
                             'inventory_items', 'stock_moves'] loop
        execute format('alter table %I enable row level security', t);
        execute format('alter table %I force row level security', t);
        execute format('create policy tenant on %I for select to ticketrail_api using '
            '(restaurant_id = (select nullif(current_setting(''app.tenant'', true), '''')::uuid))', t);
        execute format('create policy writer on %I for all to ticketrail_writer using (true) with check (true)', t);
        execute format('create policy ops on %I for select to ticketrail_ops using (true)', t);
        execute format('grant select on %I to ticketrail_api, ticketrail_ops', t);
        execute format('grant select, insert, update, delete on %I to ticketrail_writer', t);
    end loop;
    -- Lists page by the time of creation.
    foreach t in array array['menu_items', 'tables', 'categories', 'brands', 'bays', 'jobs', 'customers',
                             'inventory_items'] loop
        execute format('create index %I on %I (restaurant_id, created_at desc, id desc)', t || '_newest', t);
    end loop;
end $$;

-- Identity: plain rows, no events.
alter table restaurants add email text, add settings jsonb not null default '{}';
alter table users
    add name text not null default '',
    add password_hash text,
    add is_active boolean not null default true,
    add updated_at timestamptz not null default now(),
    add deleted_at timestamptz;
alter table users drop constraint users_email_key;
create unique index users_by_email on users (lower(email)) where deleted_at is null;
create index users_of_restaurant on users (restaurant_id, created_at desc, id desc);

-- One family per sign-in; each token of it is used once. Kept as hashes: what leaks from here opens nothing.
create table refresh_tokens (
    token_sha256 bytea primary key,
    family uuid not null,
    user_id uuid not null references users,
    issued_at timestamptz not null default now(),
    expires_at timestamptz not null,
    used_at timestamptz,
    revoked_at timestamptz
);
create index refresh_tokens_of_family on refresh_tokens (family);
create index refresh_tokens_of_user on refresh_tokens (user_id);
create index refresh_tokens_by_expiry on refresh_tokens (expires_at);

-- The api role sees the users of its tenant alone. What must be known before the tenant is known, these functions
-- tell, one row at a time.
alter table users enable row level security;
alter table users force row level security;
create policy tenant on users for all to ticketrail_api
    using (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid))
    with check (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid) and role <> 'operator');
create policy writer on users for all to ticketrail_writer using (true) with check (true);
create policy ops on users for select to ticketrail_ops using (true);
create policy owner on users for all to current_user using (true) with check (true);
-- Not the hashes of the passwords: sign_in_user tells one to who knows its email.
grant select (id, restaurant_id, email, name, role, is_active, created_at, updated_at, deleted_at), insert, update
    on users to ticketrail_api;
grant insert on restaurants to ticketrail_api;
grant select, delete on refresh_tokens to ticketrail_writer;

create function sign_in_user(wanted_email text)
returns table (id text, restaurant_id text, email text, name text, role text, password_hash text)
language sql stable security definer set search_path = public as $$
    select u.id::text, u.restaurant_id::text, u.email, u.name, u.role, u.password_hash
    from users u
    where lower(u.email) = lower(wanted_email) and u.deleted_at is null and u.is_active
$$;

create function begin_session(token bytea, of_user uuid, ttl interval) returns void
language sql security definer set search_path = public as $$
    insert into refresh_tokens (token_sha256, family, user_id, expires_at)
    values (token, gen_random_uuid(), of_user, now() + ttl)
$$;

-- Rotates a refresh token. `outcome`: rotated, reused (the whole family is revoked by this) or invalid.
create function rotate_session(old bytea, new bytea, ttl interval)
returns table (outcome text, id text, restaurant_id text, email text, name text, role text)
language plpgsql security definer set search_path = public as $$
declare
    found refresh_tokens;
begin
    select * into found from refresh_tokens r where r.token_sha256 = old for update;
    if not found.user_id is null and found.used_at is not null then
        update refresh_tokens r set revoked_at = coalesce(r.revoked_at, now()) where r.family = found.family;
        return query select 'reused', null::text, null::text, null::text, null::text, null::text;
    elsif found.user_id is null or found.revoked_at is not null or found.expires_at <= now()
        or not exists (select from users u where u.id = found.user_id and u.is_active and u.deleted_at is null) then
        return query select 'invalid', null::text, null::text, null::text, null::text, null::text;
    else
        update refresh_tokens r set used_at = now() where r.token_sha256 = old;
        insert into refresh_tokens (token_sha256, family, user_id, expires_at)
        values (new, found.family, found.user_id, now() + ttl);
        return query select 'rotated', u.id::text, u.restaurant_id::text, u.email, u.name, u.role
            from users u where u.id = found.user_id;
    end if;
end $$;

create function end_session(token bytea) returns void
language sql security definer set search_path = public as $$
    update refresh_tokens set revoked_at = coalesce(revoked_at, now())
    where family = (select family from refresh_tokens where token_sha256 = token)
$$;

-- All of a user's: its password was changed, or it was shut out.
create function end_sessions_of(of_user uuid) returns void
language sql security definer set search_path = public as $$
    update refresh_tokens set revoked_at = now() where user_id = of_user and revoked_at is null
$$;

revoke execute on function sign_in_user(text), begin_session(bytea, uuid, interval),
    rotate_session(bytea, bytea, interval), end_session(bytea), end_sessions_of(uuid) from public;
grant execute on function sign_in_user(text), begin_session(bytea, uuid, interval),
    rotate_session(bytea, bytea, interval), end_session(bytea), end_sessions_of(uuid) to ticketrail_api;

-- How far an import has come, by the digest of its source: what was interrupted goes on from there.
create table imports (
    source_sha256 text primary key,
    source text not null,
    restaurant_id uuid not null,
    done bigint not null default 0,
    refused bigint not null default 0,
    finished_at timestamptz,
    started_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
grant select, insert, update, delete on imports to ticketrail_writer;
grant select on imports to ticketrail_ops;
