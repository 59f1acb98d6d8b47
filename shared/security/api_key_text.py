"""The text of an API key: `trk_<prefix>_<secret>`.

The mark `trk_` tells a key from a token, and lets scanners find leaked keys. The prefix (48 random bits) is public: it
names the key in lists and finds its row. The secret has 256 random bits. The database holds the SHA-256 of the whole
text. A slow hash like argon2 protects secrets that people choose, because their guesses are few. Nobody can try 2^256
secrets against a fast hash either, and a slow one would cost every request 20 ms of a core.
"""

import base64
import hashlib
import re
import secrets

from msgspec import Struct

MARK = "trk_"
_PREFIX_BYTES, _SECRET_BYTES = 6, 32
_KEY = re.compile(r"trk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")


class ApiKeyText(Struct, frozen=True):
    prefix: str
    text: str
    """The whole key, which is shown once."""

    @property
    def digest(self) -> bytes:
        return digest_of(self.text)


def new_key() -> ApiKeyText:
    return _key(secrets.token_bytes(_PREFIX_BYTES), secrets.token_bytes(_SECRET_BYTES))


def derived_key(secret: str, purpose: str) -> ApiKeyText:
    """Returns the same key for the same arguments, for the demo, whose keys stay when it is seeded again."""
    prefix, body = (hashlib.sha256(f"{secret}/{purpose}/{part}".encode()).digest() for part in ("prefix", "secret"))
    return _key(prefix[:_PREFIX_BYTES], body)


def _key(prefix: bytes, secret: bytes) -> ApiKeyText:
    body = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
    return ApiKeyText(prefix.hex(), f"{MARK}{prefix.hex()}_{body}")


def prefix_of(text: str) -> str | None:
    """Returns the prefix of a key, or None if the text is not a key."""
    found = _KEY.fullmatch(text)
    return found[1] if found else None


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
