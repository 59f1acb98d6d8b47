"""The event contract: the format of a change on the wire.

A change is a CloudEvents 1.0 event in JSON. It travels in a JSON batch (`application/cloudevents-batch+json`), which is
an array even for one change. It carries the whole state of its entity after the change, so that changes may be applied
in any order and any number of times: the guard (`Head`) decides which state wins.

Decoding ignores unknown attributes and checks types strictly. An unreadable change raises `BrokenContract` with the
reason that its dead letter shows.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct, field

CONTENT_TYPE = "application/cloudevents-batch+json"
SPECVERSION = "1.0"
MAX_BATCH_CHANGES = 256
MAX_EVENT_BYTES = 8_000_000
"""The maximum size of an encoded change. RabbitMQ 4 refuses messages above 16 MiB, so no change of that size may be
accepted."""
MAX_DATA_BYTES = MAX_EVENT_BYTES - 10_000
"""The maximum size of `before` and `after` together. The remaining 10,000 bytes are for the other attributes."""

SENTENCE = "sentence"
"""The key of `Meta.extra` for a sentence that says in words what the pattern of a text requires."""

# Ids are lower-case canonical UUIDs as text. Their text order equals their byte order, so that Python, Lua and
# PostgreSQL agree on which of two change ids is larger.
Id = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        extra={SENTENCE: "must be a UUID in lower case"},
    ),
]

# PostgreSQL cannot store NUL in text. The contract refuses it, so that a change with NUL never reaches PostgreSQL.
NO_NUL = "^[^\\x00]*$"
NO_NUL_SENTENCE = "NUL characters cannot be stored"
Label = Annotated[str, Meta(max_length=200, pattern=NO_NUL, extra={SENTENCE: NO_NUL_SENTENCE})]
Text = Annotated[str, Meta(max_length=2_000, pattern=NO_NUL, extra={SENTENCE: NO_NUL_SENTENCE})]
Time = Annotated[datetime, Meta(tz=True)]
Version = Annotated[int, Meta(ge=1, lt=2**31)]
# Minor units of the restaurant's currency. The bounds keep every sum far below the limit of 64 bits.
Amount = Annotated[int, Meta(ge=-(10**12), le=10**12, examples=[1960])]
Money = Annotated[int, Meta(ge=0, le=10**12, examples=[1960])]


class SyncState(StrEnum):
    """The progress of an entity's head towards PostgreSQL."""

    PENDING = "pending"
    SYNCED = "synced"
    FAILED = "failed"
    """The head is pending, and the last attempt to write it failed."""
    CONFLICT = "conflict"
    """The entity has a fork that an operator must decide."""


class Lane(StrEnum):
    """One of three queues with different priorities, so that a bulk import never delays an order."""

    CRITICAL = "critical"
    NORMAL = "normal"
    BACKGROUND = "background"

    @property
    def priority(self) -> int:
        return _PRIORITY[self]


_PRIORITY = {Lane.CRITICAL: 10, Lane.NORMAL: 5, Lane.BACKGROUND: 1}


class BrokenContract(ValueError):
    """A change breaks the contract, so no retry can write it. Dead letters are grouped by `reason`, so its values are
    stable. The message gives the details."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Head(Struct, frozen=True, order=True):
    """The version and change id of a state, which the guard compares: of two states of one entity, the one with the
    larger (version, change id) wins, in every store."""

    version: int
    change_id: str


class ChangeData(Struct, frozen=True):
    after: Raw
    """The whole entity after the change."""
    before: Raw = field(default_factory=lambda: Raw(b"{}"))  # a plain default would break the JSON schema
    """The old values of the fields that changed; empty for a creation."""


class Change(Struct, frozen=True, kw_only=True):
    id: Id
    source: Label
    type: Label
    subject: Label
    time: Time
    restaurantid: Id
    priority: Annotated[int, Meta(ge=1, le=10)]
    entityversion: Version
    data: ChangeData
    basechangeid: Id | None = None
    traceparent: Label | None = None
    actor: Label | None = None
    """Id of the user or of the guest's session that requested the change."""
    datacontenttype: str = "application/json"
    specversion: str = SPECVERSION

    @property
    def entity(self) -> str:
        return self.subject.partition("/")[0]

    @property
    def entity_id(self) -> str:
        return self.subject.partition("/")[2]

    @property
    def head(self) -> Head:
        return Head(self.entityversion, self.id)


class PartialEvent(Struct):
    """The attributes of an event that may break the contract. Each attribute contains the JSON value from the event, of
    any type, or None if it is missing. Decoding fails only if the event is not a JSON object."""

    id: Any = None
    restaurantid: Any = None
    subject: Any = None
    entityversion: Any = None
    type: Any = None
    source: Any = None
    time: Any = None
    traceparent: Any = None
    data: Raw = Raw()


class Outline(Struct, frozen=True):
    """The attributes that identify a change. They are enough to check whether a store has the change. Texts are not
    validated."""

    id: str
    subject: str
    time: Time
    restaurantid: str
    entityversion: Version
    traceparent: str | None = None


_encoder = msgspec.json.Encoder()
_changes = msgspec.json.Decoder(Change)
_outlines = msgspec.json.Decoder(Outline)
_raws = msgspec.json.Decoder(list[Raw])
_builtins = msgspec.json.Decoder()
_TRACEPARENT = re.compile(rb'"traceparent":"([0-9a-f-]{55})"')
_NO_TENANT = (
    "Object missing required field `restaurantid`",
    "Expected `str`, got `null` - at `$.restaurantid`",
)
_NUL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def encode(value: Any) -> bytes:
    return _encoder.encode(value)


def encode_batch(changes: Iterable[bytes]) -> bytes:
    """Returns a message body that contains these encoded changes."""
    return b"[" + b",".join(changes) + b"]"


def split_batch(body: bytes) -> list[bytes]:
    """Returns the encoded events of a message. It does not decode them, so that a poison event does not affect the
    others. Raises BrokenContract."""
    try:
        return [bytes(raw) for raw in _raws.decode(body)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenContract("undecodable", f"not a CloudEvents batch: {error}") from error


def decode_change(event: bytes) -> Change:
    """Decodes and validates an event. Raises BrokenContract."""
    if len(event) > MAX_EVENT_BYTES:
        raise BrokenContract("too_large", f"{len(event)} bytes are more than {MAX_EVENT_BYTES}")
    try:
        event.decode()  # unknown attributes are kept verbatim, so they must be valid UTF-8 too
        change = _changes.decode(event)
        escaped = b"\\u" in event
        if escaped:
            _builtins.decode(event)  # raises an error for half of a surrogate pair
    except msgspec.ValidationError as error:
        missing = str(error) in _NO_TENANT
        raise BrokenContract("missing_tenant" if missing else "contract_broken", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenContract("undecodable", str(error)) from error
    if change.specversion != SPECVERSION:
        raise BrokenContract(
            "unsupported_specversion", f"the specversion is {change.specversion[:20]!r}, not {SPECVERSION}"
        )
    if escaped and _NUL_ESCAPE.search(event):
        # PostgreSQL's json type accepts an escaped NUL, but cannot extract the field later.
        raise BrokenContract("contract_broken", "a text contains NUL")
    if not in_range(change.time):
        raise BrokenContract("contract_broken", "time is out of range")
    return change


def outline(event: bytes) -> Outline | None:
    """Returns the outline of an event, or None if it is unreadable; `decode_change` gives the reason."""
    try:
        return _outlines.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def in_range(at: datetime) -> bool:
    """Returns whether the year is from 1970 to 2199. Times near the ends of the calendar overflow when they are
    converted to UTC."""
    return 1970 <= at.year < 2200


def traceparent_in(event: bytes) -> str | None:
    """Returns the traceparent of an event that our code encoded, without decoding the event."""
    found = _TRACEPARENT.search(event)
    return found[1].decode() if found else None


def changed_fields(before: Struct | None, after: Struct) -> dict[str, Any]:
    """Returns the old values of the top-level fields in which two states differ."""
    if before is None:
        return {}
    old: Mapping[str, Any] = msgspec.to_builtins(before)
    new: Mapping[str, Any] = msgspec.to_builtins(after)
    return {name: value for name, value in old.items() if new.get(name) != value}


def now() -> datetime:
    return datetime.now(UTC)
