"""Password hashes: argon2id with the parameters of OWASP's password storage cheat sheet (19 MiB, 2 passes, 1 lane)."""

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

# A hash takes about 20 ms of a core, so call both functions in a thread.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)


def hash_password(password: str) -> str:
    """Returns the hash in PHC string format, which contains its salt and parameters."""
    return _HASHER.hash(password)


def fits(known: str, password: str) -> bool:
    """Returns whether `known` is a hash of `password`; False also if `known` is not a hash."""
    try:
        return _HASHER.verify(known, password)
    except (Argon2Error, InvalidHashError):
        return False
