# Runs at the first start of PostgreSQL. Creates the database and its owner, a role with which `migrate` creates the roles of
# the services. The owner is not a superuser, because row-level security does not apply to superusers.
psql -v ON_ERROR_STOP=1 -h /var/run/postgresql -U postgres -d postgres <<'SQL'
\getenv password TICKETRAIL_DATABASE_OWNER_PASSWORD
create role ticketrail_owner login createrole password :'password';
create database ticketrail owner ticketrail_owner;
SQL
