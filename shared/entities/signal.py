"""Signals: small messages of the rail itself. They travel like changes, but change no entity.

A *heartbeat* goes through every lane and the log every few seconds, and each sink stores it. It proves the bindings and
measures the sync lag. A *mark* goes only into the log: a reader that meets its own mark has read everything before it.
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
    source: str = "sync"
    specversion: str = "1.0"


_signals = msgspec.json.Decoder(Signal)
_PREFIXES = tuple(b'"type":"' + name.encode() + b'"' for name in (HEARTBEAT, MARK))


def encode_signal(signal: Signal) -> bytes:
    """Returns the body of a message that contains only this signal."""
    return encode_batch((encode(signal),))


def signal_in(event: bytes) -> Signal | None:
    """Returns the signal in an encoded event, or None if the event is a change. Raises BrokenContract.

    It looks only at the first bytes, so that no change is decoded twice. `encode_signal` writes every signal: without
    spaces, and with the type near the front.
    """
    head = event[:120]
    if not any(prefix in head for prefix in _PREFIXES):
        return None
    try:
        return _signals.decode(event)
    except msgspec.DecodeError as error:
        raise BrokenContract("contract_broken", f"signal: {error}") from error
