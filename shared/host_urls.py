"""Settings with several hosts: URLs separated by commas, with the preferred host first."""

import re

# A comma separates only before another URL, because a password may contain one.
_SEPARATOR = re.compile(r"\s*,\s*(?=[a-z][a-z0-9+.-]*://)")


def host_urls(setting: str) -> list[str]:
    return _SEPARATOR.split(setting.strip())
