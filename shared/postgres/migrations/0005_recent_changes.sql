-- The search for gaps reads the changes of one hour. The BRIN index does not cover the blocks since the last vacuum, so
-- the search read all of them. The new index is created before the old one is dropped: the drop locks out readers, and
-- the creation does not.
create index changes_that_follow_by_time on changes (accepted_at) where version > 1;
drop index changes_by_time;
