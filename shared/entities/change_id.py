"""The id of a change. It is derived from the content of the change, so that a repeated change has the same id."""

import hashlib


def change_id(entity_id: str, version: int, content: bytes) -> str:
    """Returns the UUIDv5 whose namespace is the entity's id and whose name is the version with the SHA-256 of
    `content`."""
    name = f"{version}:{hashlib.sha256(content).hexdigest()}"
    # The result equals that of uuid.uuid5. It is computed without UUID objects, because every change needs an id and
    # this is faster.
    digest = bytearray(hashlib.sha1(bytes.fromhex(entity_id.replace("-", "")) + name.encode()).digest()[:16])  # noqa: S324
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
