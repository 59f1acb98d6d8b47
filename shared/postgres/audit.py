"""Reading the log of changes as an audit."""

from datetime import datetime
from typing import Any

from shared.postgres.pool import Connection


async def changes(
    connection: Connection,
    restaurant: str,
    *,
    start: datetime | None,
    end: datetime | None,
    entity: str | None,
    entity_id: str | None,
    actor: str | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[dict[str, Any]]:
    """The newest first. `before`: (accepted_at, change id) of the last one of the page before."""
    wheres, arguments = ["restaurant_id = $1"], [restaurant]

    def where(condition: str, value: Any) -> None:
        arguments.append(value)
        wheres.append(condition.format(f"${len(arguments)}"))

    if start is not None:
        where("accepted_at >= {}", start)
    if end is not None:
        where("accepted_at <= {}", end)
    if entity is not None:
        where("entity = {}", entity)
    if entity_id is not None:
        where("entity_id = {}", entity_id)
    if actor is not None:
        where("actor = {}", actor)
    if before is not None:
        arguments.extend(before)  # type: ignore[arg-type]
        wheres.append(f"(accepted_at, change_id) < (${len(arguments) - 1}, ${len(arguments)}::uuid)")
    rows = await connection.fetch(
        "select change_id::text, entity, entity_id::text, version, type, source, accepted_at, actor, data::text"  # noqa: S608
        f" from changes where {' and '.join(wheres)} order by accepted_at desc, change_id desc limit {int(limit)}",
        *arguments,
    )
    return [dict(row) for row in rows]
