"""The columns of a CSV file, or of a query, that `ticketrail import` reads. docs/import.md lists them."""

import difflib
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

from msgspec import Struct

from services.sync.imports.cells import shown

_MAX_COMPARED_CHARS = 200
Form = Literal["text", "id", "amount", "number", "time", "JSON"]


class ImportColumn(Struct, frozen=True):
    name: str
    form: Form
    meaning: str


_ORDER = (
    ImportColumn("external_id", "text", "the id of the order in the other system; this or `convex_id` is required"),
    ImportColumn("convex_id", "text", "another name of `external_id`; if a row has both, they must be equal"),
    ImportColumn("restaurant_id", "id", "the restaurant; required without `--restaurant`"),
    ImportColumn("order_number", "text", "the number that people see; without it an open order gets the next number"),
    ImportColumn(
        "status", "text", "`pending`, `received`, `preparing`, `ready`, `completed` or `cancelled`; default: `pending`"
    ),
    ImportColumn("table_id", "id", "the table"),
    ImportColumn("customer_id", "id", "the customer"),
    ImportColumn("customer_name", "text", "the name of the customer"),
    ImportColumn("customer_phone", "text", "the phone number of the customer"),
    ImportColumn("tip_amount", "amount", "the tip"),
    ImportColumn("discount_amount", "amount", "the discount, not negative"),
    ImportColumn("deposit_used", "amount", "the part of the total that a deposit has paid"),
    ImportColumn("tax_amount", "amount", "the tax; default: computed from the rate of the restaurant"),
    ImportColumn("total", "amount", "the total; default: computed"),
    ImportColumn("payment_method", "text", "such as `cash`"),
    ImportColumn("payments", "JSON", 'a list such as `[{"id": "p1", "amount": 1240, "method": "card"}]`'),
    ImportColumn("notes", "text", "notes"),
    ImportColumn("special_instructions", "text", "instructions for the kitchen"),
    ImportColumn("created_at", "time", "the time at which the order was placed; default: the time of the import"),
    ImportColumn("updated_at", "time", "the time of the last change; the later of two updates wins"),
    ImportColumn("items", "JSON", 'a list such as `[{"name": "Soup", "quantity": 2, "unit_price": 620}]`'),
)
_ITEM = (
    ImportColumn("item_name", "text", "the dish; required without `items`"),
    ImportColumn("item_quantity", "number", "the number of pieces; required without `items`"),
    ImportColumn("item_unit_price", "amount", "the price of one piece; required without `items`"),
)
COLUMNS = _ORDER + _ITEM
NAMES = tuple(column.name for column in COLUMNS)
FORMS: dict[str, Form] = {column.name: column.form for column in COLUMNS}
ITEM_FIELDS = {column.name: column.name.removeprefix("item_") for column in _ITEM}
"""column -> field of an item"""


def heading_fault(heading: Sequence[str], *, restaurant_told: bool) -> str | None:
    """Returns one sentence about the fault in the names of the columns, or None. Columns without a name are not read.
    `restaurant_told`: whether the command names the restaurant, so that rows need no restaurant_id."""
    names = [name for name in heading if name]
    for name, times in Counter(names).items():
        if name not in NAMES:
            return f"unknown column {shown(name)}; the nearest known one is {nearest(name)}"
        if times > 1:
            return f"the column {name} occurs {times} times, in columns {_places(heading, name)}"
    if "items" in names and (item := next((name for name in names if name in ITEM_FIELDS), None)):
        return f"the columns items and {item} exclude each other"
    if not {"external_id", "convex_id"} & set(names):
        return "the column external_id (or convex_id) is missing"
    if missing := [name for name in ITEM_FIELDS if name not in names and "items" not in names]:
        either = "items, or item_name, item_quantity and item_unit_price," if len(missing) == 3 else missing[0]
        return f"the column {either} is missing"
    if "restaurant_id" not in names and not restaurant_told:
        return "the column restaurant_id is missing; name it in the file, or give --restaurant for all rows"
    return None


def nearest(name: str, known: Collection[str] = NAMES) -> str:
    """Returns the known name that is most like this one."""
    wanted = name[:_MAX_COMPARED_CHARS].casefold().replace(" ", "_").replace("-", "_")
    return difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)[0]


def _places(heading: Sequence[str], name: str) -> str:
    return " and ".join(str(place) for place, found in enumerate(heading, start=1) if found == name)


def table() -> str:
    """Returns the table of the columns in Markdown, for docs/import.md."""
    lines = ["| column | form | meaning |", "|---|---|---|"]
    lines += [f"| `{column.name}` | {column.form} | {column.meaning} |" for column in COLUMNS]
    return "\n".join(lines)
