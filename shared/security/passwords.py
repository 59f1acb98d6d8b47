"""Hashes of passwords: argon2id, as OWASP's password storage cheat sheet chooses it (19 MiB, two passes, one lane)."""

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

# Some 20 ms of a core each: call them in a thread.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


def hash_password(password: str) -> str:
    return _HASHER.hash(password)


def fits(known: str, password: str) -> bool:
    """Whether `known` is a hash of it."""
    try:
        return _HASHER.verify(known, password)
    except (Argon2Error, InvalidHashError):
        return False
