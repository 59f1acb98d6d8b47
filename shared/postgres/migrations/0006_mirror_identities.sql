-- Each identity that a mirror has had. The mirror writer adds a row before it makes a mirror warm. The id gives the prefix
-- of the mirror's order numbers (shared/mirror/identity.py).
create table mirror_identities (
    id int generated always as identity primary key,
    identity text not null unique,  -- the server that was filled, and a UUID
    at timestamptz not null default now()
);
grant select, insert on mirror_identities to ticketrail_writer;
grant select on mirror_identities to ticketrail_ops;
