"""Removes dead letters and replay jobs that were closed longer ago than the retention. Open dead letters stay for ever.

`maintenance/cleanup.py` calls these functions with connections of the writer role.
"""

from shared.postgres.pool import Connection

_CLOSED_DEAD_LETTERS = """
delete from dead_letters
where closed_at < now() - make_interval(days => $1) and status in ('resolved', 'discarded')
"""
# A job that waits for the outcome of a dead letter stays until the outcome is stored.
_ENDED_JOBS = """
delete from replay_jobs j where finished_at < now() - make_interval(days => $1)
    and not exists (select from replay_job_items p where p.job_id = j.id and p.outcome in ('sending', 'sent'))
"""


async def remove_closed_dead_letters(connection: Connection, days: int) -> int:
    """Removes dead letters that were resolved or discarded more than `days` days ago. Returns their number."""
    return _count(await connection.execute(_CLOSED_DEAD_LETTERS, days))


async def remove_ended_jobs(connection: Connection, days: int) -> int:
    """Removes replays and dry runs that ended more than `days` days ago. Returns their number."""
    return _count(await connection.execute(_ENDED_JOBS, days))


def _count(status: str) -> int:
    return int(status.rpartition(" ")[2])
