"""The version of Ticketrail: the only place that holds it. pyproject.toml reads it from here."""

VERSION = "0.1.0"
USER_AGENT = f"ticketrail/{VERSION}"
"""The User-Agent header of our HTTP clients."""
