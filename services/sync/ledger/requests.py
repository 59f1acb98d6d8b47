"""Queries of the routes in routes.py. Unknown fields are refused."""

from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Time


class LedgerQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    since: Annotated[Time, Meta(description="begin at the newest checkpoint before; by default an hour ago")] | None = (
        None
    )
    whole: Annotated[bool, Meta(description="begin at the first entry that the log has")] = False
