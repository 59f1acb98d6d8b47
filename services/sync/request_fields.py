"""Types of fields that requests of several features use."""

from typing import Annotated

from msgspec import Meta

NO_NUL = "^[^\\x00]*$"
"""A pattern that refuses the character NUL, because PostgreSQL cannot store it."""
Why = Annotated[str, Meta(min_length=1, max_length=500, pattern=NO_NUL)]
Name = Annotated[str, Meta(max_length=200, pattern=NO_NUL)]
