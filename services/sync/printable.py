"""What strangers wrote, on an operator's terminal. Pure."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without what would steer the terminal."""
    return _CONTROL.sub("\ufffd", text)
