-- What looks for gaps reads the changes of an hour. A block range index does not know the blocks since the last
-- vacuum, and had all of them read. The new index comes first: while it is made, others may still read.
create index changes_that_follow_by_time on changes (accepted_at) where version > 1;
drop index changes_by_time;
