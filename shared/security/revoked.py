"""Access tokens that are refused before they expire, because their session has ended.

Guarantee: a service refuses the tokens of an ended session at most `_POLL_INTERVAL_SECONDS` plus one query after the
commit that ended it, and calls its listeners then, so that event streams end too. A session ends by a logout, a reused
refresh token (subject `family:<id>`), a new password, another role, or the deactivation of the user (subject
`user:<id>`). Tokens carry counters, so no clock decides whether a token was issued before or after.

While PostgreSQL is unavailable, the last list holds: its sessions stay refused, and sessions that end meanwhile are
added when PostgreSQL answers again. A service that starts without PostgreSQL begins with an empty list. An entry leaves
the list only when every token that it refuses has expired, never because PostgreSQL has lost its row. (The exception:
where one of the two clocks of `TokenClock` is behind, a token of a session that was logged out is accepted again after
its lifetime, until it expires by that clock too.)

The list is bounded: a logout or a reused token stays for the lifetime of an access token and the leeway, other endings
for 31 days, and each needs a sign-in, a refresh token or an admin. An entry costs about 210 bytes.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

import asyncpg
import structlog
from msgspec import Struct

from shared.errors import described
from shared.lifecycle import BackgroundLoop
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.security.token_clock import TokenClock

log = structlog.get_logger(__name__)

_POLL_INTERVAL_SECONDS = 2.0
_OVERLAP = timedelta(seconds=60)
"""A row becomes visible when its transaction commits, which is later than `noted_at`."""
_FIRST_POLL_TIMEOUT_SECONDS = 3.0

# The left join returns the time of the server also if there is no row.
_NEW_ROWS = """
select now() as at, r.subject, r.epoch, extract(epoch from r.until - now())::float8 as seconds_left
from (select) as once
left join revocations r on r.noted_at > coalesce($1::timestamptz, '-infinity') and r.until > now()
"""

Subject = tuple[str, int]
"""(subject, epoch that a token carries for it)"""


class Revocation(Struct, frozen=True):
    subject: str
    epoch: int
    """Tokens of the subject with a smaller epoch are refused."""
    seconds_left: float
    """Time until every token that this refuses has expired."""


class RevokedTokens:
    """The list of revocations in memory. A look-up costs as much as that in a dict."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def refuses(self, subjects: Iterable[Subject]) -> bool:
        """Returns whether the session of a token with these subjects has ended."""
        found = self._found
        if not found:  # each request asks, and mostly no session has ended lately
            return False
        return any((known := found.get(subject)) is not None and known[0] > epoch for subject, epoch in subjects)

    def add(self, revocations: Iterable[Revocation]) -> bool:
        """Adds revocations. Returns whether one of them was new."""
        news = False
        now = time.monotonic()
        for one in revocations:
            epoch, until = self._found.get(one.subject, (0, 0.0))
            news = news or one.epoch > epoch
            self._found[one.subject] = max(epoch, one.epoch), max(until, now + one.seconds_left)
        return news

    def forget_expired(self) -> None:
        now = time.monotonic()
        for subject in [subject for subject, (_, until) in self._found.items() if until < now]:
            del self._found[subject]


class RevocationPoller:
    """Keeps a list of revocations up to date (guarantee: above)."""

    def __init__(
        self,
        postgres: Postgres,
        revoked: RevokedTokens,
        clock: TokenClock,
        *,
        interval_seconds: float = _POLL_INTERVAL_SECONDS,
    ) -> None:
        """`postgres`: a pool of the api role that nothing else uses, so that a busy pool delays no revocation. `clock`
        learns PostgreSQL's time from each poll."""
        self._postgres = postgres
        self._interval_seconds = interval_seconds
        self._last: datetime | None = None
        self._failing = False
        self._clock = clock
        self.revoked = revoked
        self.listeners: list[Callable[[], None]] = []
        """Called after a poll that found a new revocation."""
        self.loop = BackgroundLoop("revocations", self._run)

    async def start(self) -> None:
        """Reads the list, so that a restarted service refuses from its first request on. If PostgreSQL is unavailable,
        the service starts without a list."""
        try:
            async with asyncio.timeout(_FIRST_POLL_TIMEOUT_SECONDS):
                await self.poll()
        except (*UNAVAILABLE, asyncpg.PostgresError) as error:
            self._note_failure(error)
        self.loop.start()

    async def stop(self) -> None:
        await self.loop.stop()
        await self._postgres.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self.poll()
            except (*UNAVAILABLE, asyncpg.PostgresError) as error:
                self._note_failure(error)
            self.loop.turned()

    async def poll(self) -> None:
        """Reads the revocations since the last poll. Raises one of UNAVAILABLE, or PostgresError."""
        async with self._postgres.connection() as connection:
            rows = await connection.fetch(_NEW_ROWS, None if self._last is None else self._last - _OVERLAP)
        at = rows[0]["at"]
        self._clock.compare(at.timestamp())
        # After a failover to a server whose clock is behind, rows may be older than the last poll: read all again.
        self._last = at if self._last is None or at >= self._last else None
        self._failing = False
        news = self.revoked.add(
            Revocation(row["subject"], row["epoch"], row["seconds_left"]) for row in rows if row["subject"] is not None
        )
        self.revoked.forget_expired()
        if news:
            for listener in self.listeners:
                listener()

    def _note_failure(self, error: BaseException) -> None:
        if not self._failing:  # once for each outage, not every two seconds
            log.warning("revocations_not_read", known=len(self.revoked), error=described(error))
        self._failing = True
