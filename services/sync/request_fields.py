"""Types of fields that the requests of several features have."""

from typing import Annotated

from msgspec import Meta

NO_NUL = "^[^\\x00]*$"
"""PostgreSQL stores no NUL character."""
Why = Annotated[str, Meta(min_length=1, max_length=500, pattern=NO_NUL)]
Name = Annotated[str, Meta(max_length=200, pattern=NO_NUL)]
