-- The back office: menu, tables, bays, jobs, customers, stock, sign-in, and the actor of each change.

-- Entities.
alter table orders add customer_id uuid, add external_id text;
create index orders_of_customer on orders (restaurant_id, customer_id, created_at desc, id desc)
    where customer_id is not null;
create index orders_of_session on orders (restaurant_id, customer_session_id, created_at desc, id desc)
    where customer_session_id is not null;
create index orders_at_table on orders (restaurant_id, table_id, created_at desc, id desc) where table_id is not null;
create index orders_by_status on orders (restaurant_id, status, created_at desc, id desc) where deleted_at is null;
-- A lost mirror is filled with the orders that changed in the last days and with the open orders.
create index orders_by_update on orders (updated_at);
create index orders_open on orders (restaurant_id)
    where status not in ('completed', 'cancelled') and deleted_at is null;
-- A table and a customer belong to one restaurant. Without these statistics the planner does not know that, and expects
-- too few orders, by a factor of 200.
create statistics orders_at_table_statistics (dependencies) on restaurant_id, table_id from orders;
create statistics orders_of_customer_statistics (dependencies) on restaurant_id, customer_id from orders;
-- The totals of a day are read from this index alone.
create index orders_by_day on orders (restaurant_id, business_day)
    include (status, total, subtotal, tax_amount, tip_amount, discount_amount, payment_status) where deleted_at is null;

-- The client chooses the id of a payment, so the id is unique only within its order.
alter table payments drop constraint payments_pkey, add primary key (restaurant_id, order_id, id);
drop index payments_of_order;
-- The reconciler searches recent conflicts for payments that a fork left out.
create index conflicts_by_time on conflicts (opened_at);
create index payments_newest on payments (restaurant_id, created_at desc, id desc);

create table order_holds (
    restaurant_id uuid not null,
    order_id uuid not null,
    position int not null,
    inventory_item_id uuid not null,
    quantity bigint not null,
    held_at timestamptz not null,
    primary key (restaurant_id, order_id, position)
);
create index order_holds_of_item on order_holds (restaurant_id, inventory_item_id, held_at);

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
    place text not null,
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
    request_key uuid,
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
    request_key uuid,
    primary key (restaurant_id, inventory_item_id, id)
);

-- The history: changes by time, by kind of entity and by actor. The index changes_by_version serves one entity.
alter table changes add actor text;
create index changes_newest on changes (restaurant_id, accepted_at desc, change_id desc);
create index changes_newest_of on changes (restaurant_id, entity, accepted_at desc, change_id desc)
    where entity <> 'order';
create index changes_of_actor on changes (restaurant_id, actor, accepted_at desc, change_id desc)
    where actor is not null;

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
    -- Lists are paged by the time of creation.
    foreach t in array array['menu_items', 'tables', 'categories', 'brands', 'bays', 'jobs', 'customers',
                             'inventory_items'] loop
        execute format('create index %I on %I (restaurant_id, created_at desc, id desc)', t || '_newest', t);
    end loop;
end $$;

-- Identity. These are plain rows without events.
alter table restaurants add email text, add settings jsonb not null default '{}';
alter table users
    add name text not null default '',
    add password_hash text,
    add request_hash text,
    add is_active boolean not null default true,
    -- Access tokens carry the epoch of their sign-in. Ending all sessions of a user raises it (end_sessions_of).
    add token_epoch int not null default 0,
    add updated_at timestamptz not null default now(),
    add deleted_at timestamptz;
alter table users drop constraint users_email_key;
-- The services store emails in one form (shared/security/emails.py), so equal texts are equal emails.
create unique index users_by_email on users (email) where deleted_at is null;
create index users_of_restaurant on users (restaurant_id, created_at desc, id desc);

-- Each sign-in begins a family of tokens, and each token is used once. The table holds only hashes, so that a leaked
-- table gives nobody access.
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

-- Access tokens that are refused before they expire. Every service reads the new rows every two seconds
-- (shared/security/revoked.py).
create table revocations (
    id bigint generated always as identity primary key,
    subject text not null,         -- user:<id> or family:<id>
    epoch int not null,            -- refused are tokens of the subject with a smaller epoch; in tokens, a family has 0
    noted_at timestamptz not null default clock_timestamp(),
    until timestamptz not null     -- the last token that the row refuses has expired by then
);
create index revocations_by_time on revocations (noted_at);
create index revocations_by_end on revocations (until);

-- The api role sees only the users of its tenant. The functions below return one row at a time to a caller whose tenant
-- is not known yet.
alter table users enable row level security;
alter table users force row level security;
create policy tenant on users for all to ticketrail_api
    using (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid))
    with check (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid) and role <> 'operator');
create policy writer on users for all to ticketrail_writer using (true) with check (true);
create policy ops on users for select to ticketrail_ops using (true);
create policy owner on users for all to current_user using (true) with check (true);
-- The api role may not select password_hash. sign_in_user returns it for one email at a time.
grant select (id, restaurant_id, email, name, role, is_active, created_at, updated_at, deleted_at), insert, update
    on users to ticketrail_api;
grant select (name, is_active, updated_at, deleted_at) on users to ticketrail_ops;
grant insert on restaurants to ticketrail_api;
grant select, delete on refresh_tokens, revocations to ticketrail_writer;
grant select on revocations to ticketrail_api;

-- A request with an Idempotency-Key that added a user has a password in it, so its hash is as secret as password_hash.
create function request_of_user(given_id uuid) returns text
language sql stable security definer set search_path = public, pg_temp as $$
    select u.request_hash from users u
    where u.id = given_id and u.restaurant_id = nullif(current_setting('app.tenant', true), '')::uuid
$$;
revoke all on function request_of_user from public;
grant execute on function request_of_user to ticketrail_api;

-- pg_temp comes last in search_path. Otherwise a temporary table of the caller could hide our table.
create function sign_in_user(given_email text)
returns table (id text, restaurant_id text, email text, name text, role text, password_hash text)
language sql stable security definer set search_path = public, pg_temp as $$
    select u.id::text, u.restaurant_id::text, u.email, u.name, u.role, u.password_hash
    from users u
    where u.email = given_email and u.deleted_at is null and u.is_active
$$;

-- Each function that begins, rotates or ends a session locks the row of its user first. A password change, the
-- deactivation of a user and the reuse of a token therefore also end a session that begins at the same moment.

-- `known`: the password hash that the service has verified. Returns the family of the new session and the epoch of the
-- user, or no row if the hash has changed since, or if the user is deactivated or deleted.
create function begin_session(token bytea, of_user uuid, known text, ttl interval)
returns table (family text, epoch int)
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    new_family uuid := gen_random_uuid();
begin
    select u.token_epoch into epoch from users u
        where u.id = of_user and u.password_hash = known and u.is_active and u.deleted_at is null
        for no key update;
    if not found then
        return;
    end if;
    insert into refresh_tokens (token_sha256, family, user_id, expires_at)
    values (token, new_family, of_user, now() + ttl);
    perform note_session_event(of_user, 'signed_in');  -- 0008_identity.sql
    family := new_family::text;
    return next;
end $$;

-- Ends a family of refresh tokens. `access_ttl`: the lifetime of its access tokens, which are refused from now on.
create function end_family(of_family uuid, access_ttl interval) returns void
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    update refresh_tokens r set revoked_at = now() where r.family = of_family and r.revoked_at is null;
    if found then
        insert into revocations (subject, epoch, until) values ('family:' || of_family, 1, now() + access_ttl);
    end if;
end $$;

-- Rotates a refresh token. `outcome`: rotated, repeated, reused (the call then ends the whole family) or invalid. `new` is
-- derived from `old`. A use within ten seconds after the first one is `repeated` and gets the same successor, because two
-- tabs of a browser share their token and may refresh at once.
create function rotate_session(old bytea, new bytea, ttl interval, access_ttl interval)
returns table (outcome text, id text, restaurant_id text, email text, name text, role text, family text, epoch int)
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    known refresh_tokens;
    usable boolean;
begin
    perform from users u where u.id = (select r.user_id from refresh_tokens r where r.token_sha256 = old)
        for no key update;
    select * into known from refresh_tokens r where r.token_sha256 = old;
    usable := known.revoked_at is null and known.expires_at > now()
        and exists (select from users u where u.id = known.user_id and u.is_active and u.deleted_at is null);
    if known.used_at is null and usable then
        update refresh_tokens r set used_at = now() where r.token_sha256 = old;
        insert into refresh_tokens (token_sha256, family, user_id, expires_at)
        values (new, known.family, known.user_id, now() + ttl);
        outcome := 'rotated';
    -- A transaction that waited for the row of the user began before the first use: now() would be too early.
    elsif usable and known.used_at between clock_timestamp() - interval '10 seconds' and clock_timestamp()
        and exists (select from refresh_tokens r where r.token_sha256 = new and r.family = known.family) then
        outcome := 'repeated';
    elsif known.used_at is not null then
        perform end_family(known.family, access_ttl);
        perform note_session_event(known.user_id, 'refresh_token_reused');
        outcome := 'reused';
    else
        outcome := 'invalid';
    end if;
    if outcome in ('rotated', 'repeated') then
        return query select outcome, u.id::text, u.restaurant_id::text, u.email, u.name, u.role, known.family::text,
            u.token_epoch from users u where u.id = known.user_id;
    else
        return next;
    end if;
end $$;

create function end_session(token bytea, access_ttl interval) returns void
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    perform from users u where u.id = (select r.user_id from refresh_tokens r where r.token_sha256 = token)
        for no key update;
    perform note_session_event(r.user_id, 'signed_out') from refresh_tokens r
        where r.token_sha256 = token and r.revoked_at is null;
    perform end_family((select r.family from refresh_tokens r where r.token_sha256 = token), access_ttl);
end $$;

-- Ends all sessions of a user. Call it in the transaction that changes the password or deactivates the user. The row of
-- `revocations` stays longer than the longest lifetime of a token, 30 days in production.
create function end_sessions_of(of_user uuid) returns void
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    new_epoch int;
begin
    update users set token_epoch = token_epoch + 1 where id = of_user returning token_epoch into new_epoch;
    if found then
        update refresh_tokens set revoked_at = now() where user_id = of_user and revoked_at is null;
        insert into revocations (subject, epoch, until)
        values ('user:' || of_user, new_epoch, now() + interval '31 days');
    end if;
end $$;

revoke execute on function sign_in_user(text), begin_session(bytea, uuid, text, interval),
    rotate_session(bytea, bytea, interval, interval), end_session(bytea, interval), end_family(uuid, interval),
    end_sessions_of(uuid) from public;
grant execute on function sign_in_user(text), begin_session(bytea, uuid, text, interval),
    rotate_session(bytea, bytea, interval, interval), end_session(bytea, interval), end_sessions_of(uuid) to ticketrail_api;
grant execute on function end_sessions_of(uuid) to ticketrail_writer;

-- The position of each import, by the digest of its source. An interrupted import continues there.
create table imports (
    source_sha256 text primary key,
    source text not null,
    restaurant_id uuid not null,
    done bigint not null default 0,
    refused bigint not null default 0,
    -- Digest of the rows that are done, because a database can return other rows at the next run.
    passed_sha256 text not null default '',
    finished_at timestamptz,
    started_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create table import_refusals (
    source_sha256 text not null references imports on delete cascade,
    line bigint not null,
    reason text not null,
    primary key (source_sha256, line)
);
grant select, insert, update, delete on imports, import_refusals to ticketrail_writer;
grant select on imports, import_refusals to ticketrail_ops;
