"""The rail in the test's own process. A test takes its steps one by one, in any order, any number of times.

instance.py       RailRig: one process with a rail; claim, record, reveal, take back, finish
changes.py        drafts, and changes as states for the mirror
broker.py         RabbitMQ as a list of messages, for tests that need no broker
vhost.py          rigs that share a real vhost, and functions that read back their messages
mirror_server.py  one Redis: warm, cold, wiped, copied, rolled back
sinks.py          the mirror writer and the PostgreSQL writer, which take the changes that the test delivers
gate.py           holds every call of a rail until the test chooses its outcome: done, lost, late or refused
clock.py          a clock that only the test moves
"""
