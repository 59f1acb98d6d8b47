"""Signals: small events of the rail itself, which travel the same ways as changes and change nothing.

A *heartbeat* goes through every lane and the log every few seconds. Each sink notes it: it proves the bindings, gives
the sync lag and carries the epoch of the log. A *mark* goes into the log alone: a reader that meets its own mark has
read everything that stood before it.
"""

from datetime import datetime

import msgspec
from msgspec import Struct

from shared.entities.contract import BrokenContract, Id, encode, encode_batch

HEARTBEAT = "ticketrail.heartbeat.v1"
MARK = "ticketrail.mark.v1"


class Signal(Struct, frozen=True, kw_only=True):
    id: Id
    type: str
    time: datetime
    lane: str = ""
    """The lane that a heartbeat went through; empty for a mark."""
    epoch: str = ""
    """Of the log: made anew with the stream, so that a cursor into an older one is known as such."""
    source: str = "sync"
    specversion: str = "1.0"


_signals = msgspec.json.Decoder(Signal)
_PREFIXES = tuple(b'"type":"' + name.encode() + b'"' for name in (HEARTBEAT, MARK))


def encode_signal(signal: Signal) -> bytes:
    """A whole message body."""
    return encode_batch((encode(signal),))


def signal_in(event: bytes) -> Signal | None:
    """The signal that an encoded event is, or None for a change. Signals come from `encode_signal` alone, which writes
    without spaces and with the type near the front: looking there spares decoding every change twice."""
    head = event[:120]
    if not any(prefix in head for prefix in _PREFIXES):
        return None
    try:
        return _signals.decode(event)
    except msgspec.DecodeError as error:
        raise BrokenContract("contract_broken", f"signal: {error}") from error
