"""Makes texts from outside safe to print in a terminal. Pure."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Replaces control characters, because they could control the terminal."""
    return _CONTROL.sub("\ufffd", text)
