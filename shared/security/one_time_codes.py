"""Codes that work once: an invitation to register a restaurant, and the reset of a password. The database holds only
their hashes. A code has 128 random bits, so a fast hash is enough."""

import hashlib
import secrets

RESET_SECONDS = 3_600
"""The lifetime of a code that resets a password."""


def new_code() -> str:
    return secrets.token_urlsafe(16)


def code_digest(code: str) -> bytes:
    return hashlib.sha256(code.strip().encode()).digest()
