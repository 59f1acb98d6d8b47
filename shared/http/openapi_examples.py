"""Examples of replies, made from their schemas. The value of a field comes from the request's example if that has a
field with this name, otherwise from the example of the type. Without either, it is the simplest value of the type."""

from collections.abc import Mapping
from typing import Any

_TEXTS = {
    "uuid": "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11",
    "date-time": "2026-03-14T12:30:00Z",
    "date": "2026-03-14",
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def example_of(schema: Mapping[str, Any], components: Mapping[str, Any], hint: Any = None, name: str = "text") -> Any:
    """Returns an example of a schema. `schema`: a JSON schema of msgspec. `hint`: an example of something similar.
    `name`: the name of the field."""
    default = schema.get("default")
    while "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    if "allOf" in schema:
        parts = [example_of(part, components, hint, name) for part in schema["allOf"]]
        return {key: value for part in parts for key, value in part.items()}
    if "anyOf" in schema:  # the value may be null
        some = next(part for part in schema["anyOf"] if part != {"type": "null"})
        return None if hint is None else example_of(some, components, hint, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return next(one for one in (hint, default, schema["enum"][0]) if one in schema["enum"])
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        kind = next(one for one in kind if one != "null")
    if not isinstance(hint, _TYPES[kind]):
        hint = None
    if kind == "object" and "properties" in schema and "examples" not in schema:
        fields = schema["properties"].items()
        return {key: example_of(field, components, (hint or {}).get(key), key) for key, field in fields}
    if kind == "array" and (hint or default is None):
        return [example_of(schema.get("items", {}), components, hint[0] if hint else None, name)]
    if hint is not None or default is not None:
        return default if hint is None else hint
    if "examples" in schema:
        return schema["examples"][0]
    if kind == "string":
        format_ = "uuid" if name == "id" or name.endswith("_id") else schema.get("format", "")
        return _TEXTS.get(format_, name)
    return {"object": {}, "boolean": True}.get(kind, max(1, schema.get("minimum", 1)))
