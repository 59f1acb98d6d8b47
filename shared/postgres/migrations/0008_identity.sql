-- Identity beside users. These are plain rows without events.

-- Codes that work once: invitations to register a restaurant, and resets of a password. The table holds only hashes. A
-- code has 128 random bits, so a fast hash is enough.
create table one_time_codes (
    code_sha256 bytea primary key,
    purpose text not null check (purpose in ('invitation', 'password_reset')),
    user_id uuid references users,  -- whose password may be reset
    created_by text not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    used_at timestamptz,
    check ((purpose = 'password_reset') = (user_id is not null))
);
create index one_time_codes_of_user on one_time_codes (user_id);
create index one_time_codes_by_expiry on one_time_codes (expires_at);
grant select, insert, delete on one_time_codes to ticketrail_writer;

-- Uses up an invitation. Call it in the transaction that registers the restaurant, so that a refused registration leaves
-- the code as it was.
create function use_invitation(code bytea) returns boolean
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    update one_time_codes c set used_at = now()
    where c.code_sha256 = code and c.purpose = 'invitation' and c.used_at is null and c.expires_at > now();
    return found;
end $$;

-- Makes the code that resets the password of a user of the current tenant, in place of an earlier one. Returns false if
-- the tenant has no such active user.
create function make_reset_code(of_user uuid, code bytea, maker text, ttl interval) returns boolean
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    perform from users u
        where u.id = of_user and u.restaurant_id = nullif(current_setting('app.tenant', true), '')::uuid
            and u.is_active and u.deleted_at is null
        for no key update;
    if not found then
        return false;
    end if;
    delete from one_time_codes c where c.user_id = of_user;
    insert into one_time_codes (code_sha256, purpose, user_id, created_by, expires_at)
    values (code, 'password_reset', of_user, maker, now() + ttl);
    insert into identity_events (restaurant_id, entity, entity_id, action, actor)
    select u.restaurant_id, 'user', u.id, 'reset_code_made', maker from users u where u.id = of_user;
    return true;
end $$;

-- The password hash of one user, for the change of one's own password.
create function password_of(of_user uuid) returns table (email text, password_hash text)
language sql stable security definer set search_path = public, pg_temp as $$
    select u.email, u.password_hash from users u where u.id = of_user and u.is_active and u.deleted_at is null
$$;

-- Replaces a password and ends all sessions of the user. `known`: the hash that the service has verified. Returns false
-- if the hash has changed since, or if the user is deactivated or deleted.
create function change_password(of_user uuid, known text, new_hash text) returns boolean
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    update users u set password_hash = new_hash, updated_at = now()
    where u.id = of_user and u.password_hash = known and u.is_active and u.deleted_at is null;
    if not found then
        return false;
    end if;
    perform end_sessions_of(of_user);
    return true;
end $$;

-- The same with a reset code, which is used up. Returns the user, or null for an unknown email or a code that is not
-- valid for it.
create function reset_password(given_email text, code bytea, new_hash text) returns uuid
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    target uuid;
begin
    select u.id into target from users u
    where u.email = given_email and u.is_active and u.deleted_at is null
    for no key update;
    update one_time_codes c set used_at = now()
    where c.code_sha256 = code and c.user_id = target and c.used_at is null and c.expires_at > now();
    if not found then
        return null;
    end if;
    update users u set password_hash = new_hash, updated_at = now() where u.id = target;
    perform end_sessions_of(target);
    return target;
end $$;

revoke execute on function use_invitation(bytea), make_reset_code(uuid, bytea, text, interval), password_of(uuid),
    change_password(uuid, text, text), reset_password(text, bytea, text) from public;
grant execute on function use_invitation(bytea), make_reset_code(uuid, bytea, text, interval), password_of(uuid),
    change_password(uuid, text, text), reset_password(text, bytea, text) to ticketrail_api;

-- API keys of restaurants, and the keys of terminals. A key is `trk_<prefix>_<secret>`. The table holds the SHA-256 of
-- the whole key. The secret has 256 random bits, so a fast hash protects it. A slow hash would cost each request 20 ms.
create table api_keys (
    id uuid primary key,
    restaurant_id uuid not null references restaurants,
    prefix text not null unique,   -- public: it names the key in lists and logs
    key_sha256 bytea not null,
    name text not null,
    scopes text[] not null check (cardinality(scopes) > 0),
    terminal_id uuid references terminals,
    created_at timestamptz not null default now(),
    created_by text not null,
    expires_at timestamptz,
    first_used_at timestamptz,
    last_used_at timestamptz,      -- to the minute
    revoked_at timestamptz,
    revoked_by text
);
create index api_keys_of_restaurant on api_keys (restaurant_id, created_at desc, id desc);

alter table api_keys enable row level security;
alter table api_keys force row level security;
create policy tenant on api_keys for all to ticketrail_api
    using (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid))
    with check (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid));
create policy writer on api_keys for all to ticketrail_writer using (true) with check (true);
create policy ops on api_keys for select to ticketrail_ops using (true);
create policy owner on api_keys for all to current_user using (true) with check (true);
-- The api role may not select key_sha256. find_api_key returns it for one prefix at a time.
grant select (id, restaurant_id, prefix, name, scopes, terminal_id, created_at, created_by, expires_at, first_used_at,
    last_used_at, revoked_at, revoked_by), insert on api_keys to ticketrail_api;
grant select, insert, update on api_keys to ticketrail_writer;
grant select (id, restaurant_id, prefix, name, scopes, terminal_id, created_at, created_by, expires_at, first_used_at,
    last_used_at, revoked_at, revoked_by) on api_keys to ticketrail_ops;

-- The key with a prefix, for a caller whose tenant is not known yet.
create function find_api_key(given_prefix text)
returns table (id text, restaurant_id text, key_sha256 bytea, scopes text[], expires_at timestamptz, revoked boolean,
    idle boolean)
language sql stable security definer set search_path = public, pg_temp as $$
    select k.id::text, k.restaurant_id::text, k.key_sha256, k.scopes, k.expires_at, k.revoked_at is not null,
        k.last_used_at is null or k.last_used_at < now() - interval '1 minute'
    from api_keys k where k.prefix = given_prefix
$$;

-- Revokes a key of the current tenant. Its requests are refused and its event streams end, as those of a user whose
-- sessions end (`end_sessions_of`). A repeat changes nothing.
create function revoke_api_key(of_key uuid, revoker text) returns void
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    update api_keys k set revoked_at = now(), revoked_by = revoker
    where k.id = of_key and k.revoked_at is null
        and k.restaurant_id = nullif(current_setting('app.tenant', true), '')::uuid;
    if found then
        insert into revocations (subject, epoch, until) values ('user:' || of_key, 1, now() + interval '31 days');
    end if;
end $$;

-- Notes that a key was used. Returns whether this was the first time.
create function note_api_key_use(of_key uuid) returns boolean
language plpgsql security definer set search_path = public, pg_temp as $$
begin
    update api_keys k set last_used_at = now()
    where k.id = of_key and (k.last_used_at is null or k.last_used_at < now() - interval '1 minute');
    update api_keys k set first_used_at = now() where k.id = of_key and k.first_used_at is null;
    return found;
end $$;

revoke execute on function find_api_key(text), revoke_api_key(uuid, text), note_api_key_use(uuid) from public;
grant execute on function find_api_key(text), revoke_api_key(uuid, text), note_api_key_use(uuid) to ticketrail_api;

-- The audit of identity: what happened to users and API keys, and who did it. `GET /api/audit?entity=user` shows it.
create table identity_events (
    id uuid primary key default gen_random_uuid(),
    restaurant_id uuid,            -- null for an operator
    entity text not null check (entity in ('user', 'api_key')),
    entity_id uuid not null,
    action text not null,          -- such as signed_in or revoked
    actor text not null,
    -- of the client, if its request has set one; a default, so that no function can forget it
    address text default nullif(current_setting('app.address', true), ''),
    at timestamptz not null default clock_timestamp(),
    changed json not null default '{}'  -- field -> {"before", "after"}
);
create index identity_events_newest on identity_events (restaurant_id, entity, at desc, id desc);
create index identity_events_by_time on identity_events (at);

alter table identity_events enable row level security;
alter table identity_events force row level security;
create policy tenant on identity_events for select to ticketrail_api
    using (restaurant_id = (select nullif(current_setting('app.tenant', true), '')::uuid));
create policy writer on identity_events for all to ticketrail_writer using (true) with check (true);
create policy ops on identity_events for select to ticketrail_ops using (true);
create policy owner on identity_events for all to current_user using (true) with check (true);
grant select on identity_events to ticketrail_api, ticketrail_ops;
grant select, insert, delete on identity_events to ticketrail_writer;

-- The actor of the current transaction, if the service has set one; else the command line, or `otherwise`.
create function identity_actor(otherwise text) returns text language sql stable as $$
    select coalesce(nullif(current_setting('app.actor', true), ''),
        case when session_user = 'ticketrail_writer' then 'command line' else otherwise end)
$$;

-- Notes all changes of users and API keys. A trigger does it, so that no code path can forget it.
create function note_user_change() returns trigger
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    kind text;
    before jsonb := '{}';
    after jsonb := to_jsonb(new) - array['password_hash', 'updated_at', 'token_epoch'];
    differences jsonb;
begin
    if tg_op = 'UPDATE' then
        before := to_jsonb(old) - array['password_hash', 'updated_at', 'token_epoch'];
        select coalesce(jsonb_object_agg(a.key, jsonb_build_object('before', before -> a.key, 'after', a.value)), '{}')
            into differences
        from jsonb_each(after) a where before -> a.key is distinct from a.value;
        kind := case
            when old.deleted_at is null and new.deleted_at is not null then 'deleted'
            when old.deleted_at is not null and new.deleted_at is null then 'restored'
            when old.is_active and not new.is_active then 'shut_out'
            when differences <> '{}' then 'changed'
        end;
    else
        kind := 'created';
    end if;
    if kind is not null then
        insert into identity_events (restaurant_id, entity, entity_id, action, actor, changed)
        values (new.restaurant_id, 'user', new.id, kind, identity_actor(new.email), coalesce(differences, '{}'));
    end if;
    if tg_op = 'UPDATE' and old.password_hash is distinct from new.password_hash then
        insert into identity_events (restaurant_id, entity, entity_id, action, actor)
        values (new.restaurant_id, 'user', new.id, 'password_changed', identity_actor(new.email));
    end if;
    return null;
end $$;
create trigger user_noted after insert or update on users for each row execute function note_user_change();

create function note_api_key_change() returns trigger
language plpgsql security definer set search_path = public, pg_temp as $$
declare
    kind text := case
        when tg_op = 'INSERT' then 'created'
        when old.revoked_at is null and new.revoked_at is not null then 'revoked'
        when old.first_used_at is null and new.first_used_at is not null then 'first_used'
    end;
begin
    if kind is not null then
        insert into identity_events (restaurant_id, entity, entity_id, action, actor)
        values (new.restaurant_id, 'api_key', new.id, kind, case kind
            when 'created' then new.created_by when 'revoked' then new.revoked_by else new.id::text end);
    end if;
    return null;
end $$;
create trigger api_key_noted after insert or update on api_keys for each row execute function note_api_key_change();

-- Notes an event of a session; the user is its own actor.
create function note_session_event(of_user uuid, kind text) returns void
language sql security definer set search_path = public, pg_temp as $$
    insert into identity_events (restaurant_id, entity, entity_id, action, actor)
    select u.restaurant_id, 'user', u.id, kind, u.email from users u where u.id = of_user
$$;

-- Notes a failed sign-in, if an account has this email.
create function note_failed_sign_in(given_email text) returns void
language sql security definer set search_path = public, pg_temp as $$
    select note_session_event(u.id, 'sign_in_failed') from users u where u.email = given_email and u.deleted_at is null
$$;

-- Refuses the tokens of a family, for `ticketrail token --revoke`.
create function revoke_family(of_family uuid) returns void
language sql security definer set search_path = public, pg_temp as $$
    insert into revocations (subject, epoch, until) values ('family:' || of_family, 1, now() + interval '31 days')
$$;

revoke execute on function note_user_change(), note_api_key_change(), note_session_event(uuid, text),
    note_failed_sign_in(text), revoke_family(uuid) from public;
grant execute on function note_failed_sign_in(text) to ticketrail_api;
grant execute on function revoke_family(uuid) to ticketrail_writer;
