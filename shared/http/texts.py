"""The texts in requests: what a name, an email or a code must be, and the form in which they are kept.

Two spellings that look alike must be one name. So every text is brought into Unicode normalization form C (NFC), and a
label loses the blanks around it, before anything reads the request.
"""

import operator
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, inspect

from shared.entities.contract import SENTENCE
from shared.iso_codes import COUNTRIES, CURRENCIES
from shared.security.emails import ADDRESS, MAX_EMAIL_CHARS

T = TypeVar("T")

FORM = "form"
"""The key of `Meta.extra` for the form of a text: `label`."""
LABEL_FORM = "label"

# Python's `$` alone also matches before a final line break.
END = r"$(?!\n)"
# Control characters, the zero width space, separators of lines and paragraphs, overrides of the direction, and other
# invisible characters that no writing system needs. Joiners (U+200C, U+200D) are needed inside words and emoji.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
# The last three ranges are literal, because Python and JavaScript escape them in different ways.
_INVISIBLE = (
    rf"\s{_CONTROL}\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c-\u200f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
LABEL = rf"[^{_CONTROL}]*[^{_INVISIBLE}][^{_CONTROL}]*"
LABEL_PATTERN = rf"^{LABEL}{END}"
_LABEL_SENTENCE = "must not be blank, and must have no control characters or invisible ones"
_LABEL_RULES: dict[str, Any] = {"pattern": LABEL_PATTERN, "extra": {SENTENCE: _LABEL_SENTENCE, FORM: LABEL_FORM}}

Label = Annotated[str, Meta(max_length=200, **_LABEL_RULES)]
"""A name, or another text of one line. It has a visible character and no control character."""
Sentence = Annotated[str, Meta(max_length=500, **_LABEL_RULES)]
"""A longer text of one line, such as a reason."""
Email = Annotated[
    str,
    Meta(
        max_length=MAX_EMAIL_CHARS,
        pattern=rf"^\s*{ADDRESS}\s*{END}",
        extra={SENTENCE: "not an email address", FORM: LABEL_FORM},
        examples=["ada@trattoria.example"],
    ),
]
Country = Annotated[
    str,
    Meta(
        pattern=f"^(?:{'|'.join(COUNTRIES.split())}){END}",
        extra={SENTENCE: "must be a country code of ISO 3166-1, such as GB"},
        examples=["DE"],
    ),
]
Currency = Annotated[
    str,
    Meta(
        pattern=f"^(?:{'|'.join(CURRENCIES.split())}){END}",
        extra={SENTENCE: "must be a currency code of ISO 4217, such as EUR"},
        examples=["EUR"],
    ),
]


def nfc(text: str) -> str:
    """Returns the text in Unicode normalization form C."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def tidied(value: T, *, in_ascii: bool = False) -> T:
    """Brings the texts of a request into their form, in place, and returns the request. Values that are not a Struct
    are returned unchanged. `in_ascii`: no text has other characters, so that only labels can change."""
    if isinstance(value, Struct):
        for name, tidy in _plan(type(value), in_ascii):
            before = getattr(value, name)
            after = tidy(before)
            if after is not before:
                msgspec.structs.force_setattr(value, name, after)
    return value


_Tidy = Callable[[Any], Any]


@cache
def _plan(struct: type[Struct], in_ascii: bool) -> tuple[tuple[str, _Tidy], ...]:
    """Returns (name, function) of the fields whose texts may change."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    found = ((one.name, _tidy_of(one.type, None, in_ascii=in_ascii)) for one in info.fields)
    return tuple((name, tidy) for name, tidy in found if tidy is not None)


def _tidy_of(node: inspect.Type, form: str | None, *, in_ascii: bool) -> _Tidy | None:
    match node:
        case inspect.Metadata():
            return _tidy_of(node.type, (node.extra or {}).get(FORM, form), in_ascii=in_ascii)
        case inspect.StrType():
            return _tidy_label if form == LABEL_FORM else None if in_ascii else _tidy_text
        case inspect.UnionType():
            found = (_tidy_of(one, form, in_ascii=in_ascii) for one in node.types)
            return next((tidy for tidy in found if tidy is not None), None)
        case inspect.CollectionType():
            inner = _tidy_of(node.item_type, None, in_ascii=in_ascii)
            return None if inner is None else lambda values: _tidy_all(values, inner)
        case inspect.StructType():
            return partial(tidied, in_ascii=in_ascii) if _plan(node.cls, in_ascii) else None
    return None


def _tidy_text(value: Any) -> Any:
    return nfc(value) if isinstance(value, str) else value


def _tidy_label(value: Any) -> Any:
    return nfc(value).strip() if isinstance(value, str) else value


def _tidy_all(values: Any, tidy: _Tidy) -> Any:
    if not isinstance(values, list | tuple):
        return values
    after = type(values)(map(tidy, values))
    return values if all(map(operator.is_, after, values)) else after
