"""The open streams, by who holds them: how many each may hold, and when they end.

Guarantees: a stream ends when its token expires, when its session ends (shared/security/revoked.py), and when the same
user opens another stream with the same client id. Its last event is `closing` with the reason. Above a cap the new
stream is refused and no open one is ended for it. A stream counts from `open` until it ends or its client leaves.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator

import structlog
from msgspec import Struct

from services.notifier.cursor import Cursor
from services.notifier.hub import Form, Hub, Subscriber
from services.notifier.interest import Interest
from shared.backoff import jittered
from shared.errors import TooManyRequests, Unauthenticated, Unavailable
from shared.security.tokens import Grant, Identity, Role, Tokens
from shared.settings import Settings

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 10.0
_SHARE_OF_CONNECTIONS = 0.9
"""Streams may take this share of the connections. The rest is for /health and for requests that get a refusal."""


class Caps(Struct, frozen=True):
    of_user: int
    of_guest_session: int
    of_restaurant: int
    in_all: int

    @classmethod
    def of(cls, settings: Settings) -> "Caps":
        return cls(
            settings.streams_per_user,
            settings.streams_per_guest_session,
            settings.streams_per_restaurant,
            max(1, int(settings.client_connections * _SHARE_OF_CONNECTIONS)),
        )


class OpenStream:
    __slots__ = ("_key", "grant", "subscriber", "timer")

    def __init__(self, subscriber: Subscriber, grant: Grant, client_id: str) -> None:
        self.subscriber = subscriber
        self.grant = grant
        self._key = (grant.identity.tenant, grant.identity.user_id, client_id)
        self.timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """(restaurant, user, client id)"""
        return self._key


class OpenStreams:
    def __init__(self, hub: Hub, tokens: Tokens, caps: Caps) -> None:
        self._hub = hub
        self._tokens = tokens
        self._caps = caps
        self._open: dict[tuple[str, str, str], OpenStream] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, grant: Grant, client_id: str, interest: Interest, form: Form, cursor: Cursor | None) -> OpenStream:
        """Subscribes the holder of a token. Raises Unauthenticated if the token has expired or its session has ended,
        TooManyRequests above a cap, and Unavailable if this instance has no room."""
        self._tokens.check_session(grant)
        seconds_left = self._tokens.seconds_left(grant)
        if seconds_left <= 0:
            raise Unauthenticated("the token has expired", code="token_expired")
        if (older := self._open.get((grant.identity.tenant, grant.identity.user_id, client_id))) is not None:
            self._end(older, "replaced")
        self._check_caps(grant.identity)
        stream = OpenStream(self._hub.subscribe(interest, form, cursor), grant, client_id)
        stream.timer = asyncio.get_running_loop().call_later(seconds_left, self._end, stream, "expired")
        self._open[stream.key] = stream
        self._counts.update(_counted(grant.identity))
        return stream

    def leave(self, stream: OpenStream) -> None:
        """Removes a stream whose client has left, or that has ended. May be called twice."""
        if self._open.get(stream.key) is stream:
            del self._open[stream.key]
            for counted in _counted(stream.grant.identity):
                self._counts[counted] -= 1
                if not self._counts[counted]:
                    del self._counts[counted]
        if stream.timer is not None:
            stream.timer.cancel()
        self._hub.unsubscribe(stream.subscriber)

    def end_revoked(self) -> None:
        """Ends the streams whose session has ended."""
        revoked = self._tokens.revoked
        for stream in [stream for stream in self._open.values() if revoked.refuses(stream.grant.subjects)]:
            self._end(stream, "revoked")

    def _end(self, stream: OpenStream, reason: str) -> None:
        log.info("stream_ended", reason=reason, restaurant_id=stream.grant.identity.tenant)
        # A client whose session was revoked does not get the events that wait for it either.
        self._hub.end(stream.subscriber, reason, discard=reason == "revoked")
        self.leave(stream)

    def _check_caps(self, identity: Identity) -> None:
        if len(self._open) >= self._caps.in_all:
            raise Unavailable(
                "this instance has no room for a further stream",
                retry_after=jittered(_RETRY_SECONDS),
                code="too_many_streams",
            )
        limits = {
            "user": self._caps.of_user,
            "session": self._caps.of_guest_session,
            "restaurant": self._caps.of_restaurant,
        }
        for kind, holder in _counted(identity):
            if self._counts[kind, holder] >= limits[kind]:
                raise TooManyRequests(
                    f"this {kind} has {limits[kind]} open streams, and may not have more",
                    retry_after=jittered(_RETRY_SECONDS),
                    limit=limits[kind],
                )


def _counted(identity: Identity) -> Iterator[tuple[str, str]]:
    """Yields (kind, holder) of each cap for which a stream of this caller counts."""
    yield "restaurant", identity.tenant
    if identity.role is Role.CUSTOMER:
        yield "session", f"{identity.tenant}/{identity.session_id}"
    else:
        yield "user", f"{identity.tenant}/{identity.user_id}"
