"""Makes texts from outside safe to print in a terminal. Pure."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Replaces control characters, because they could control the terminal, and overrides of the direction, which
    show a text in another order than it has."""
    return _CONTROL.sub("\ufffd", text)
