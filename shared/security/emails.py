"""The one rule for emails: how a text becomes an email, and the form in which emails are stored and compared."""

import re
import unicodedata

from shared.errors import InvalidInput

MAX_EMAIL_CHARS = 254
"""RFC 5321 limits a path to 256 characters, two of which are the brackets."""
_CONTROL = r"\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff"
ADDRESS = rf"[^@\s{_CONTROL}]+@[^@\s.{_CONTROL}]+(?:\.[^@\s.{_CONTROL}]+)+"
"""The pattern of an address, which the API documents show."""
_EMAIL = re.compile(ADDRESS)


def plain_email(text: str) -> str:
    """Returns the text trimmed, in Unicode's form NFC and case-folded. Python folds it and PostgreSQL only compares
    equal texts: its `lower` would map more spellings to one account, and each would have attempts of its own."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.strip()).casefold())


def read_email(text: str, *, field: str = "email") -> str:
    """Returns the plain form of an email. Raises InvalidInput if the text is not an email address."""
    email = plain_email(text)
    # Category C: control characters and invisible ones, which would make two addresses look the same.
    invisible = any(unicodedata.category(char).startswith("C") for char in email)
    if len(email) > MAX_EMAIL_CHARS or invisible or not _EMAIL.fullmatch(email):
        raise InvalidInput("not an email address; an example is ada@trattoria.example", field=field)
    return email
