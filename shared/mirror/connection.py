"""One connection to Redis for all callers of a process: commands that wait at the same moment go in one pipeline.

With several hosts (a primary and its replicas) this module connects to the current primary. When the old primary comes
back after a failover, two hosts may report that they are the primary. The module then prefers a warm host, and among
warm hosts the one that has applied the most of the log.

A call raises

    MirrorUnavailable  nothing was done: no connection, the breaker is open, or the server takes no writes
    MirrorInDoubt      the command got no reply: the server may have executed it, or may execute it when it wakes. Any
                       other error of the server counts as in doubt too, because a script that fails keeps what it has
                       written

Each connection begins with scripts/probe.lua. A server that cannot be a mirror raises MirrorMisconfigured, which says
what to set.

After a failure the breaker opens for a growing, jittered time, in which every call raises MirrorUnavailable at once.
The first call after that time starts a probe and waits for it for at most `_PROBE_TIMEOUT_SECONDS`. The other calls
raise MirrorUnavailable until the probe returns. Therefore a dead or frozen server delays few calls, and only for that
moment. Nothing is retried here, because only the caller knows what it may send twice.
"""

import asyncio
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import structlog
from hiredis import pack_command
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from shared.backoff import backoff
from shared.host_urls import host_urls
from shared.mirror.keys import LOG, WARM

log = structlog.get_logger(__name__)

Argument = str | bytes | int | float
_MAX_PIPELINE_COMMANDS = 512
_SCRIPT_PARTS = ("identity", "stock", "order_number", "position")
# A server that is available again answers a probe in a few milliseconds.
_PROBE_TIMEOUT_SECONDS = 0.1


def _with_parts(text: str, texts: dict[str, str]) -> str:
    """Returns the script, preceded by the parts that its first line names: `-- with stock.lua, order_number.lua`."""
    first = text.partition("\n")[0]
    return "\n".join([*(texts[part] for part in _SCRIPT_PARTS if f"{part}.lua" in first), text])


class MirrorUnavailable(Exception):
    """Nothing was done: the command was not sent, or the server refused it."""


class MirrorInDoubt(Exception):
    """The command was sent and got no reply, so the server may have executed it."""


class MirrorMisconfigured(MirrorUnavailable):
    """The server cannot be a mirror: it is in cluster mode, may evict data, or refuses a command that the mirror needs.
    A service refuses to start with it."""


class _Call:
    __slots__ = ("command", "reply")

    def __init__(self, command: tuple[Argument, ...], reply: "asyncio.Future[Any]") -> None:
        self.command = command
        self.reply = reply


class MirrorConnection:
    def __init__(self, url: str, *, timeout: float, max_pipeline_commands: int = _MAX_PIPELINE_COMMANDS) -> None:
        """`url`: the URL of one host, or the URLs of several hosts separated by commas. `timeout`: the seconds that a
        call may take. `max_pipeline_commands`: the most commands that are sent before their replies are read."""
        self._hosts = [dict(parse_url(one)) for one in host_urls(url)]
        self._options = {
            # With a socket timeout, redis-py would start a task for every write and a timer for every reply. Together
            # they would take a tenth of the time of an order. `_drain` puts one timeout around the whole round trip
            # instead.
            "socket_timeout": None,
            "socket_connect_timeout": timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
        }
        folder = resources.files("shared.mirror") / "scripts"
        texts = {
            path.name.removesuffix(".lua"): path.read_text() for path in folder.iterdir() if path.name.endswith(".lua")
        }
        self._scripts = {name: _with_parts(text, texts) for name, text in texts.items() if name not in _SCRIPT_PARTS}
        self._probe_script = self._scripts.pop("probe")
        self._timeout = timeout
        self._max_pipeline_commands = max_pipeline_commands
        self._shas: dict[str, str] = {}
        self._must_reconnect = False
        """True if the next round trip needs a new connection."""
        self._connection: Any = None
        self._waiting: list[_Call] = []
        self._task: asyncio.Task[Any] | None = None
        self._failures = 0
        self._closed_until = 0.0
        self._clock: float | None = None
        """The number of seconds by which the server's clock is ahead of our monotonic clock."""

    def server_ms(self, within: float) -> int | None:
        """Returns the server's time `within` seconds from now, in Unix milliseconds, or None before the first
        connection."""
        return None if self._clock is None else int((time.monotonic() + self._clock + within) * 1000)

    async def clock_skew_seconds(self) -> float:
        """Returns the number of seconds by which the server's clock is ahead of this host's. Raises like `call`."""
        seconds, micros = await self.call("TIME")
        return int(seconds) + int(micros) / 1e6 - time.time()

    def reconnect(self) -> None:
        """Makes the next call open a new connection, because the server's clock has jumped."""
        self._must_reconnect = True

    @property
    def available(self) -> bool:
        """False while the breaker is open."""
        return time.monotonic() >= self._closed_until

    @property
    def connected(self) -> bool:
        """True while there is a connection that the server has not closed."""
        # redis-py has no public property that notices the end of the stream.
        return self._connection is not None and not self._connection._reader.at_eof()  # noqa: SLF001

    @property
    def down(self) -> bool:
        """True after several failed attempts in a row. A short wait will then not help."""
        return self._failures >= 3

    async def call(self, *command: Argument) -> Any:
        """Sends one command and returns its reply as bytes, lists and integers. Raises MirrorUnavailable and
        MirrorInDoubt."""
        if not self.available:
            raise MirrorUnavailable("the mirror did not answer a moment ago")
        if self._failures:
            await self._probed()
        call = _Call(command, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name="mirror")
        return await call.reply

    async def _probed(self) -> None:
        """Probes the server. Returns if it answers again, and raises MirrorUnavailable if it does not."""
        if self._task is None or self._task.done():
            self._task = probe = asyncio.create_task(self._probe(), name="mirror-probe")
            await asyncio.wait({probe}, timeout=_PROBE_TIMEOUT_SECONDS)
            if probe.done() and not probe.cancelled():
                if (unavailable := probe.result()) is not None:
                    raise unavailable
                return
        raise MirrorUnavailable("the mirror did not answer; a probe is under way")

    async def _probe(self) -> MirrorUnavailable | None:
        """Connects. Returns its error instead of raising it, because the caller may no longer wait for this task."""
        try:
            await self._connect_in_time()
        except MirrorUnavailable as unavailable:
            return unavailable
        self._failures = 0
        return None

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Runs `scripts/<name>.lua` and returns its reply. Raises like `call`."""
        try:
            return await self.call(f"\0{name}", len(keys), *keys, *arguments)
        except NoScriptError:
            # The server has lost its scripts (SCRIPT FLUSH). Nothing was executed, so the call may be sent again. Only
            # `_drain` replaces the connection: dropping it here could break a round trip of other calls.
            self._must_reconnect = True
            return await self.call(f"\0{name}", len(keys), *keys, *arguments)

    async def check(self) -> None:
        """Connects. Raises MirrorMisconfigured if the server cannot be a mirror, and MirrorUnavailable."""
        await self.call("PING")

    async def close(self) -> None:
        """Closes the connection. Calls that still wait raise MirrorUnavailable. May be called twice."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._fail(self._take(), MirrorUnavailable("closed"))
        self._drop()

    # -- one task at a time sends the waiting calls -----------------------------------------------------------

    async def _drain(self) -> None:
        while self._waiting:
            # A call that is sent on a connection which the server has closed would needlessly be in doubt.
            if self._must_reconnect or not self.connected:
                self._drop()
            try:
                if self._connection is None:
                    await self._connect_in_time()
            except MirrorUnavailable as unavailable:
                self._fail(self._take(), unavailable)
                return
            calls = self._take(self._max_pipeline_commands)
            try:
                # The time limit is the timeout of one call, plus 1/64 of it for each call in the pipeline.
                async with asyncio.timeout(self._timeout * (1 + len(calls) / 64)):
                    healthy = await self._round_trip(calls)
            except Exception as error:  # noqa: BLE001  (uvloop raises RuntimeError for a reset connection)
                self._trip()
                log.warning("mirror_lost", error=str(error) or type(error).__name__, calls=len(calls))
                self._fail(calls, MirrorInDoubt(str(error)))
                self._fail(self._take(), MirrorUnavailable(str(error)))
                return
            except asyncio.CancelledError:
                self._fail(calls, MirrorInDoubt("the connection was closed"))
                raise
            if not healthy:
                self._trip()
                self._fail(self._take(), MirrorUnavailable("the server refused every call"))
                return
            self._failures = 0

    async def _round_trip(self, calls: list[_Call]) -> bool:
        """Sends the calls and settles their replies. Returns False if the server replied to none of them without an
        unknown error. An unknown error beside other replies is the fault of its own keys."""
        # hiredis packs the commands: redis-py's packing in Python took a tenth of the time of an order.
        packed = b"".join([pack_command(self._command(call.command)) for call in calls])
        await self._connection.send_packed_command(packed, check_health=False)
        unknown = 0
        for call in calls:
            try:
                # `timeout=` is not passed here, because redis-py would return None at a timeout and keep the
                # connection, so every later reply would go to the wrong caller. `_drain` drops the connection after its
                # own timeout.
                reply = await self._connection.read_response()
            except ResponseError as error:
                if isinstance(error, ReadOnlyError):
                    self._must_reconnect = True  # the primary became a replica, so another host is the primary now
                failure: Exception = error
                if _takes_no_writes(error):
                    failure = MirrorUnavailable(str(error))
                elif not isinstance(error, NoScriptError):
                    unknown += 1
                    log.error("mirror_refused", error=str(error), command=str(call.command[0]).strip("\0"))
                    failure = MirrorInDoubt(str(error))
                if not call.reply.done():
                    call.reply.set_exception(failure)
                continue
            if not call.reply.done():
                call.reply.set_result(reply)
        return unknown < len(calls)

    def _command(self, command: tuple[Argument, ...]) -> Any:
        name = command[0]
        if isinstance(name, str) and name.startswith("\0"):
            return ("EVALSHA", self._shas[name[1:]], *command[1:])
        return command

    async def _connect_in_time(self) -> None:
        """Connects. Opens the breaker and raises MirrorUnavailable if that fails."""
        try:
            async with asyncio.timeout(3 * self._timeout):
                await self._connect()
        except Exception as error:
            self._trip()
            log.warning("mirror_unavailable", error=str(error) or type(error).__name__)
            if isinstance(error, MirrorUnavailable):
                raise
            raise MirrorUnavailable(str(error)) from error

    async def _connect(self) -> None:
        connection = await self._connect_to_primary()
        try:
            # The clock is read before the request, so that a slow reply makes the deadlines of claims too late rather
            # than too early.
            asked_at = time.monotonic()
            seconds, micros = await _ask(connection, "TIME")
            self._clock = int(seconds) + int(micros) / 1e6 - asked_at
            for name, text in self._scripts.items():
                self._shas[name] = (await _ask(connection, "SCRIPT", "LOAD", text)).decode()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection, self._must_reconnect = connection, False

    async def _connect_to_primary(self) -> Any:
        found = await asyncio.gather(*(self._examine(host) for host in self._hosts), return_exceptions=True)
        primaries = [answer for answer in found if not isinstance(answer, BaseException)]
        # `max` returns the first one of several equal primaries.
        best = max(primaries, key=lambda primary: primary[0], default=None)
        for primary in primaries:
            if primary is not best:
                await primary[1].disconnect(nowait=True)
        if best is None:
            errors = [answer for answer in found if isinstance(answer, BaseException)]
            raise min(errors, key=_precedence)
        return best[1]

    async def _examine(self, host: dict[str, Any]) -> tuple[tuple[bool, int], Any]:
        """Connects to a host. Returns ((whether the host is warm, its offset in the log), the connection). Raises
        MirrorUnavailable for a replica, and MirrorMisconfigured."""
        options = {**host, **self._options}
        connection = options.pop("connection_class", Connection)(**options)
        try:
            async with asyncio.timeout(2 * self._timeout):
                await connection.connect()
                found = await _ask(connection, "EVAL", self._probe_script, 0, WARM, LOG)
            return _usable(found, f"Redis at {host.get('host')}:{host.get('port', 6379)}"), connection
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    def _take(self, limit: int | None = None) -> list[_Call]:
        taken, self._waiting = self._waiting[:limit], self._waiting[len(self._waiting[:limit]) :]
        return taken

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        for call in calls:
            if not call.reply.done():
                call.reply.set_exception(error)

    def _trip(self) -> None:
        self._failures += 1
        self._closed_until = time.monotonic() + backoff(self._failures)
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # `nowait` closes the transport without waiting for the server, which may be frozen.
            self._closing = asyncio.ensure_future(connection.disconnect(nowait=True))


async def _ask(connection: Any, name: str, *arguments: Argument) -> Any:
    await connection.send_command(name, *arguments)
    try:
        return await connection.read_response()
    except ResponseError as error:
        if isinstance(error, NoPermissionError) or "unknown command" in str(error).lower():
            raise MirrorMisconfigured(
                f"Redis refuses {name} ({error}), which the mirror needs: allow it to the user of TICKETRAIL_REDIS_URL"
            ) from error
        raise


def _usable(probed: list[Any], server: str) -> tuple[bool, int]:
    """Returns (whether the server is warm, its offset in the log) from the reply of probe.lua. Raises MirrorUnavailable
    and MirrorMisconfigured."""
    kind, *details = probed
    match kind, details:
        case b"primary", [warm, offset]:
            return bool(warm), int(offset)
        case b"replica", _:
            raise MirrorUnavailable(f"{server} is a replica, which takes no writes")
        case b"cluster", _:
            raise MirrorMisconfigured(
                f"{server} runs in cluster mode, which refuses scripts with keys of several slots: use one primary "
                "with replicas and set `cluster-enabled no`"
            )
        case b"evicts", [policy]:
            raise MirrorMisconfigured(
                f"{server} has the maxmemory-policy {policy.decode()} and would evict claims: set `maxmemory-policy "
                "noeviction`"
            )
        case _:
            raise MirrorMisconfigured(
                f"{server} refuses INFO in scripts ({details[0].decode()}), which compare its run_id and its "
                "master_replid: remove `rename-command INFO`, or allow INFO to the user of TICKETRAIL_REDIS_URL"
            )


def _precedence(error: BaseException) -> int:
    """Of several hosts that cannot be used, report first what an operator must change, and last that a host is a
    replica."""
    return 0 if isinstance(error, MirrorMisconfigured) else 2 if isinstance(error, MirrorUnavailable) else 1


_REFUSALS = ("MISCONF", "NOREPLICAS", "BUSY")
# redis-py has classes for these, and removes their codes from the texts.
_REFUSAL_ERRORS = (OutOfMemoryError, ReadOnlyError, MasterDownError, NoPermissionError)


def _takes_no_writes(error: ResponseError) -> bool:
    """Returns whether the server is full, is a replica, refuses its user or cannot persist. It refuses a script at its
    first write, so nothing was done."""
    return isinstance(error, _REFUSAL_ERRORS) or str(error).startswith(_REFUSALS)
