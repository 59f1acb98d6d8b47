"""Runs the jobs of operators in the sync worker: replays, dry runs, discards and restores.

Guarantee: each dead letter of a job is sent at least once, or skipped because it is not open any more. Its outcome is
observed: its change is in `changes`, or it failed again. Sending it twice is harmless. If a worker dies or stops,
another one continues its jobs.

    canary   the job sends one dead letter, then ten, then the rest; each step waits for the outcomes of the last one
    stop     the job stops by itself if a dead letter fails again with the same cause, or a canary with any cause
    rate     the job sends a limited number of dead letters per second
    cancel   the job sends nothing more; dead letters that are already sent continue

A dead letter goes only to the queue of its lane, through the default exchange. If it went through `ticketrail.changes`,
the change log would have it twice. It carries no attempt number, so that it gets all retries again. A dead letter of
the mirror writer is applied to the mirror without a queue, and one of both sinks is applied and sent.

A discard or a restore handles one dead letter after the other, as an operator does (repairs.py). Each is committed with
its outcome and its row in the audit, so that a job that another worker continues closes nothing twice. A dead letter
that failed again with another cause since the job was made is skipped.

While a backend is unavailable, jobs wait for it, with jittered backoff. At shutdown, jobs are released at once.
"""

import asyncio
import contextlib
import time
from uuid import uuid4

import structlog

from services.sync.dead_letters import actions, dry_run
from services.sync.dead_letters import replay_sql as steps
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_sql import Progress, Running, ToReplay
from services.sync.dead_letters.replay_throttle import CANARIES, Pace, allowed
from services.sync.failures.classification import classify, describe, fingerprint
from services.sync.failures.retry_ladder import PUBLISH_TIMEOUT_SECONDS, REPLAY
from services.sync.mirror.mirror_writer import MirrorWriter
from shared.backoff import backoff
from shared.entities.contract import BrokenContract, Lane
from shared.errors import Conflict, InvalidInput, NotFound
from shared.lifecycle import BackgroundLoop, end_tasks, vital_task
from shared.messaging.publisher import Publisher
from shared.messaging.topology import lane_queue
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.security.tokens import Role
from shared.settings import Settings

log = structlog.get_logger(__name__)

_STEP_SIZE = 10
"""The maximum number of dead letters in one step. The limit bounds the memory, because a body can have 16 MB."""
_MAX_JOBS = 3
_POLL_INTERVAL_SECONDS = 0.5
_STEP_INTERVAL_SECONDS = 0.05
_SILENT_SECONDS = 15.0
_SLACK_SECONDS = 60.0
_RELEASE_TIMEOUT_SECONDS = 2.0
_CLOSED = {"discard": "discarded", "restore": "restored"}
"""Kind of job -> the outcome of its items."""


def verdict(job: Running, progress: Progress, *, cancel: bool) -> tuple[str, str] | None:
    """Returns (state, message) if the job must end now; None if it continues."""
    if job.kind == "replay":
        if progress.same_cause:
            return (
                "stopped",
                f"{progress.same_cause} failed again with the same cause, after {progress.started} of {job.total}",
            )
        if job.canary and progress.failed and progress.started <= CANARIES[-1]:
            return "stopped", f"{progress.failed} of the first {progress.started} failed again, with another cause"
    if progress.settled >= progress.dead_letters and job.kind == "dry_run":
        return "done", f"{job.total} tried, nothing was written"
    if progress.settled >= progress.dead_letters and job.kind in _CLOSED:
        return "done", f"{progress.closed} of {job.total} were {_CLOSED[job.kind]}"
    if progress.settled >= progress.dead_letters:
        return "done", f"{job.total - progress.failed} of {job.total} were written"
    if cancel:
        return "cancelled", f"cancelled after {progress.started} of {job.total}"
    return None


class Replays:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror_writer: MirrorWriter,
        publisher: Publisher,
        mirror: Mirror,
        rail: Rail,
        *,
        poll: float = _POLL_INTERVAL_SECONDS,
        silent_seconds: float = _SILENT_SECONDS,
        slack_seconds: float = _SLACK_SECONDS,
    ) -> None:
        """`postgres`: a pool of the writer role. `silent_seconds`: after this silence of its worker, another worker
        takes over a job. `slack_seconds`: the time that a change may take in addition to the delays of its retry
        queues."""
        self._postgres = postgres
        self._mirror_writer = mirror_writer
        self._publisher = publisher
        self._repairs = DeadLetterRepairs(postgres, mirror, rail)
        self._poll = poll
        self._silent = silent_seconds
        self._lost = sum(settings.retry_steps_ms) / 1000 + slack_seconds
        self._timeout_seconds = settings.database_timeout_seconds * 0.7
        self._worker = str(uuid4())
        self.loop = BackgroundLoop("replays", self._run)
        self._jobs: set[asyncio.Task[None]] = set()

    @property
    def running_jobs(self) -> int:
        """The number of jobs that this worker executes now."""
        return len(self._jobs)

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        if not self.loop.running and not self._jobs:
            return
        await self.loop.stop()
        await end_tasks(*self._jobs)
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_SECONDS), self._postgres.connection() as connection:
                await steps.release(connection, self._worker)
        except Exception as error:  # noqa: BLE001  (another worker takes over the jobs after the silence)
            log.info("replays_not_released", error=describe(error))

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    await steps.settle(connection, lost_seconds=self._lost)
                    job = None
                    if len(self._jobs) < _MAX_JOBS:
                        job = await steps.claim(connection, self._worker, silent_seconds=self._silent)
                failures = 0
            except Exception as error:  # noqa: BLE001  (PostgreSQL is unavailable, or two workers settled at once: the next turn tries again)
                failures += 1
                log.debug("replays_wait", error=describe(error))
                await asyncio.sleep(backoff(failures))
                continue
            if job is not None:
                log.info("replay_job_taken", job=job.id, kind=job.kind, dead_letters=job.total)
                task = vital_task(self._work(job), name=f"replay-{job.id}")
                self._jobs.add(task)
                task.add_done_callback(self._jobs.discard)
            self.loop.turned()
            await asyncio.sleep(self._poll)

    async def _work(self, job: Running) -> None:
        pace, failures = Pace(job.per_second, at=time.monotonic()), 0
        while True:
            try:
                if await self._step(job, pace):
                    return
                failures = 0
            except Exception as error:  # noqa: BLE001  (a backend is unavailable, or a bug: the job keeps its state)
                failures += 1
                log.warning("replay_waits", job=job.id, error=describe(error), attempt=failures)
                await asyncio.sleep(backoff(failures))

    async def _step(self, job: Running, pace: Pace) -> bool:
        """Handles the next dead letters of the job. Returns True if the job has ended or belongs to another worker."""
        async with self._postgres.connection() as connection:
            cancel = await steps.renew_claim(connection, job.id, self._worker)
            if cancel is None:
                log.warning("replay_job_lost", job=job.id)
                return True
            progress = await steps.progress(connection, job.id)
            if (end := verdict(job, progress, cancel=cancel)) is not None:
                state, message = end
                await steps.end(connection, job.id, self._worker, state, message)
                log.info("replay_job_ended", job=job.id, state=state, message=message)
                return True
            requested = min(_STEP_SIZE, allowed(job, progress) - progress.started)
            count = pace.take(requested, time.monotonic())
            dead_letters = await steps.next_items(connection, job.id, count) if count else []
            if job.kind == "dry_run":
                for dead_letter in dead_letters:
                    await self._forecast(connection, job, dead_letter)
            elif dead_letters and job.kind == "replay":
                dead_letters = await self._begin(connection, job, dead_letters)
        # Send without a database connection, because the broker may be unavailable for long.
        if dead_letters and job.kind == "replay":
            await self._send(job, dead_letters)
        elif dead_letters and job.kind in _CLOSED:
            for dead_letter in dead_letters:
                await self._close(job, dead_letter)
        elif not dead_letters:
            await asyncio.sleep(_STEP_INTERVAL_SECONDS if requested > 0 else self._poll)
        return False

    async def _forecast(self, connection: Connection, job: Running, dead_letter: ToReplay) -> None:
        if dead_letter.status == "open":
            found = await dry_run.forecast(
                connection, dead_letter, self._mirror_writer, timeout_seconds=self._timeout_seconds
            )
            await steps.store_outcome(connection, job.id, dead_letter.position, found.outcome, found.detail)
        else:
            await steps.store_outcome(
                connection, job.id, dead_letter.position, "skipped", f"the dead letter is {dead_letter.status}"
            )

    async def _close(self, job: Running, dead_letter: ToReplay) -> None:
        """Discards or restores one dead letter, and stores the outcome in the same transaction. Raises Unavailable,
        OutcomeUnknown, and Conflict if another change came first: the next step repeats it."""
        id_, revision, role = dead_letter.dead_letter_id, dead_letter.revision, Role.OPERATOR.value
        outcome, detail = _CLOSED[job.kind], None
        async with self._postgres.connection() as connection, connection.transaction():
            try:
                if dead_letter.another_cause:
                    outcome, detail = "skipped", "the dead letter has failed again with another cause"
                elif job.kind == "discard":
                    closed = await self._repairs.discard_in(
                        connection, id_, revision=revision, why=job.why or "", actor=job.actor, role=role
                    )
                    detail = f"reverted by change {closed.replaced_by}" if closed.replaced_by else None
                else:
                    await actions.restore(connection, id_, revision=revision, why=job.why, actor=job.actor, role=role)
            except (NotFound, InvalidInput, Conflict) as error:
                if error.error_code == "version_conflict":
                    raise
                # The row of the dead letter is untouched: these errors come before its update.
                changed = isinstance(error, NotFound) or error.error_code.startswith("dead_letter_")
                outcome, detail = "skipped" if changed else "failed", str(error)
            await steps.store_outcome(connection, job.id, dead_letter.position, outcome, detail)

    async def _begin(self, connection: Connection, job: Running, dead_letters: list[ToReplay]) -> list[ToReplay]:
        """Marks the dead letters as replaying and returns those that must be sent."""
        begun = await steps.mark_sending(connection, job.id, [dead_letter.position for dead_letter in dead_letters])
        to_send = []
        for dead_letter in dead_letters:
            if dead_letter.position not in begun:
                await steps.store_outcome(
                    connection, job.id, dead_letter.position, "skipped", f"the dead letter is {dead_letter.status}"
                )
            elif await self._needs_sending(connection, job, dead_letter):
                to_send.append(dead_letter)
        return to_send

    async def _needs_sending(self, connection: Connection, job: Running, dead_letter: ToReplay) -> bool:
        """Returns whether the dead letter must be sent. If its outcome is known already, stores it and returns
        False."""
        written = await steps.is_written(connection, dead_letter.restaurant_id, dead_letter.change_id)
        try:
            found = dry_run.read_change(dead_letter.body)
        except BrokenContract as error:
            if not written:
                return True  # the PostgreSQL writer decides
            # `changes` has this change id from another event, so `settle` would count the dead letter as written.
            await self._failed(connection, job, dead_letter, error)
            return False
        if found is None or (written and dead_letter.lane is not None):
            why = "the body has no change" if found is None else "the change was already written"
            await self._resolved(connection, job, dead_letter, why)
            return False
        return True

    async def _send(self, job: Running, dead_letters: list[ToReplay]) -> None:
        """Sends dead letters and marks them as sent. After an error, the next step repeats those that are not marked.
        Raises NotSent, InDoubt, MirrorUnavailable, MirrorInDoubt."""
        lane_dead_letters = [dead_letter for dead_letter in dead_letters if dead_letter.lane is not None]
        for dead_letter in lane_dead_letters:
            if dead_letter.of_mirror:
                await self._apply_first(dead_letter)
        results = await asyncio.gather(
            *(self._publish(dead_letter) for dead_letter in lane_dead_letters), return_exceptions=True
        )
        positions = [
            dead_letter.position
            for dead_letter, result in zip(lane_dead_letters, results, strict=True)
            if result is None
        ]
        if positions:
            async with self._postgres.connection() as connection:
                await steps.mark_sent(connection, job.id, positions)
        for dead_letter in dead_letters:
            if dead_letter.lane is None:
                await self._apply(job, dead_letter)
        for result in results:
            if result is not None:
                raise result

    async def _apply_first(self, dead_letter: ToReplay) -> None:
        """Applies the change of a dead letter of both sinks to the mirror. This happens before its publish: an outage
        of the mirror then leaves the item unsent, and the next step repeats both. Whether the dead letter fails again
        is decided by its lane."""
        with contextlib.suppress(BrokenContract):
            if (found := dry_run.read_change(dead_letter.body)) is not None:
                await self._mirror_writer.apply_again(found.event)

    async def _publish(self, dead_letter: ToReplay) -> None:
        assert dead_letter.lane is not None
        await self._publisher.publish_to_queue(
            lane_queue(Lane(dead_letter.lane)),
            dead_letter.body,
            headers={REPLAY: dead_letter.dead_letter_id},
            timeout=PUBLISH_TIMEOUT_SECONDS,
        )

    async def _apply(self, job: Running, dead_letter: ToReplay) -> None:
        broken: BrokenContract | None = None
        try:
            if (found := dry_run.read_change(dead_letter.body)) is not None:
                await self._mirror_writer.apply_again(found.event)
        except BrokenContract as error:
            broken = error
        async with self._postgres.connection() as connection:
            if broken is not None:
                await self._failed(connection, job, dead_letter, broken)
            else:
                await self._resolved(connection, job, dead_letter, "applied to the mirror")

    async def _resolved(self, connection: Connection, job: Running, dead_letter: ToReplay, why: str) -> None:
        # Without the transaction, `settle` could run in between and store an outcome without a reason.
        async with connection.transaction():
            await steps.mark_resolved(connection, dead_letter.dead_letter_id)
            await steps.store_outcome(connection, job.id, dead_letter.position, "resolved", why)

    async def _failed(self, connection: Connection, job: Running, dead_letter: ToReplay, error: BrokenContract) -> None:
        failure = classify(error)
        new_fingerprint = fingerprint(failure.reason, failure.error, failure.place)
        async with connection.transaction():
            await steps.mark_failed(
                connection, dead_letter.dead_letter_id, failure.reason, failure.error, failure.place, new_fingerprint
            )
            detail = f"{failure.reason}: {failure.error}"
            await steps.store_outcome(
                connection,
                job.id,
                dead_letter.position,
                "failed",
                detail,
                same_cause=new_fingerprint == dead_letter.fingerprint,
            )
