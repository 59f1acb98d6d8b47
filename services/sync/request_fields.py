"""Types of fields that requests of several features use."""

from typing import Annotated

from msgspec import Meta

from shared.entities.contract import NO_NUL, NO_NUL_SENTENCE, SENTENCE
from shared.http.texts import Sentence

Why = Sentence
Name = Annotated[str, Meta(max_length=200, pattern=NO_NUL, extra={SENTENCE: NO_NUL_SENTENCE})]
"""A filter by a text that a service has written, such as the reason of a dead letter."""
