"""Conditional requests: the headers If-Match and If-None-Match (RFC 9110, section 13.1).

The entity tag of a state is its version, such as `"3"`. A gateway that compresses a reply weakens its tag (`W/"3"`).
The tag still names the same version, so both headers ignore the mark of a weak tag.
"""

import re

from shared.errors import InvalidInput
from shared.http.call import Call

Versions = frozenset[str]
"""The texts of entity tags, without quotes and without the mark of a weak tag."""

ANY = "*"
_TAG = r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_ONE_TAG = re.compile(_TAG)
_NUMBER = re.compile(r"[0-9]+")


def etag_of(version: int) -> str:
    """Returns the entity tag of a version."""
    return f'"{version}"'


def required_versions(request: Call) -> Versions | None:
    """Returns the versions in the header If-Match, or None if any version will do (no header, or `*`). A number without
    quotes counts as a tag. Raises InvalidInput for a header that is not a list of tags."""
    text = request.headers_joined(b"if-match")
    if text is None or text == ANY:
        return None
    if _NUMBER.fullmatch(text):
        return frozenset({text})
    found = _tags_in(text)
    if found is None:
        raise InvalidInput('must be a version, such as "3", a list of versions, or *', field="If-Match")
    return found


def is_known(request: Call, version: int) -> bool:
    """Returns whether the client has this version, according to its header If-None-Match. A header that cannot be read
    counts as absent, because a whole reply is always right."""
    text = request.headers_joined(b"if-none-match")
    if text is None:
        return False
    return text == ANY or str(version) in (_tags_in(text) or ())


def _tags_in(text: str) -> Versions | None:
    """Returns the tags of a list, or None if the text is not a list of tags."""
    return frozenset(_ONE_TAG.findall(text)) if _TAGS.fullmatch(text) else None
