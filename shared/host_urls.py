"""Settings with several hosts: URLs separated by commas, the preferred one first."""

import re

# A comma separates only before another URL, because a password may contain one.
_BETWEEN = re.compile(r"\s*,\s*(?=[a-z][a-z0-9+.-]*://)")


def host_urls(setting: str) -> list[str]:
    return _BETWEEN.split(setting.strip())
