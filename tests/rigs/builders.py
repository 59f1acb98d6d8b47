"""Valid orders, changes and messages for tests; every field can be overridden."""

from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

from msgspec import Raw, Struct, structs

from shared.entities.change_id import change_id
from shared.entities.contract import Change, ChangeData, changed_fields, encode, encode_batch, now
from shared.entities.menu_item import MenuItem
from shared.entities.order import Order, OrderItem, OrderStatus, Payment
from shared.entities.registry import ENTITIES

RESTAURANT = "11111111-1111-4111-8111-111111111111"
OTHER_RESTAURANT = "22222222-2222-4222-8222-222222222222"
CREATED_AT = datetime(2026, 3, 14, 12, 30, tzinfo=UTC)


def new_id() -> str:
    return str(uuid4())


def item(**fields: Any) -> OrderItem:
    defaults: dict[str, Any] = {"menu_item_id": new_id(), "name": "Masala Dosa", "quantity": 1, "unit_price": 900}
    merged = {**defaults, **fields}
    merged.setdefault("line_total", merged["quantity"] * merged["unit_price"])
    return OrderItem(**merged)


def payment(**fields: Any) -> Payment:
    return Payment(**{"id": new_id(), "amount": 500, "method": "card", "created_at": CREATED_AT, **fields})


def order(*, items: int | tuple[OrderItem, ...] = 3, **fields: Any) -> Order:
    """Returns a valid order. `items` is the number of items, or the items themselves."""
    chosen = tuple(item() for _ in range(items)) if isinstance(items, int) else items
    subtotal = sum(one.line_total for one in chosen)
    tax = (subtotal * 500 + 5_000) // 10_000
    defaults: dict[str, Any] = {
        "id": new_id(),
        "restaurant_id": RESTAURANT,
        "order_number": "0001",
        "business_day": date(2026, 3, 14),
        "status": OrderStatus.PENDING,
        "items": chosen,
        "currency": "EUR",
        "subtotal": subtotal,
        "tax_basis_points": 500,
        "tax_amount": tax,
        "tip_amount": 0,
        "discount_amount": 0,
        "deposit_used": 0,
        "total": subtotal + tax,
        "created_at": CREATED_AT,
        "updated_at": CREATED_AT,
    }
    return Order(**{**defaults, **fields})


def with_status(order: Order, status: OrderStatus, **fields: Any) -> Order:
    """Returns the order in another status, whether or not that status may follow. `fields` are further new values."""
    return structs.replace(order, status=status, **fields)


def menu_item(**fields: Any) -> MenuItem:
    defaults: dict[str, Any] = {
        "id": new_id(),
        "restaurant_id": RESTAURANT,
        "name": "Masala Dosa",
        "price": 900,
        "category": "Mains",
        "created_at": CREATED_AT,
        "updated_at": CREATED_AT,
    }
    return MenuItem(**{**defaults, **fields})


def change(
    state: Struct, *, event: str | None = None, base: Change | None = None, before: Struct | None = None, **fields: Any
) -> Change:
    """Returns the change that leads to `state`: a creation, or a change built on `base`. `fields` override fields of
    the change, such as `entityversion`, `id`, `type` or `restaurantid`."""
    entity = next(one for one in ENTITIES.values() if isinstance(state, one.state))
    id_, restaurant = state.id, state.restaurant_id  # type: ignore[attr-defined]
    after, old = encode(state), encode(changed_fields(before, state))
    version = fields.get("entityversion") or (base.entityversion + 1 if base else 1)
    type_ = entity.type(event or ("updated" if base else "created"))
    base_id = base.id if base else None
    made = Change(
        id=change_id(id_, version, b"\0".join((type_.encode(), (base_id or "").encode(), old, after))),
        source="orders",
        type=type_,
        subject=f"{entity.name}/{id_}",
        time=now(),
        restaurantid=restaurant,
        priority=entity.lane.priority,
        entityversion=version,
        basechangeid=base_id,
        data=ChangeData(after=Raw(after), before=Raw(old)),
    )
    return structs.replace(made, **fields)


def message(*changes: Change | bytes) -> bytes:
    """One message body; a change given as bytes is sent as it is."""
    return encode_batch(one if isinstance(one, bytes) else encode(one) for one in changes)
