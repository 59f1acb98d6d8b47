# At the first start: the role that owns the database and may create the roles of the services (`migrate` does), and the
# database. Not a superuser: row-level security would not hold for it.
psql -v ON_ERROR_STOP=1 -h /var/run/postgresql -U postgres -d postgres <<'SQL'
\getenv password TICKETRAIL_DATABASE_OWNER_PASSWORD
create role ticketrail_owner login createrole password :'password';
create database ticketrail owner ticketrail_owner;
SQL
