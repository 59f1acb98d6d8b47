"""The change in each frozen sample, with every field filled. As a program, this module writes missing samples."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from msgspec import Raw, Struct, structs

from shared.entities.bay import Bay
from shared.entities.brand import Brand
from shared.entities.category import Category
from shared.entities.change_id import change_id
from shared.entities.contract import Change, ChangeData, changed_fields, encode
from shared.entities.customer import Customer, LoyaltyMove
from shared.entities.entity import event_of
from shared.entities.inventory_item import InventoryItem, StockMove
from shared.entities.job import BayJob, JobStage
from shared.entities.menu_item import Consumption, CustomizationGroup, MenuItem, Option
from shared.entities.order import Customization, Order, OrderItem, OrderStatus, Payment, PaymentStatus, StockHold
from shared.entities.registry import ENTITIES
from shared.entities.table import DiningTable, TableState

SAMPLES = Path(__file__).parent / "samples"

RESTAURANT = "11111111-1111-4111-8111-111111111111"
AT = datetime(2026, 3, 14, 12, 30, 0, 250_000, tzinfo=UTC)
LATER = datetime(2026, 3, 14, 12, 45, tzinfo=UTC)


def _id(n: int) -> str:
    return f"{n:08d}-0000-4000-8000-000000000000"


_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ORDER = Order(
    id=_id(1),
    restaurant_id=RESTAURANT,
    order_number="0042",
    business_day=date(2026, 3, 14),
    status=OrderStatus.PENDING,
    items=(
        OrderItem(
            menu_item_id=_id(2),
            name="Masala Dosa",
            quantity=2,
            unit_price=900,
            line_total=1_800,
            special_instructions="extra crisp",
            customizations=(Customization("chutney", "coconut"),),
        ),
        OrderItem(menu_item_id=_id(3), name="Crème brûlée", quantity=1, unit_price=650, line_total=650),
    ),
    currency="EUR",
    subtotal=2_450,
    tax_basis_points=500,
    tax_amount=123,
    tip_amount=200,
    discount_amount=100,
    deposit_used=50,
    total=2_623,
    created_at=AT,
    updated_at=AT,
    table_id=_id(4),
    customer_name="Ada",
    customer_phone="+49 30 1234",
    customer_session_id="session-1",
    payment_method="card",
    payment_status=PaymentStatus.PARTIALLY_PAID,
    payments=(
        Payment(id=_id(5), amount=500, method="card", created_at=AT, reference="auth 77"),
        Payment(id=_id(6), amount=-100, method="cash", created_at=LATER),
    ),
    notes="birthday",
    special_instructions="no nuts",
    placed_by="session-1",
    request_hash=_HASH,
)
MENU_ITEM = MenuItem(
    id=_id(2),
    restaurant_id=RESTAURANT,
    name="Masala Dosa",
    price=900,
    category="Mains",
    created_at=AT,
    updated_at=AT,
    description="Rice crêpe, spiced potatoes",
)
TABLE = DiningTable(id=_id(4), restaurant_id=RESTAURANT, label="Window 4", seats=4, created_at=AT, updated_at=AT)

_COMMON: dict[str, Any] = {"restaurant_id": RESTAURANT, "created_at": AT, "updated_at": AT}
CATEGORY = Category(
    id=_id(10), name="Mains", description="Big ones", image_url="https://e.com/m.jpg", position=2, **_COMMON
)
BRAND = Brand(id=_id(11), name="House", description="Ours", image_url="https://e.com/h.jpg", position=1, **_COMMON)
BAY = Bay(id=_id(12), name="Grill", kind="kitchen", **_COMMON)
JOB = BayJob(
    id=_id(13),
    bay_id=_id(12),
    title="Two dosas",
    place="1773492300000000177349140025",
    order_id=_id(1),
    scheduled_at=LATER,
    expected_minutes=12,
    notes="crisp",
    assigned_to="Kim",
    **_COMMON,
)
CUSTOMER = Customer(
    id=_id(14),
    name="Ada",
    phone="+4930123456",
    email="ada@example.com",
    notes="by the window",
    loyalty_moves=(LoyaltyMove(id=_id(15), points=-50, created_at=AT, reason="free coffee"),),
    **_COMMON,
)
INVENTORY_ITEM = InventoryItem(
    id=_id(7),
    name="Batter",
    quantity=40,
    counted_at=AT,
    unit="ladle",
    low_at=10,
    moves=(StockMove(id=_id(16), quantity=24, created_at=AT, reason="delivery"),),
    **_COMMON,
)

CREATED: dict[str, Struct] = {
    "order": ORDER,
    "menu_item": MENU_ITEM,
    "table": TABLE,
    "category": CATEGORY,
    "brand": BRAND,
    "bay": BAY,
    "job": JOB,
    "customer": CUSTOMER,
    "inventory_item": INVENTORY_ITEM,
}
# Fields that were added to an entity since its first samples. Each revision builds on the previous one. An added field
# has a default, so that older samples stay readable.
ADDED: dict[str, list[dict[str, Any]]] = {
    "order": [
        {
            "items": (
                structs.replace(ORDER.items[0], customizations=(Customization("chutney", "coconut", 50),)),
                ORDER.items[1],
            ),
            "customer_id": _id(14),
            "external_id": "pos-77",
            "holds": (StockHold(_id(7), 4), StockHold(_id(7), 2, LATER)),
        },
        {"payments": (structs.replace(ORDER.payments[0], request_key=_id(19)), ORDER.payments[1])},
    ],
    "menu_item": [
        {
            "brand": "House",
            "image_url": "https://example.com/dosa.jpg",
            "customizations": (CustomizationGroup("chutney", (Option("coconut", 50), Option("mint", 0, False)), 1, 2),),
            "consumes": (Consumption(_id(7), 2),),
        },
        {"request_hash": _HASH},
    ],
    "table": [{"state": TableState.RESERVED}, {"request_hash": _HASH}],
    "category": [{"request_hash": _HASH}],
    "brand": [{"request_hash": _HASH}],
    "bay": [{"request_hash": _HASH}],
    "job": [{"request_hash": _HASH}],
    "customer": [
        {
            "request_hash": _HASH,
            "loyalty_moves": (structs.replace(CUSTOMER.loyalty_moves[0], request_key=_id(19)),),
        }
    ],
    "inventory_item": [
        {"request_hash": _HASH, "moves": (structs.replace(INVENTORY_ITEM.moves[0], request_key=_id(19)),)}
    ],
}
# The revision of the first samples whose changes name an actor.
FIRST_WITH_ACTOR = {"order": 2, "menu_item": 2, "table": 2}
# The fields that an update of each entity changes; every other event changes the same fields in all entities.
UPDATED: dict[str, dict[str, Any]] = {
    "order": {"notes": "birthday, 2 candles", "customer_phone": None},
    "menu_item": {"price": 950, "is_available": False},
    "table": {"seats": 6},
    "category": {"position": 3},
    "brand": {"name": "House & Garden"},
    "bay": {"is_open": False},
    "job": {"notes": None},
    "customer": {"name": "Ada L."},
    "inventory_item": {"quantity": 64},
}
CHANGED: dict[str, dict[str, Any]] = {
    "status_changed": {"status": OrderStatus.RECEIVED},
    "stage_changed": {"stage": JobStage.IN_PROGRESS, "started_at": LATER},
    "payment_recorded": {
        "payments": (*ORDER.payments, Payment(id=_id(17), amount=2_223, method="card", created_at=LATER))
    },
    "deleted": {"deleted_at": LATER},
    "restored": {"deleted_at": None},
}


def revisions(name: str) -> int:
    return 1 + len(ADDED.get(name, ()))


def path_of(type_: str, revision: int) -> Path:
    return SAMPLES / (f"{type_}.json" if revision == 1 else f"{type_}.{revision}.json")


def sample(type_: str, revision: int) -> Change:
    name, event, _ = event_of(type_)
    entity, before, after = ENTITIES[name], None, CREATED[name]
    for added in ADDED.get(name, [])[: revision - 1]:
        after = structs.replace(after, **added)
    version = 1
    if event != "created":
        before = structs.replace(after, deleted_at=LATER) if event == "restored" else after
        after = structs.replace(before, **CHANGED.get(event) or UPDATED[name], updated_at=LATER)
        version = 3
    return Change(
        id=change_id(after.id, version, encode(after)),  # type: ignore[attr-defined]
        source="orders",
        type=type_,
        subject=f"{name}/{after.id}",  # type: ignore[attr-defined]
        time=LATER if before else AT,
        restaurantid=RESTAURANT,
        priority=entity.lane.priority,
        entityversion=version,
        basechangeid=_id(9) if before else None,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        actor=_id(18) if revision >= FIRST_WITH_ACTOR.get(name, 1) else None,
        data=ChangeData(after=Raw(encode(after)), before=Raw(encode(changed_fields(before, after)))),
    )


def main() -> None:
    for entity in ENTITIES.values():
        for event in entity.events:
            type_, last = entity.type(event), revisions(entity.name)
            path = path_of(type_, last)
            if not path.exists():
                path.write_bytes(encode(sample(type_, last)))
                print(f"frozen: {path.name}")


if __name__ == "__main__":
    main()
