-- Draft. Nothing has been released, so the tables have no rows of today's layout; `migrate` refuses a database that has.
alter table orders
    alter tax_basis_points drop not null,
    add type text not null, add guests int, add scheduled_for timestamptz, add customer_email text, add delivery_address text,
    add service_amount bigint not null, add tip bigint not null, add due bigint not null, add balance bigint not null,
    add erased_at timestamptz, add accepted_at timestamptz, add closed_at timestamptz,
    add terms jsonb not null, add taxes jsonb not null, add flags jsonb not null;
alter table order_items
    add id uuid not null, add ordered int not null, add discount_amount bigint not null, add tax_amount bigint not null,
    add net bigint not null, add tax_category text, add course int not null, add seat int, add station_id uuid,
    add added_at timestamptz not null, add added_by text, add seq bigint not null, add kitchen_state text not null;
alter table payments
    add tip bigint not null, add tendered bigint, add change bigint not null, add refund_of uuid, add credit bigint not null,
    add reason text, add business_day date, add "by" text;
create table order_voids (
    restaurant_id uuid not null,
    order_id uuid not null,
    id uuid not null,
    line_id uuid not null,
    quantity int,
    reason text,
    wasted boolean not null,
    at timestamptz not null,
    "by" text,
    primary key (restaurant_id, order_id, id)
);
do $$
declare
    t text;
begin
    foreach t in array array['order_voids'] loop
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
