"""The rules of the fields of a type in words: what a text must be, and the values that an enumeration allows.

msgspec names the regular expression that a text does not match, and not the values that an enumeration allows. A
client needs a sentence and a list instead. A type gives the sentence of its pattern beside the pattern:

    Slug = Annotated[str, Meta(pattern="^[a-z0-9-]+$", extra={SENTENCE: "must have only lower-case letters, …"})]
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from msgspec import Struct, inspect

from shared.entities.contract import SENTENCE

_INDEX = re.compile(r"\[(?:[0-9]+|\.{3})\]")
_PATTERN = " matching regex "
_ENUM = "Invalid enum value"
_WRONG_FORM = "has the wrong form"
_IN_WORDS = {
    "Invalid UUID": "must be a UUID",
    "Invalid RFC3339 encoded datetime": "must be a time with a zone, such as 2026-03-01T12:00:00Z",
    "Expected `datetime` with a timezone component": "must be a time with a zone, such as 2026-03-01T12:00:00Z",
    "Invalid RFC3339 encoded date": "must be a day, such as 2026-03-01",
}


class FieldRule(Struct, frozen=True):
    path: str
    """The names of the fields that lead to this one; `[]` stands for every index: `items[].name`."""
    pattern: str | None = None
    sentence: str | None = None
    """The pattern in words."""
    allowed: tuple[Any, ...] = ()
    """The values of an enumeration."""


@cache
def field_rules(type_: Any) -> tuple[FieldRule, ...]:
    """Returns the rules of a type and of everything in it."""
    return tuple(_rules(inspect.type_info(type_), "", None))


def in_words(message: str, path: str, type_: Any) -> tuple[str, dict[str, Any]]:
    """Returns (message, details) for an error of msgspec about the field at `path` of a type."""
    if _PATTERN in message:
        return _sentence(message.partition(_PATTERN)[2], path, type_), {}
    if message.startswith(_ENUM):
        allowed = [value for rule in _rules_at(path, type_) for value in rule.allowed]
        return f"must be one of {', '.join(map(str, allowed))}", {"allowed": allowed}
    return _IN_WORDS.get(message, message), {}


def _sentence(pattern: str, path: str, type_: Any) -> str:
    rules = _rules_at(path, type_)
    return next((rule.sentence for rule in rules if rule.sentence and repr(rule.pattern) == pattern), _WRONG_FORM)


def _rules_at(path: str, type_: Any) -> list[FieldRule]:
    place = _INDEX.sub("[]", path)
    return [rule for rule in field_rules(type_) if rule.path == place]


def _rules(node: inspect.Type, path: str, sentence: str | None) -> Iterator[FieldRule]:
    match node:
        case inspect.Metadata():
            yield from _rules(node.type, path, (node.extra or {}).get(SENTENCE, sentence))
        case inspect.StrType() if node.pattern is not None:
            yield FieldRule(path, node.pattern, sentence)
        case inspect.EnumType():
            yield FieldRule(path, allowed=tuple(one.value for one in node.cls))
        case inspect.LiteralType():
            yield FieldRule(path, allowed=tuple(node.values))
        case inspect.UnionType():
            for part in node.types:
                yield from _rules(part, path, sentence)
        case inspect.CollectionType():
            yield from _rules(node.item_type, f"{path}[]", None)
        case inspect.DictType():
            yield from _rules(node.value_type, f"{path}[]", None)
        case inspect.StructType():
            for field in node.fields:
                yield from _rules(field.type, f"{path}.{field.encode_name}" if path else field.encode_name, None)
