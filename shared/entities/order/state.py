"""The shape of an order, its lines and its payments.

    fixed      set once, at creation; never changed
    registers  last writer wins: the larger (version that wrote it, canonical JSON)
    facts      lines, voids, payments, prints, flags: added, never changed or removed
    derived    everything else, computed by `derive` and stored for readers

So any two states of one order can be merged (merge.py). Money is in minor units of the currency. Personal fields are
marked P; an erasure empties them.

A field whose value is its default is absent on the wire, except a field with `always(...)`. The default of an absent
field is None, 0, False, an enum, () or {}: msgspec compares it by identity, and equal states must have equal bytes.
"""

from datetime import date
from enum import StrEnum
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field

from shared.entities.contract import Amount, Id, Label, Money, Text, Time, Version
from shared.entities.menu_item import Consumption
from shared.entities.order.terms import BasisPoints, Guests, OrderType, Terms

MAX_LINES = 1_000
MAX_PAYMENTS = 1_000
MAX_SUBTOTAL = 10**11
"""In minor units. Commands refuse to exceed these three limits; a merge keeps everything."""
_MERGED = 100_000
"""The number of lines or payments that the contract accepts, so that it refuses no merge of valid states."""

Sum = Annotated[int, Meta(ge=0, lt=2**53, examples=[1960])]
"""A derived amount in minor units. Merged orders may exceed the limits of commands; JSON readers stay exact below
2^53."""
Balance = Annotated[int, Meta(gt=-(2**53), lt=2**53, examples=[0])]
Ordered = Annotated[int, Meta(ge=1, le=1_000)]
Pieces = Annotated[int, Meta(ge=0, le=1_000)]
Course = Annotated[int, Meta(ge=0, le=9)]
Seat = Annotated[int, Meta(ge=1, le=1_000)]
Rev = Annotated[int, Meta(ge=0, lt=2**31)]
"""The version of the order that wrote a register."""


def always(default: Any) -> Any:
    """Returns a field with a default that is always encoded, because readers expect it."""
    return field(default_factory=lambda: default)


class OrderStatus(StrEnum):
    PENDING = "pending"
    RECEIVED = "received"
    PREPARING = "preparing"
    READY = "ready"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


class PaymentStatus(StrEnum):
    PENDING = "pending"
    PARTIALLY_PAID = "partially_paid"
    PAID = "paid"
    REFUND_DUE = "refund_due"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"


class ClosedAs(StrEnum):
    COMPLETED = "completed"
    CANCELLED = "cancelled"


class KitchenState(StrEnum):
    """The progress of a line in the kitchen, in this sequence."""

    NEW = "new"
    """Not sent to the kitchen yet. It is sent when the order is accepted, or when its course comes."""
    HOLD = "hold"
    """Held back until somebody fires it."""
    FIRED = "fired"
    STARTED = "started"
    READY = "ready"
    SERVED = "served"


# -- values of registers -----------------------------------------------------------------------------------------


class Discount(Struct, frozen=True, omit_defaults=True):
    """Basis points or an amount; only one of them is set."""

    bp: BasisPoints | None = None
    amount: Money | None = None
    reason: Label | None = None
    comp: bool = False
    """Whether a line is on the house. A comp is a discount of 10,000 basis points."""


class ServiceRate(Struct, frozen=True):
    """A service charge that replaces the one of the terms; 0 waives it."""

    bp: BasisPoints
    reason: Label | None = None


class Mark(Struct, frozen=True, omit_defaults=True):
    """The time, the author and the reason of an acceptance or a deletion."""

    at: Time
    by: Label | None = None
    reason: Label | None = None


class Closed(Struct, frozen=True, omit_defaults=True):
    as_: ClosedAs = field(name="as")
    at: Time
    lines: Annotated[int, Meta(ge=0, le=_MERGED)]
    """The number of lines at that moment. If the order has more, somebody added lines without knowing that it was
    closed."""
    by: Label | None = None
    reason: Label | None = None


class Told(Struct, frozen=True, omit_defaults=True):
    """Told amounts: another system computed them. They count until a line, a discount or another part of the price
    changes here. `total` excludes the tips of our payments."""

    basis: Label
    """A digest of the parts of the price (`pricing.basis`)."""
    subtotal: Money | None = None
    discount_amount: Money | None = None
    tax_amount: Money | None = None
    total: Money | None = None


# -- facts -------------------------------------------------------------------------------------------------------


class Void(Struct, frozen=True, omit_defaults=True):
    id: Id
    at: Time
    by: Label | None = None
    quantity: Ordered | None = None
    """None means the whole line."""
    reason: Label | None = None
    wasted: bool = False
    """Whether the pieces were already made, so that their stock stays taken."""


class Print(Struct, frozen=True):
    id: Id
    line: Id
    station: Label
    copy: Annotated[int, Meta(ge=1, le=100)]
    at: Time


class Payment(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A payment, or a refund if `amount` is negative."""

    id: Id
    amount: Amount
    method: Label
    created_at: Time
    reference: Label | None
    tip: Money = 0
    """The part of `amount` that is a tip."""
    tendered: Money | None = None
    """The cash that the guest gave; `change` went back."""
    change: Money = 0
    refund_of: Id | None = None
    credit: Money = 0
    """The part of a refund that exceeds the money owed back: it lowers the cost of the order."""
    reason: Label | None = None
    business_day: date | None = None
    by: Label | None = None
    request_key: Id | UnsetType = UNSET
    """The id that was derived from the Idempotency-Key of a request, if the request also had an id."""


class Times(Struct, frozen=True, omit_defaults=True):
    """The first time at which a line was in each state."""

    fired: Time | None = None
    started: Time | None = None
    ready: Time | None = None
    served: Time | None = None


class Kitchen(Struct, frozen=True, omit_defaults=True):
    """A register that only moves forward. `rev`: the version of the last recall; only a recall moves a line back."""

    state: KitchenState = always(KitchenState.NEW)
    rev: Rev = 0
    times: Times | None = None


class Customization(Struct, frozen=True):
    """An option that the guest chose. `name` is the name of the customization group. The item's unit price includes
    `price`."""

    name: Label
    option: Label
    price: Money = 0


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A dish of an order. No quantity is ever edited: more is another line, less is a void."""

    id: Id
    menu_item_id: Id
    name: Label
    ordered: Ordered
    unit_price: Money
    """The price of one piece, including its options."""
    customizations: tuple[Customization, ...]
    seq: Annotated[int, Meta(ge=0, lt=2**53)]
    """The version that added it × 1,000 + the place in the request. Lines are sorted by (seq, id)."""
    added_at: Time
    special_instructions: Text | None
    """P. This field, `course`, `seat` and `discount` are one register; `rev` is the version that wrote it."""
    quantity: Pieces = always(0)
    line_total: Sum = always(0)
    discount_amount: Sum = 0
    tax_amount: Sum = always(0)
    net: Sum = always(0)
    """The price of the line after discounts and without tax, including its share of the service charge."""
    kitchen: Kitchen = always(Kitchen())
    added_by: Label | None = None
    """None means `placed_by` of the order."""
    consumes: tuple[Consumption, ...] = ()
    tax_category: Label | None = None
    """None means `standard`."""
    station_id: Id | None = None
    prep_minutes: Annotated[int, Meta(ge=0, le=600)] = 0
    held_at: Time | None = None
    """The time from which the line holds its stock; None means `added_at`. Each addition of lines has its own time, and
    the claim may move it."""
    rev: Rev = 0
    """0 means that the line was never edited."""
    course: Course = 0
    """0 means no course: such a line is never held back."""
    seat: Seat | None = None
    discount: Discount | None = None
    voids: tuple[Void, ...] = ()


# -- derived -----------------------------------------------------------------------------------------------------


class RateTax(Struct, frozen=True):
    """The tax of one rate. `base`: the amount that is taxed, without the tax."""

    rate_ppm: Annotated[int, Meta(ge=0, le=1_000_000)]
    base: Sum
    tax: Sum


class StockHold(Struct, frozen=True, omit_defaults=True):
    """The amount of one inventory item that an order holds since `held_at`; None means since its creation."""

    inventory_item_id: Id
    quantity: Sum
    held_at: Time | None = None


# -- the order ---------------------------------------------------------------------------------------------------


class Order(Struct, frozen=True, kw_only=True, omit_defaults=True):
    # Fixed.
    id: Id
    restaurant_id: Id
    order_number: Annotated[str, Meta(max_length=40, pattern="^[^\\x00]*$")]
    business_day: date
    currency: Annotated[str, Meta(pattern="^[A-Z]{3}$", examples=["EUR"])]
    terms: Terms
    created_at: Time
    customer_session_id: Label | None
    placed_by: Label | None
    """Id of the user, or of the guest's session, that placed the order."""
    external_id: Label | None = None
    """The order's id in another system. The order's own id is derived from it."""
    request_hash: str | None = None
    """SHA-256 of the request if it had an Idempotency-Key. A request that repeats the key must have the same body."""

    # Registers. `revs` has the version that wrote each one; absent means 1.
    type: OrderType = always(OrderType.DINE_IN)
    table_id: Id | None
    guests: Guests | None = None
    scheduled_for: Time | None = None
    notes: Text | None
    """P"""
    special_instructions: Text | None
    """P"""
    customer_id: Id | None
    """P. This and the next four are one register, `contact`."""
    customer_name: Label | None
    customer_phone: Label | None
    customer_email: Label | None = None
    delivery_address: Text | None = None
    payment_method: Label | None
    tip: Money = 0
    deposit_used: Money = always(0)
    discount: Discount | None = None
    service: ServiceRate | None = None
    """None means the service charge of the terms."""
    told: Told | None = None
    accepted: Mark | None = None
    deleted: Mark | None = None
    held_from: Time | None = None
    """The time at which the order was restored; it holds its stock since then. Written together with `deleted`."""
    closed: Closed | None = None
    revs: dict[str, Version] = {}

    # Facts.
    items: Annotated[tuple[Line, ...], Meta(max_length=_MERGED)]
    payments: Annotated[tuple[Payment, ...], Meta(max_length=_MERGED)] = always(())
    prints: Annotated[tuple[Print, ...], Meta(max_length=_MERGED)] = ()
    flags: tuple[Label, ...] = ()
    """Problems that somebody should look at, such as `unverified_table`. The flags in `DERIVED_FLAGS` are derived."""
    erased_at: Time | None = None
    clock: dict[str, int] = {}
    """Installation -> the last row of its outbox that this state contains."""
    updated_at: Time

    # Derived.
    status: OrderStatus = always(OrderStatus.PENDING)
    payment_status: PaymentStatus = always(PaymentStatus.PENDING)
    deleted_at: Time | None = always(None)
    subtotal: Sum = always(0)
    discount_amount: Sum = always(0)
    service_amount: Sum = 0
    service_tax: Sum = 0
    """The tax of a service charge that has a tax category of its own. The lines bear every other tax."""
    tax_basis_points: BasisPoints | None = always(None)
    """None if there are several rates, or if the rate is no whole number of basis points."""
    tax_amount: Sum = always(0)
    tip_amount: Sum = always(0)
    """`tip` and the tips of the payments."""
    total: Sum = always(0)
    total_amount: Sum = always(0)
    """The same as `total`; the original systems use this name."""
    taxes: tuple[RateTax, ...] = always(())
    due: Sum = always(0)
    """The total less the credits, but never below 0. 0 if the order is cancelled or deleted."""
    balance: Balance = always(0)
    """The amount that is left to pay; negative if the restaurant owes money."""
    holds: tuple[StockHold, ...] = ()


CONTACT = ("customer_id", "customer_name", "customer_phone", "customer_email", "delivery_address")

REGISTERS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("type", "table_id", "guests", "scheduled_for", "notes", "special_instructions")},
    "contact": CONTACT,
    **{name: (name,) for name in ("payment_method", "tip", "deposit_used", "discount", "service", "told", "accepted")},
    "deleted": ("deleted", "held_from"),
    "closed": ("closed",),
}
"""Register -> its fields."""

PERSONAL = ("notes", "special_instructions", *CONTACT)
"""The fields of an order that are marked P. A line has one: `special_instructions`."""

LINES_AFTER_CLOSE = "lines_after_close"
AMOUNTS_DO_NOT_ADD_UP = "amounts_do_not_add_up"
FACTS_DIFFER = "facts_differ"
FIXED_VALUES_DIFFER = "fixed_values_differ"
DERIVED_FLAGS = frozenset({LINES_AFTER_CLOSE, AMOUNTS_DO_NOT_ADD_UP})
