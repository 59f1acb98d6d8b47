"""Request bodies and queries. Unknown fields are refused. Money is an integer in minor units. In a change, absent
fields keep their values."""

from datetime import date
from typing import Annotated
from uuid import UUID

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.entities.contract import Amount, Money, Text, Time
from shared.entities.customer import Points
from shared.entities.inventory_item import Count
from shared.entities.inventory_item import Quantity as StockQuantity
from shared.entities.job import JobStage, Minutes
from shared.entities.menu_item import Choices, Units, Url
from shared.entities.order import OrderStatus, Quantity
from shared.entities.table import Seats, TableState
from shared.http.endpoint import ListQuery
from shared.http.texts import Email, Label


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


# -- orders ------------------------------------------------------------------------------------------------------


class RequestedCustomization(Struct, forbid_unknown_fields=True, frozen=True):
    name: Label
    option: Label


class RequestedItem(Struct, forbid_unknown_fields=True, frozen=True):
    menu_item_id: UUID
    quantity: Quantity
    special_instructions: Text | None = None
    customizations: Annotated[list[RequestedCustomization], Meta(max_length=50)] = []


# An amount in minor units. The limit is far above any tip, and low enough that every sum stays within the contract.
Charge = Annotated[int, Meta(ge=0, le=10**11)]
Items = Annotated[list[RequestedItem], Meta(min_length=1, max_length=1_000)]


class PlaceOrder(Struct, forbid_unknown_fields=True, frozen=True):
    items: Items
    table_id: UUID | None = None
    customer_id: UUID | None = None
    customer_name: Label | None = None
    customer_phone: Label | None = None
    customer_session_id: Label | None = None
    tip_amount: Charge = 0
    discount_amount: Charge = 0
    deposit_used: Charge = 0
    payment_method: Label | None = None
    notes: Text | None = None
    special_instructions: Text | None = None


class UpdateOrder(Struct, forbid_unknown_fields=True, frozen=True):
    items: Items | UnsetType = UNSET
    table_id: UUID | UnsetType | None = UNSET
    customer_id: UUID | UnsetType | None = UNSET
    customer_name: Label | UnsetType | None = UNSET
    customer_phone: Label | UnsetType | None = UNSET
    tip_amount: Charge | UnsetType = UNSET
    discount_amount: Charge | UnsetType = UNSET
    payment_method: Label | UnsetType | None = UNSET
    notes: Text | UnsetType | None = UNSET
    special_instructions: Text | UnsetType | None = UNSET
    status: OrderStatus | UnsetType = UNSET


class OrdersQuery(ListQuery, kw_only=True):
    status: list[OrderStatus] | None = None
    table_id: UUID | None = None
    customer_id: UUID | None = None
    customer_name: Label | None = None


class DaysQuery(Request, rename={"from_": "from"}):
    """A range of business days, by default the last thirty."""

    from_: date | None = None
    to: date | None = None


class RecordPayment(Request):
    """`amount` is negative for a refund. A payment with the same `id` is recorded once, however often it is sent.
    Without an `id`, the header Idempotency-Key does the same."""

    amount: Amount
    method: Label
    id: UUID | None = None
    reference: Label | None = None


class PaymentsQuery(Request, rename={"from_": "from"}):
    from_: Time | None = None
    to: Time | None = None
    method: Label | None = None
    order_id: UUID | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | None = None


# -- the menu ----------------------------------------------------------------------------------------------------


class OptionRequest(Request):
    name: Label
    price: Money = 0
    is_available: bool = True


class OptionGroupRequest(Request):
    name: Label
    options: Annotated[list[OptionRequest], Meta(min_length=1, max_length=100)]
    min_choices: Choices = 0
    max_choices: Choices = 1


class ConsumptionRequest(Request):
    inventory_item_id: UUID
    quantity: Units


Groups = Annotated[list[OptionGroupRequest], Meta(max_length=50)]
Consumptions = Annotated[list[ConsumptionRequest], Meta(max_length=50)]


class CreateMenuItem(Request):
    name: Label
    price: Money
    category: Label
    description: Text | None = None
    brand: Label | None = None
    is_available: bool = True
    image_url: Url | None = None
    customizations: Groups = []
    consumes: Consumptions = []


class UpdateMenuItem(Request):
    name: Label | UnsetType = UNSET
    price: Money | UnsetType = UNSET
    category: Label | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET
    brand: Label | UnsetType | None = UNSET
    is_available: bool | UnsetType = UNSET
    image_url: Url | UnsetType | None = UNSET
    customizations: Groups | UnsetType = UNSET
    consumes: Consumptions | UnsetType = UNSET


class MenuQuery(ListQuery, kw_only=True):
    category: Label | None = None
    brand: Label | None = None
    is_available: bool | None = None


class SetAvailability(Request):
    menu_item_ids: Annotated[list[UUID], Meta(min_length=1, max_length=500)]
    is_available: bool


class CreateHeading(Request):
    """A category or a brand."""

    name: Label
    description: Text | None = None
    image_url: Url | None = None
    position: Annotated[int, Meta(ge=0, le=10_000)] = 0


class UpdateHeading(Request):
    name: Label | UnsetType = UNSET
    description: Text | UnsetType | None = UNSET
    image_url: Url | UnsetType | None = UNSET
    position: Annotated[int, Meta(ge=0, le=10_000)] | UnsetType = UNSET


# -- tables, bays and jobs ---------------------------------------------------------------------------------------


class CreateTable(Request):
    label: Label
    seats: Seats
    state: TableState = TableState.FREE


class UpdateTable(Request):
    label: Label | UnsetType = UNSET
    seats: Seats | UnsetType = UNSET
    state: TableState | UnsetType = UNSET


class TablesQuery(ListQuery, kw_only=True):
    state: list[TableState] | None = None


class CreateBay(Request):
    name: Label
    kind: Label | None = None
    is_open: bool = True


class UpdateBay(Request):
    name: Label | UnsetType = UNSET
    kind: Label | UnsetType | None = UNSET
    is_open: bool | UnsetType = UNSET


class BaysQuery(ListQuery, kw_only=True):
    kind: Label | None = None
    is_open: bool | None = None


class CreateJob(Request):
    bay_id: UUID
    title: Label
    order_id: UUID | None = None
    scheduled_at: Time | None = None
    expected_minutes: Minutes | None = None
    notes: Text | None = None
    assigned_to: Label | None = None


class UpdateJob(Request):
    """`position` is the position in the bay's queue. The next job has position 1."""

    bay_id: UUID | UnsetType = UNSET
    title: Label | UnsetType = UNSET
    order_id: UUID | UnsetType | None = UNSET
    scheduled_at: Time | UnsetType | None = UNSET
    expected_minutes: Minutes | UnsetType | None = UNSET
    notes: Text | UnsetType | None = UNSET
    assigned_to: Label | UnsetType | None = UNSET
    stage: JobStage | UnsetType = UNSET
    position: Annotated[int, Meta(ge=1, le=10_000)] | UnsetType = UNSET


class JobsQuery(ListQuery, kw_only=True):
    bay_id: UUID | None = None
    order_id: UUID | None = None
    stage: list[JobStage] | None = None


# -- customers and stock -----------------------------------------------------------------------------------------


class CreateCustomer(Request):
    """`phone` is in E.164 format, or as it is dialled in the restaurant's country."""

    name: Label
    phone: Label | None = None
    email: Email | None = None
    notes: Text | None = None


class UpdateCustomer(Request):
    name: Label | UnsetType = UNSET
    phone: Label | UnsetType | None = UNSET
    email: Email | UnsetType | None = UNSET
    notes: Text | UnsetType | None = UNSET


class CustomersQuery(ListQuery, kw_only=True):
    phone: Annotated[str, Meta(max_length=200)] | None = None
    name: Label | None = None


class MoveLoyalty(Request):
    """Negative points are redeemed. A move with the same `id` is recorded once, however often it is sent. Without an
    `id`, the header Idempotency-Key does the same."""

    points: Points
    id: UUID | None = None
    reason: Label | None = None


class CreateInventoryItem(Request):
    name: Label
    quantity: Count
    unit: Label = "piece"
    low_at: Count | None = None


class UpdateInventoryItem(Request):
    """`quantity` is the amount that was counted now. Orders that were placed before the count are already
    subtracted."""

    name: Label | UnsetType = UNSET
    quantity: Count | UnsetType = UNSET
    unit: Label | UnsetType = UNSET
    low_at: Count | UnsetType | None = UNSET


class MoveStock(Request):
    """A delivery, or a loss with a negative quantity. A move with the same `id` is recorded once, however often it is
    sent. Without an `id`, the header Idempotency-Key does the same."""

    quantity: StockQuantity
    id: UUID | None = None
    reason: Label | None = None
