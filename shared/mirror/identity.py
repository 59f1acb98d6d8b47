"""The identity of a mirror. A mirror gets a new one each time it becomes warm after it was cold, so an identity lives
as long as the data that it vouches for.

The claims carry the identity, and those of another identity are dropped. The order numbers carry its prefix, because a
mirror that was lost may have given numbers that no other store knows yet: the first identity gives "0042", the second
one "A0043", and so on from A to ZZ and round again. Only the present and the next business day can have numbers of a
former mirror, so a later day begins without a prefix.
"""

import re
from datetime import datetime, timedelta
from string import ascii_uppercase

from msgspec import Struct

_PREFIXES = (
    *ascii_uppercase,
    *(first + second for first in ascii_uppercase for second in ascii_uppercase),
)
_COUNTABLE = re.compile("[A-Z]{0,2}[0-9]{1,9}")


class MirrorIdentity(Struct, frozen=True):
    id: int
    """1 is the first identity of a system."""
    prefix: str
    """The prefix of its order numbers: "" or one or two letters."""
    prefix_until: str
    """The last business day whose numbers have the prefix, as an ISO date."""


def mirror_identity(id_: int, at: datetime) -> MirrorIdentity:
    """Returns an identity that begins at this time. A business day ends up to a day after the day in UTC, and the next
    business day a day later."""
    prefix = _PREFIXES[(id_ - 2) % len(_PREFIXES)] if id_ > 1 else ""
    return MirrorIdentity(id_, prefix, (at + timedelta(days=2)).date().isoformat())


def countable(number: str) -> bool:
    """Returns whether a mirror can have given this order number, so that its series must not give it again. A longer
    number was imported, and Lua could not count it exactly."""
    return _COUNTABLE.fullmatch(number) is not None
