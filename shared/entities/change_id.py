"""The id of a change, derived from what it says, so that a repeated change repeats its id."""

import hashlib


def change_id(entity_id: str, version: int, content: bytes) -> str:
    """UUIDv5 in the namespace of the entity, of the version and the SHA-256 of `content`."""
    name = f"{version}:{hashlib.sha256(content).hexdigest()}"
    # Computes what uuid.uuid5 computes without its objects, because every change needs an id.
    digest = bytearray(hashlib.sha1(bytes.fromhex(entity_id.replace("-", "")) + name.encode()).digest()[:16])  # noqa: S324
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
