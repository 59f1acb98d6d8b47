"""Encodes a new state over the encoded state that it was made from, so that fields of a newer release are kept.

While two releases run side by side, the older one changes entities with fields that it does not know. A Struct drops
such fields when it is decoded. So the new state is not encoded alone: each object gets the fields that its Struct knows
from the new state, and its other fields from the base, at every depth.

| in the base                              | in the result                                                  |
|------------------------------------------|----------------------------------------------------------------|
| a field that the Struct knows            | what the new state says; a cleared field has its default       |
|                                          | (absent if the Struct omits defaults)                          |
| a field that the Struct does not know    | kept, as it is                                                 |
| an element of a list that did not change | kept, as it is                                                 |
| an element of a list that changed        | the same rules, if the new list has an element with its key:   |
|                                          | the first field of the Struct, such as `id`, `menu_item_id`    |
| an element whose key is gone             | gone                                                           |
| a dict of plain values                   | what the new state says: it knows every key                    |

Pure. The result, decoded, is exactly the new state.
"""

import functools
from collections.abc import Mapping, Set
from typing import Any

import msgspec
from msgspec import Raw, Struct, inspect

_fields = msgspec.json.Decoder(dict[str, Raw])
_elements = msgspec.json.Decoder(list[Raw])
_encoder = msgspec.json.Encoder()

_SCALARS = (
    inspect.AnyType,
    inspect.NoneType,
    inspect.BoolType,
    inspect.IntType,
    inspect.FloatType,
    inspect.StrType,
    inspect.BytesType,
    inspect.DateTimeType,
    inspect.DateType,
    inspect.TimeType,
    inspect.UUIDType,
    inspect.EnumType,
    inspect.LiteralType,
)


def overlay(base: bytes, state: Struct) -> bytes:
    """Returns `state` encoded over `base`, the encoded state that it was made from. Raises msgspec.DecodeError if
    `base` is not a state of this type."""
    return _merged(_layout(type(state)), base, _encoder.encode(state))


def old_values(
    base: bytes, changed: Mapping[str, Any], state: Struct, encoded: bytes, *, partly: Set[str] = frozenset()
) -> bytes:
    """Returns the old values of the fields in which `encoded`, the encoded `state`, differs from the encoded state
    `base`, as a JSON object. `changed`: those of the fields that the Struct knows (`contract.changed_fields`).
    `partly`: the lists of which only the elements that `encoded` lacks are returned."""
    before, after = _fields.decode(base), _fields.decode(encoded)
    known = _layout(type(state)).known
    for name in partly & changed.keys() & before.keys():
        before[name] = _gone(before[name], after.get(name, Raw(b"[]")))
    return _encoder.encode(
        {
            **{name: before.get(name, value) for name, value in changed.items()},
            **{name: old for name, old in before.items() if name not in known and after.get(name) != old},
        }
    )


def _gone(old: Raw, new: Raw) -> Raw:
    """Returns the elements of the list `old` that the list `new` lacks."""
    kept = {bytes(element) for element in _elements.decode(new)}
    return Raw(b"[" + b",".join(one for element in _elements.decode(old) if (one := bytes(element)) not in kept) + b"]")


def with_field(encoded: bytes, name: str, value: bytes | None) -> bytes:
    """Returns a JSON object in which one field has another encoded value, or is missing if `value` is None. All other
    fields are kept as they are."""
    fields = _fields.decode(encoded)
    if value is None:
        fields.pop(name, None)
    else:
        fields[name] = Raw(value)
    return _encoder.encode(fields)


def field_of(encoded: bytes, name: str) -> bytes:
    """Returns a field of a JSON object, encoded. Raises KeyError."""
    return bytes(_fields.decode(encoded)[name])


class _Layout(Struct, frozen=True):
    """The parts of a Struct that the overlay needs."""

    type: type[Struct]
    known: frozenset[str]
    key: str
    """The first field, which identifies an element of a list."""
    objects: Mapping[str, "_Layout"]
    """The fields that hold one Struct."""
    lists: Mapping[str, "_Layout"]
    """The fields that hold a list of Structs."""


@functools.cache
def _layout(type_: type[Struct]) -> _Layout:
    """Raises TypeError for a field whose unknown parts the overlay could not keep, such as a dict."""
    found = inspect.type_info(type_)
    if not isinstance(found, inspect.StructType) or found.array_like or found.tag_field is not None:
        raise TypeError(f"{type_.__name__} is not a plain Struct, so the overlay cannot keep its unknown fields")
    objects: dict[str, _Layout] = {}
    lists: dict[str, _Layout] = {}
    for field in found.fields:
        place = f"{type_.__name__}.{field.name}"
        match _without_none(field.type, place):
            case inspect.StructType(cls=inner):
                objects[field.encode_name] = _layout(inner)
            case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
                item = _without_none(item, place)
                if isinstance(item, inspect.StructType):
                    lists[field.encode_name] = _layout(item.cls)
                elif not isinstance(item, _SCALARS):
                    raise TypeError(f"{place}: the overlay cannot keep unknown fields in a list of {item}")
            case inspect.DictType(value_type=value) if _is_plain(value):
                pass
            case other if not isinstance(other, _SCALARS):
                raise TypeError(f"{place}: the overlay cannot keep unknown fields in {other}")
    names = [field.encode_name for field in found.fields]
    return _Layout(type_, frozenset(names), names[0], objects, lists)


def _is_plain(type_: inspect.Type) -> bool:
    """Returns whether a value of a dict has no fields that a Struct could drop."""
    if isinstance(type_, inspect.Metadata):
        return _is_plain(type_.type)
    if isinstance(type_, inspect.DictType):
        return _is_plain(type_.value_type)
    return isinstance(type_, _SCALARS) and not isinstance(type_, inspect.AnyType)


def _without_none(type_: inspect.Type, place: str) -> inspect.Type:
    if isinstance(type_, inspect.Metadata):
        return _without_none(type_.type, place)
    if not isinstance(type_, inspect.UnionType):
        return type_
    others = [one for one in type_.types if not isinstance(one, inspect.NoneType)]
    if len(others) != 1:
        raise TypeError(f"{place}: the overlay cannot keep unknown fields in a union of types")
    return _without_none(others[0], place)


def _merged(layout: _Layout, base: bytes, new: bytes) -> bytes:
    """Returns the object `new` with the unknown fields of the object `base`."""
    if base == new:
        return new
    before = _fields.decode(base)
    after: dict[str, Any] = _fields.decode(new)
    for name in after.keys() & before.keys():
        old, value = bytes(before[name]), bytes(after[name])
        if old == value or b"null" in (old, value):
            continue
        if (inner := layout.objects.get(name)) is not None:
            after[name] = Raw(_merged(inner, old, value))
        elif (element := layout.lists.get(name)) is not None:
            after[name] = Raw(_merged_list(element, old, value))
    unknown = {name: value for name, value in before.items() if name not in layout.known}
    return _encoder.encode({**after, **unknown})


def _merged_list(layout: _Layout, base: bytes, new: bytes) -> bytes:
    """Returns the list `new`, in which each element has the unknown fields of the same element in `base`. An element
    that did not change is found by its content, and one that changed by its key. So of two elements with one key, the
    one that did not change keeps its fields."""
    by_content: dict[bytes, list[int]] = {}
    by_key: dict[bytes, list[int]] = {}
    before = [bytes(element) for element in _elements.decode(base)]
    after = [bytes(element) for element in _elements.decode(new)]
    still_there = set(after)
    for place in range(len(before) - 1, -1, -1):  # the first element of each list is popped first
        content = before[place]
        if content not in still_there:  # it has changed, or it has fields that the Struct does not know
            content = _encoder.encode(msgspec.json.decode(content, type=layout.type))
        by_content.setdefault(content, []).append(place)
        by_key.setdefault(_key(layout, before[place]), []).append(place)
    same = [found.pop() if (found := by_content.get(element)) else None for element in after]
    used = {place for place in same if place is not None}
    for n, (element, unchanged) in enumerate(zip(after, same, strict=True)):
        if unchanged is not None:
            after[n] = before[unchanged]
            continue
        places = by_key.get(_key(layout, element), [])
        while places and places[-1] in used:
            places.pop()
        if places:
            after[n] = _merged(layout, before[places.pop()], element)
    return b"[" + b",".join(after) + b"]"


def _key(layout: _Layout, element: bytes) -> bytes:
    return bytes(_fields.decode(element).get(layout.key, b""))
