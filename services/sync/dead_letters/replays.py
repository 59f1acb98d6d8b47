"""Replays of dead letters, and dry runs: jobs that operators make and a worker runs.

Guarantee: each letter of a job is sent at least once, or skipped because it is not open any more, and what became of it
is known by what happened: it is written (`changes` has it), or it died again. Sending twice is harmless. A job goes on
in another worker when its own dies or stops, from where it stood.

    canary   one letter, then ten, then the rest, each waiting for the outcomes of those before
    stop     by itself, when a letter dies of the same again, or a canary dies of anything
    rate     so many letters a second at most
    cancel   nothing more is sent; what was sent takes its course

A letter goes to the queue of its lane alone, through the default exchange: through `ticketrail.changes` the log would
have it twice. It carries no attempt number, so that it has the whole ladder before it. A letter of the mirror writer is
applied to the mirror directly.

While a backend is away jobs wait for it, with jittered back-off. At shutdown they are let go of at once.
"""

import asyncio
import time
from uuid import uuid4

import structlog

from services.sync.dead_letters import dry_run
from services.sync.dead_letters import replay_steps as steps
from services.sync.dead_letters.replay_steps import Progress, Running, ToReplay
from services.sync.failures.classification import classify, describe, fingerprint
from services.sync.failures.retry_ladder import REPLAY, publish_timeout_seconds
from services.sync.mirror.mirror_writer import MirrorWriter
from shared.backoff import backoff
from shared.entities.contract import BrokenContract, Lane
from shared.lifecycle import BackgroundLoop, end_tasks, vital_task
from shared.messaging.publisher import Publisher
from shared.messaging.topology import lane_queue
from shared.postgres.pool import Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_CANARIES = (1, 11)
_AT_ONCE = 10  # letters in one step; bodies may be of many megabytes
_MOST_JOBS = 3
_POLL = 0.5
_BREATH = 0.05
_SILENT = 15.0
_SLACK = 60.0
_LET_GO_WITHIN = 2.0


class Pace:
    """So many letters a second at most, and no burst for the time in which none was to be sent."""

    def __init__(self, per_second: float, *, at: float) -> None:
        self._per_second = per_second
        self._next = at

    def take(self, wanted: int, at: float) -> int:
        """How many may go now."""
        if at < self._next or wanted <= 0:
            return 0
        self._next = max(self._next, at - 0.1)
        due = 1 + int((at - self._next) * self._per_second)
        taken = min(wanted, due)
        self._next += taken / self._per_second
        return taken


def allowed(job: Running, progress: Progress) -> int:
    """How many of the job's letters may have been sent by now."""
    if job.canary and job.kind == "replay":
        for canaries in _CANARIES:
            if progress.settled < min(canaries, job.total):
                return min(canaries, job.total)
    return job.total


def verdict(job: Running, progress: Progress, *, cancel: bool) -> tuple[str, str] | None:
    """(state, why) of a job that has come to its end."""
    if job.kind == "replay":
        if progress.again:
            return "stopped", f"{progress.again} died of the same again, after {progress.begun} of {job.total}"
        if job.canary and progress.failed and progress.begun <= _CANARIES[-1]:
            return "stopped", f"{progress.failed} of the first {progress.begun} died again, of something else"
    if progress.settled >= progress.letters and job.kind == "dry_run":
        return "done", f"{job.total} tried, nothing was written"
    if progress.settled >= progress.letters:
        return "done", f"{job.total - progress.failed} of {job.total} went through"
    if cancel:
        return "cancelled", f"cancelled after {progress.begun} of {job.total}"
    return None


class Replays:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        mirror_writer: MirrorWriter,
        publisher: Publisher,
        *,
        poll: float = _POLL,
        silent_seconds: float = _SILENT,
        slack_seconds: float = _SLACK,
    ) -> None:
        """`postgres` as the writer role. `silent_seconds`: after which a job is taken over; `slack_seconds`: what a
        change may be on its way beside the ladder."""
        self._postgres = postgres
        self._mirror_writer = mirror_writer
        self._publisher = publisher
        self._poll = poll
        self._silent = silent_seconds
        self._lost = sum(settings.retry_steps_ms) / 1000 + slack_seconds
        self._patience = settings.database_timeout_seconds * 0.7
        self._worker = str(uuid4())
        self.loop = BackgroundLoop("replays", self._run)
        self._jobs: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.loop.start()

    async def stop(self) -> None:
        if not self.loop.running and not self._jobs:
            return
        await self.loop.stop()
        await end_tasks(*self._jobs)
        try:
            async with asyncio.timeout(_LET_GO_WITHIN), self._postgres.connection() as connection:
                await steps.let_go(connection, self._worker)
        except Exception as error:  # noqa: BLE001  (then another takes them over a little later)
            log.info("replays_not_let_go", error=describe(error))

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    await steps.settle(connection, lost_seconds=self._lost)
                    job = None
                    if len(self._jobs) < _MOST_JOBS:
                        job = await steps.claim(connection, self._worker, silent_seconds=self._silent)
                failures = 0
            except Exception as error:  # noqa: BLE001  (PostgreSQL is away, or two settled at once: at the next turn)
                failures += 1
                log.debug("replays_wait", error=describe(error))
                await asyncio.sleep(backoff(failures))
                continue
            if job is not None:
                log.info("replay_job_taken", job=job.id, kind=job.kind, letters=job.total)
                working = vital_task(self._work(job), name=f"replay-{job.id}")
                self._jobs.add(working)
                working.add_done_callback(self._jobs.discard)
            self.loop.turned()
            await asyncio.sleep(self._poll)

    async def _work(self, job: Running) -> None:
        pace, failures = Pace(job.per_second, at=time.monotonic()), 0
        while True:
            try:
                if await self._step(job, pace):
                    return
                failures = 0
            except Exception as error:  # noqa: BLE001  (a backend is away, or a bug: the job stays where it is)
                failures += 1
                log.warning("replay_waits", job=job.id, error=describe(error), attempt=failures)
                await asyncio.sleep(backoff(failures))

    async def _step(self, job: Running, pace: Pace) -> bool:
        """True: the job is over, or another worker's."""
        async with self._postgres.connection() as connection:
            cancel = await steps.beat(connection, job.id, self._worker)
            if cancel is None:
                log.warning("replay_job_lost", job=job.id)
                return True
            progress = await steps.progress(connection, job.id)
            if (over := verdict(job, progress, cancel=cancel)) is not None:
                state, why = over
                await steps.end(connection, job.id, self._worker, state, why)
                log.info("replay_job_ended", job=job.id, state=state, why=why)
                return True
            wanted = min(_AT_ONCE, allowed(job, progress) - progress.begun)
            free = pace.take(wanted, time.monotonic())
            letters = await steps.following(connection, job.id, free) if free else []
            if job.kind == "dry_run":
                for letter in letters:
                    await self._foresee(connection, job, letter)
            elif letters:
                letters = await self._begin(connection, job, letters)
        # Not while holding a connection: the broker may be away.
        if letters and job.kind == "replay":
            await self._send(job, letters)
        elif not letters:
            await asyncio.sleep(_BREATH if wanted > 0 else self._poll)
        return False

    async def _foresee(self, connection: Connection, job: Running, letter: ToReplay) -> None:
        if letter.status == "open":
            found = await dry_run.forecast(connection, letter, self._mirror_writer, patience=self._patience)
            await steps.note(connection, job.id, letter.position, found.outcome, found.detail)
        else:
            await steps.note(connection, job.id, letter.position, "skipped", f"it is {letter.status}")

    async def _begin(self, connection: Connection, job: Running, letters: list[ToReplay]) -> list[ToReplay]:
        """Those that are to be sent."""
        begun = await steps.begin(connection, job.id, [letter.position for letter in letters])
        wanted = []
        for letter in letters:
            if letter.position not in begun:
                await steps.note(connection, job.id, letter.position, "skipped", f"it is {letter.status}")
            elif await self._needs_sending(connection, job, letter):
                wanted.append(letter)
        return wanted

    async def _needs_sending(self, connection: Connection, job: Running, letter: ToReplay) -> bool:
        """False: what would come of it is known, and noted."""
        written = await steps.is_written(connection, letter.restaurant_id, letter.change_id)
        try:
            found = dry_run.read(letter.body)
        except BrokenContract as error:
            if not written:
                return True  # whatever this version makes of it: the lane has the word
            # `changes` has its id from another event: it would be taken for written.
            await self._died(connection, job, letter, error)
            return False
        if found is None or (written and letter.lane is not None):
            why = "a signal: it says nothing any more" if found is None else "it was written already"
            await self._resolved(connection, job, letter, why)
            return False
        return True

    async def _send(self, job: Running, letters: list[ToReplay]) -> None:
        """Raises NotSent, InDoubt, MirrorUnavailable, MirrorInDoubt: what is not noted as sent is sent at the next
        step."""
        of_lanes = [letter for letter in letters if letter.lane is not None]
        results = await asyncio.gather(*(self._publish(letter) for letter in of_lanes), return_exceptions=True)
        positions = [one.position for one, result in zip(of_lanes, results, strict=True) if result is None]
        if positions:
            async with self._postgres.connection() as connection:
                await steps.sent(connection, job.id, positions)
        for letter in letters:
            if letter.lane is None:
                await self._apply(job, letter)
        for result in results:
            if result is not None:
                raise result

    async def _publish(self, letter: ToReplay) -> None:
        assert letter.lane is not None
        await self._publisher.publish_to_queue(
            lane_queue(Lane(letter.lane)),
            letter.body,
            headers={REPLAY: letter.letter_id},
            timeout=publish_timeout_seconds(len(letter.body)),
        )

    async def _apply(self, job: Running, letter: ToReplay) -> None:
        broken: BrokenContract | None = None
        try:
            if (found := dry_run.read(letter.body)) is not None:
                await self._mirror_writer.apply_again(found.event)
        except BrokenContract as error:
            broken = error
        async with self._postgres.connection() as connection:
            if broken is not None:
                await self._died(connection, job, letter, broken)
            else:
                await self._resolved(connection, job, letter, "applied to the mirror")

    async def _resolved(self, connection: Connection, job: Running, letter: ToReplay, why: str) -> None:
        async with connection.transaction():  # or `settle` comes in between, and does not know why
            await steps.resolved(connection, letter.letter_id)
            await steps.note(connection, job.id, letter.position, "resolved", why)

    async def _died(self, connection: Connection, job: Running, letter: ToReplay, error: BrokenContract) -> None:
        failure = classify(error)
        anew = fingerprint(failure.reason, failure.error, failure.place)
        async with connection.transaction():
            await steps.failed(connection, letter.letter_id, failure.reason, failure.error, failure.place, anew)
            detail = f"{failure.reason}: {failure.error}"
            await steps.note(connection, job.id, letter.position, "failed", detail, again=anew == letter.fingerprint)
