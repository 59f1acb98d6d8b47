"""Compares two JSON documents. Pure."""

from typing import Any


def difference(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    """Lists the leaves that differ: [{"path", "before", "after"}]. A side that lacks the leaf is left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for name in sorted({*before, *after}):
            where = f"{path}.{name}" if path else str(name)
            if name not in before:
                found.append({"path": where, "after": after[name]})
            elif name not in after:
                found.append({"path": where, "before": before[name]})
            else:
                found += difference(before[name], after[name], where)
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            leaf
            for place, pair in enumerate(zip(before, after, strict=True))
            for leaf in difference(*pair, f"{path}[{place}]")
        ]
    return [] if before == after and type(before) is type(after) else [{"path": path, "before": before, "after": after}]
