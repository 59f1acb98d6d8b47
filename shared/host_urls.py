"""Settings that name several hosts: URLs with commas between, the preferred one first."""

import re

# Only before another URL: a password may hold a comma.
_BETWEEN = re.compile(r"\s*,\s*(?=[a-z][a-z0-9+.-]*://)")


def host_urls(setting: str) -> list[str]:
    return _BETWEEN.split(setting.strip())
