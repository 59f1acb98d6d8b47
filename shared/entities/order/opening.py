"""Opens an order with its first lines."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from msgspec import Struct

from shared.entities.order.acts import Act
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import accept
from shared.entities.order.lines import NewLine, new_lines
from shared.entities.order.refusals import invalid
from shared.entities.order.registers import EDITABLE
from shared.entities.order.state import CONTACT, Discount, Order
from shared.entities.order.terms import Terms
from shared.entities.order.writing import check_discount, check_subtotal


class NewOrder(Struct, frozen=True, kw_only=True):
    """The fixed values of a new order."""

    id: str
    restaurant_id: str
    business_day: date
    """The business day of `scheduled_for` if that is set, else of the creation."""
    currency: str
    terms: Terms
    order_number: str = ""
    """If it is empty, the claim gives the order its number."""
    customer_session_id: str | None = None
    external_id: str | None = None
    request_hash: str | None = None


def place(
    new: NewOrder,
    act: Act,
    lines: Sequence[NewLine],
    *,
    discount: Discount | None = None,
    auto_accept: bool = False,
    **fields: Any,
) -> Order:
    """Returns a new order, as version 1. `fields`: values for fields of `registers.EDITABLE`. The service has already
    checked whether the caller may give a discount or a deposit. Raises Refused: `order_too_large`,
    `discount_above_subtotal`."""
    if unknown := fields.keys() - EDITABLE:
        raise invalid("invalid_input", "cannot be set", field=min(unknown))
    nothing = dict.fromkeys(("table_id", "notes", "special_instructions", *CONTACT, "payment_method"))
    order = Order(
        **{name: getattr(new, name) for name in NewOrder.__struct_fields__},
        **{**nothing, **fields},
        items=new_lines(lines, act),
        discount=discount,
        created_at=act.at,
        updated_at=act.at,
        placed_by=act.by,
    )
    opened = derive(order)
    check_subtotal(opened)
    if discount is not None:
        check_discount(discount, opened.subtotal, "discount_amount")
    return accept(opened, act) if auto_accept else opened
