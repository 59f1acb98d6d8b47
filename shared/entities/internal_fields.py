"""The fields of states that no client sees: those by which repeats of requests are known, and those of terminals."""

import re

INTERNAL_FIELDS = frozenset({"request_hash", "request_key", "clock"})

# None of these is the first field of its object. Quotes inside a JSON string are escaped, so only the fields themselves
# match.
_INTERNAL = re.compile(rb',"(?:request_(?:hash|key)":(?:null|"[0-9a-f-]*")|clock":\{(?:,?"(?:[^"\\]|\\.)*":[0-9]+)*\})')


def without_internal_fields(state: bytes) -> bytes:
    """Returns an encoded state without the fields that no client sees. All others are kept as they are."""
    return _INTERNAL.sub(b"", state)
