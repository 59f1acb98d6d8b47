"""Passwords: which ones are accepted, and their hashes, argon2id with the parameters of OWASP's password storage cheat
sheet (19 MiB, 2 passes, 1 lane).

The rules are those of NIST SP 800-63B (3.1.1.2): a length, a list of common passwords, Unicode's form NFKC, and no rule
about kinds of characters.
"""

import re
import unicodedata
from functools import cache
from typing import Annotated

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from msgspec import Meta

from shared.errors import InvalidInput
from shared.security.emails import plain_email

MIN_PASSWORD_CHARS = 10
MAX_PASSWORD_CHARS = 200
_MIN_DIFFERENT_CHARS = 3

NewPassword = Annotated[str, Meta(min_length=MIN_PASSWORD_CHARS, max_length=MAX_PASSWORD_CHARS)]
"""The type of a new password in a request. `check_new_password` has the rest of the rules."""

# A hash takes about 20 ms of a core, so call `hash_password` and `fits` in a thread.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
_AFFIXES = re.compile(r"^[\W\d_]+|[\W\d_]+$")
_REPEATED = re.compile(r"(.+?)\1+")


def hash_password(password: str) -> str:
    """Returns the hash in PHC string format, which contains its salt and parameters."""
    return _HASHER.hash(_normalised(password))


def fits(known: str, password: str) -> bool:
    """Returns whether `known` is a hash of `password`; False also if `known` is not a hash."""
    try:
        return _HASHER.verify(known, _normalised(password))
    except (Argon2Error, InvalidHashError):
        return False


def check_new_password(password: str, email: str, *, field: str = "password") -> None:
    """Raises InvalidInput if the password is too short, too long, common, or the email of the user. The first call
    reads the list of common passwords, so call this function in a thread."""
    if len(password) > MAX_PASSWORD_CHARS:
        raise InvalidInput(f"a password may have at most {MAX_PASSWORD_CHARS} characters", field=field)
    plain = _normalised(password)
    if len(plain) < MIN_PASSWORD_CHARS:
        raise InvalidInput(f"a password needs at least {MIN_PASSWORD_CHARS} characters", field=field)
    folded, address = plain.casefold().strip(), plain_email(email)
    if folded in (address, address.partition("@")[0]):
        raise InvalidInput("the password must not be the email", field=field, code="password_is_email")
    if _is_common(folded):
        raise InvalidInput("this password is too common; attackers try it first", field=field, code="password_common")


def _is_common(folded: str) -> bool:
    """Returns whether a password, or the rest of it without digits and signs at its ends and without repetition, is in
    the list: `password`, `Password2024!` and `passwordpassword`."""
    core = _AFFIXES.sub("", folded)
    repeated = _REPEATED.fullmatch(core)
    candidates = {folded, core, repeated[1] if repeated else core}
    return len(set(folded)) < _MIN_DIFFERENT_CHARS or not candidates.isdisjoint(_common_passwords())


@cache
def _common_passwords() -> frozenset[str]:
    """Returns the 30,000 common passwords of zxcvbn, in lower case. The lists take megabytes and half a second, so they
    are read on first use."""
    from zxcvbn.frequency_lists import FREQUENCY_LISTS

    return frozenset(FREQUENCY_LISTS["passwords"])


def _normalised(password: str) -> str:
    """Returns the form NFKC, because two keyboards may send the same text in different forms."""
    return unicodedata.normalize("NFKC", password)
