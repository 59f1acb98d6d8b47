"""Reads JSON from clients, operators and files into typed structs. Errors name the field."""

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn, TypeVar

import msgspec

from shared.errors import InvalidInput
from shared.http.field_rules import in_words
from shared.http.texts import tidied
from shared.whole_numbers import integer_if_whole

MAX_BODY_BYTES = 1_000_000

T = TypeVar("T")

_ERROR_PATH = re.compile(r" - at `\$?\.?(?P<path>[^`]*)`$")
_FLOAT_FOR_INTEGER = re.compile(r"Expected `int\b.*`, got `float`")
_FLOAT = re.compile(rb"[0-9][.eE]")
_MAX_FLOATS = 10_000
"""A body with more of them is refused. To convert 250,000, which fit into a body, would stop the service for a third of
a second."""
_FIELD_NAME = re.compile(r"(?:unknown|required) field `([^`]*)`")


def read_body(body: bytes, type_: type[T]) -> T:
    """Decodes a request body and brings its texts into their form (texts.py). A number such as 1.0 or 1e2 is an
    integer, as in JSON Schema. Raises InvalidInput with the path of the field that is wrong."""
    try:
        # JSON in ASCII may have other characters in escapes, such as \u00e9.
        return tidied(_decoded(body, type_), in_ascii=body.isascii() and b"\\" not in body)
    except msgspec.ValidationError as error:
        raise _invalid(error, type_) from error
    except RecursionError as error:
        raise InvalidInput("nested too deeply", field="body", code="malformed_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        field = _unstorable_text(body)
        if field is not None:
            raise InvalidInput("not valid Unicode", field=field) from error
        raise InvalidInput(f"not JSON: {error}", field="body", code="malformed_json") from error


def read_fields(fields: dict[str, Any], type_: type[T]) -> T:
    """Checks fields that a command has in the same way as a request body, and brings their texts into their form.
    Raises InvalidInput with the name of the field that is wrong."""
    try:
        return tidied(msgspec.convert(fields, type_))
    except msgspec.ValidationError as error:
        raise _invalid(error, type_) from error


def _invalid(error: msgspec.ValidationError, type_: Any) -> InvalidInput:
    message = str(error)
    path = found["path"] if (found := _ERROR_PATH.search(message)) else ""
    message, details = in_words(_ERROR_PATH.sub("", message), path, type_)
    if named := _FIELD_NAME.search(message):
        path = f"{path}.{named[1]}" if path else named[1]
    return InvalidInput(message, field=path or "body", **details)


def _decoded(body: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        if not _FLOAT_FOR_INTEGER.match(str(error)) or any(islice(_FLOAT.finditer(body), _MAX_FLOATS, None)):
            raise
        try:
            # msgspec refuses 1.0 as an integer. So such numbers are written as integers, and all checks run again.
            integers = msgspec.json.encode(
                json.loads(body, parse_float=integer_if_whole, parse_constant=_refuse_constant)
            )
        except msgspec.DecodeError:
            raise
        except (ValueError, ArithmeticError, RecursionError):
            raise error from None
    return msgspec.json.decode(integers, type=type_)


def _refuse_constant(text: str) -> NoReturn:
    """Refuses NaN and Infinity, which are not JSON. Python reads them, and msgspec would write them as null."""
    raise msgspec.DecodeError(f"{text} is not a number of JSON")


def _unstorable_text(body: bytes) -> str | None:
    """Returns the path of the first text with a lone surrogate or invalid UTF-8, or None. The error of the fast decoder
    does not name the field."""

    def walk(value: Any, path: str) -> str | None:
        if isinstance(value, str):
            return path or "body" if any("\ud800" <= char <= "\udfff" for char in value) else None
        inside: Sequence[tuple[str, Any]] = ()
        if isinstance(value, dict):
            inside = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
            inside = [(path or "body", key) for key in value] + list(inside)
        elif isinstance(value, list):
            inside = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
        return next((found for name, item in inside if (found := walk(item, name))), None)

    try:
        return walk(json.loads(body.decode(errors="surrogateescape")), "")
    except (ValueError, RecursionError):
        return None
