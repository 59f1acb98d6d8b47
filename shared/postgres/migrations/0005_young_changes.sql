-- What looks for gaps reads the changes of the last hour. A block range index has all changes since the last vacuum in one
-- heap, the last hour among them, and had them all read; this one takes each where it belongs.
drop index changes_by_time;
create index changes_by_time on changes (accepted_at) where version > 1;
