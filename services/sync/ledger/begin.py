"""Finds the beginning of a session of the ledger: a checkpoint that the log proves."""

from collections.abc import Sequence
from contextlib import aclosing

from shared.messaging.log import LogReader, Start
from shared.postgres.checkpoints import BEFORE_LOG, Checkpoint, first_checkpoint, positions
from shared.postgres.pool import Connection
from shared.settings import Settings


async def provable(reader: LogReader, checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Returns the newest of the checkpoints, given newest first, whose `log_at` the log proves. If the retention has
    removed the message there, that is the newest one: a log loses only its end."""
    candidates = positions(checkpoints, "log_at")
    if not candidates:
        return None

    async def older() -> Sequence[Start]:
        return candidates[1:]

    async with aclosing(reader.read(candidates[0], fallbacks=older)) as batches:
        async for batch in batches:
            truncated = batch.broken if batch.broken and batch.broken.reason == "truncated" else None
            proved = truncated.back_to if truncated else candidates[0]
            return next((one for one in checkpoints if one.log_at == proved), None)
    return None


async def oldest_kept(connection: Connection) -> Checkpoint | None:
    """Returns the beginning for a log that proves no checkpoint, because it was created again: its first entry, and the
    oldest checkpoint in the feed. Checkpoints stay as long as entries of the log, so the lost log had no older changes
    either. None if there is no checkpoint."""
    oldest = await first_checkpoint(connection, BEFORE_LOG.offset)
    return oldest and Checkpoint("", BEFORE_LOG, BEFORE_LOG, oldest.feed_xid, oldest.feed_seq)


async def first_entry(reader: LogReader, connection: Connection) -> Checkpoint | None:
    """Returns a beginning at the first entry that the log has; None if the log still has everything. The feed begins at
    the oldest checkpoint of these entries, because the log lacks all earlier changes."""
    async with aclosing(reader.read("first")) as batches:
        async for batch in batches:
            first = batch.positions[0].offset
            known = await first_checkpoint(connection, first) if first > 0 else None
            return known and Checkpoint("", BEFORE_LOG, BEFORE_LOG, known.feed_xid, known.feed_seq)
    return None


def ledger_reader(settings: Settings, name: str) -> LogReader:
    return LogReader(settings.rabbitmq_url, name=name, idle_seconds=max(settings.heartbeat_interval_seconds * 3, 2.0))
