"""Orders under the law of prices, without any store, and random histories of them.

`placed` opens an order. `histories` draws a history of one order: some commands, then two or three branches that know
nothing of each other, as forks, offline terminals and imports make them.
"""

from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import hypothesis.strategies as st
from msgspec import Struct, structs

from shared.entities.menu_item import Consumption
from shared.entities.order import kitchen, lifecycle, lines, payments, registers
from shared.entities.order.acts import Act, Role
from shared.entities.order.lines import NewLine, NewVoid
from shared.entities.order.opening import NewOrder, place
from shared.entities.order.payments import NewPayment, NewRefund
from shared.entities.order.refusals import Refused
from shared.entities.order.state import Discount, KitchenState, Line, Order, OrderStatus, Service
from shared.entities.order.terms import OrderType, Rounding, ServiceCharge, Tax, TaxedDiscounts, TaxMode, Terms
from shared.entities.order.writing import rank
from tests.rigs.builders import CREATED_AT, RESTAURANT

DAY = date(2026, 3, 14)
FLOUR = "f1000000-0000-4000-8000-000000000000"


def named(name: str) -> str:
    """Returns the same UUID for the same name."""
    return str(uuid5(NAMESPACE_OID, name))


def act(version: int = 2, *, minutes: int | None = None, role: Role = Role.STAFF, **fields: Any) -> Act:
    """Returns an act of the staff, by default one minute later for each version."""
    at = CREATED_AT + timedelta(minutes=version - 1 if minutes is None else minutes)
    return Act(version=version, at=at, by="anna", role=role, **fields)


def line(name: str, price: int, ordered: int = 1, **fields: Any) -> NewLine:
    return NewLine(
        **{
            "id": named(name),
            "menu_item_id": named(f"dish {name}"),
            "name": name,
            "unit_price": price,
            "ordered": ordered,
            **fields,
        }
    )


def rates(mode: TaxMode = TaxMode.EXCLUSIVE, **by_category: int | dict[str, int]) -> Tax:
    """Returns a tax with these rates in parts per million: one of a category, or one of each order type."""
    found = {name: {"default": rate} if isinstance(rate, int) else rate for name, rate in by_category.items()}
    return Tax(mode=mode, rates=found)


def placed(*new: NewLine, terms: Terms | Tax | None = None, **fields: Any) -> Order:
    """Returns an order with these lines. The default tax is the one of the original systems: 5 % on the full price."""
    if isinstance(terms, Tax):
        terms = Terms(tax=terms)
    return place(
        NewOrder(
            id=named("order"),
            restaurant_id=RESTAURANT,
            business_day=DAY,
            currency=fields.pop("currency", "EUR"),
            terms=terms or Terms(tax=Tax.added(500)),
            order_number="0001",
        ),
        act(1),
        new,
        **fields,
    )


def accepted(*new: NewLine, **fields: Any) -> Order:
    return placed(*new, auto_accept=True, **fields)


def item(order: Order, name: str) -> Line:
    return next(one for one in order.items if one.id == named(name))


def paid(order: Order, amount: int, name: str = "payment", version: int = 3, **fields: Any) -> Order:
    new = NewPayment(**{"id": named(name), "amount": amount, "method": "card", **fields})
    return payments.pay(order, act(version), new)


def refunded(order: Order, amount: int, name: str = "refund", version: int = 4, **fields: Any) -> Order:
    new = NewRefund(**{"id": named(name), "amount": amount, "method": "card", "reason": "cold", **fields})
    return payments.refund(order, act(version), new)


# -- random histories --------------------------------------------------------------------------------------------

PRICES = st.one_of(st.integers(0, 3_000), st.integers(0, 10**9))
PPM = st.sampled_from([0, 50_000, 70_000, 88_750, 190_000, 1_000_000])
CATEGORIES = ("standard", "drinks", "books")


@st.composite
def taxes(draw: st.DrawFn) -> Tax:
    return Tax(
        mode=draw(st.sampled_from(TaxMode)),
        rounding=draw(st.sampled_from(Rounding)),
        discounts=draw(st.sampled_from(TaxedDiscounts)),
        rates={
            name: {"default": draw(PPM), "takeaway": draw(PPM)}
            for name in draw(st.sets(st.sampled_from(CATEGORIES[:2])))
        },
    )


charges = st.builds(
    ServiceCharge,
    bp=st.integers(0, 2_000),
    types=st.just((OrderType.DINE_IN, OrderType.DELIVERY)),
    min_guests=st.integers(0, 3),
    tax=st.sampled_from([None, "as_lines", "untaxed", "drinks"]),
)
discounts = st.one_of(
    st.builds(Discount, bp=st.integers(0, 10_000), reason=st.just("regular")),
    st.builds(Discount, amount=st.integers(0, 5_000), reason=st.just("regular")),
)


@st.composite
def new_lines(draw: st.DrawFn, label: str) -> NewLine:
    return line(
        f"{label} {draw(st.integers(0, 2))}",
        draw(PRICES),
        draw(st.integers(1, 5)),
        tax_category=draw(st.sampled_from([None, *CATEGORIES])),
        course=draw(st.integers(0, 3)),
        hold=draw(st.booleans()),
        special_instructions=draw(st.sampled_from([None, "no onions", "for Ada"])),
        consumes=draw(st.sampled_from([(), (Consumption(FLOUR, 2),)])),
    )


Command = Callable[[Order, Act], Order]


@st.composite
def commands(draw: st.DrawFn, label: str, name: str | None = None) -> tuple[str, Command]:
    """Returns the name of a command and the command. `label` makes the ids of its facts; places in the order are chosen
    by number, because the order is not known yet."""
    place_, amount, flag = draw(st.integers(0, 9)), draw(st.integers(1, 3_000)), draw(st.booleans())

    def at(order: Order) -> str:
        return order.items[place_ % len(order.items)].id if order.items else named("no line")

    name = name or draw(st.sampled_from(_NAMES))
    match name:
        case "add":
            new = tuple(draw(st.lists(new_lines(label), min_size=1, max_size=2, unique_by=lambda one: one.id)))
            return name, lambda order, act: lines.add_lines(order, act, new)
        case "void":
            pieces = draw(st.one_of(st.none(), st.integers(1, 3)))
            return name, lambda order, act: lines.void(
                order, act, NewVoid(id=named(label), line=at(order), quantity=pieces, reason="dropped")
            )
        case "edit":
            text, course = draw(st.sampled_from([None, "well done", "for Ben"])), draw(st.integers(0, 3))
            return name, lambda order, act: lines.edit_line(
                order, act, at(order), special_instructions=text, course=course
            )
        case "discount line":
            discount = draw(st.one_of(st.none(), discounts))
            return name, lambda order, act: lines.discount_line(order, act, at(order), discount)
        case "comp":
            return name, lambda order, act: lines.comp(order, act, at(order), "apology")
        case "accept":
            return name, kitchen.accept
        case "cook" | "recall":
            state = draw(st.sampled_from([one for one in KitchenState if one is not KitchenState.NEW]))
            return name, lambda order, act: kitchen.cook(
                order, act, state, items=[at(order)] if flag else None, recall=name == "recall"
            )
        case "edit order":
            fields = draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "table_id": st.sampled_from([None, named("table 1"), named("table 2")]),
                        "type": st.sampled_from(OrderType),
                        "guests": st.one_of(st.none(), st.integers(1, 8)),
                        "notes": st.sampled_from([None, "birthday", "window"]),
                        "customer_name": st.sampled_from([None, "Ada", "Ben"]),
                        "customer_phone": st.sampled_from([None, "+4930123456"]),
                        "tip": st.integers(0, 500),
                        "deposit_used": st.integers(0, 500),
                    },
                )
            )
            return name, lambda order, act: registers.edit_order(order, act, **fields)
        case "discount":
            discount = draw(st.one_of(st.none(), discounts))
            return name, lambda order, act: registers.discount_order(order, act, discount)
        case "service":
            service = draw(st.sampled_from([None, Service(0, "waived"), Service(1_250, "party")]))
            return name, lambda order, act: registers.set_service(order, act, service)
        case "pay":
            tip = draw(st.integers(0, 100))

            def pay(order: Order, act: Act) -> Order:
                part = order.balance if flag else amount
                new = NewPayment(id=named(label), amount=max(0, part) + tip, tip=tip, method="card")
                return payments.pay(order, act, new)

            return name, pay
        case "refund":
            return name, lambda order, act: payments.refund(
                order, act, NewRefund(id=named(label), amount=amount, method="card", reason="cold", correction=flag)
            )
        case "status":
            status = draw(st.sampled_from(OrderStatus))
            return name, lambda order, act: lifecycle.set_status(order, act, status)
        case "tell":
            tax, total = (draw(st.one_of(st.none(), st.integers(0, 9_000))) for _ in range(2))
            return name, lambda order, act: registers.tell(order, act, subtotal=amount, tax_amount=tax, total=total)
        case "erase":
            return name, lambda order, act: lifecycle.erase(order, act.at)
        case "put":
            wanted = draw(st.integers(1, 4))

            def put(order: Order, act: Act) -> Order:
                kept = [
                    lines.Wanted(
                        one.menu_item_id,
                        wanted,
                        tuple((choice.name, choice.option) for choice in one.customizations),
                        one.special_instructions,
                    )
                    for one in order.items[place_ % 2 :: 2]
                ]
                plan = lines.plan_items(order, kept)
                more = [
                    line(f"{label} {place}", 700, pieces, menu_item_id=kept[place].menu_item_id)
                    for place, pieces in plan.more
                ]
                return lines.put_items(order, act, plan, more)

            return name, put
        case "complete":
            return name, lifecycle.complete
        case "cancel":
            return name, lifecycle.cancel
        case "reopen":
            return name, lifecycle.reopen
        case "delete":
            return name, lifecycle.delete
        case "restore":
            return name, lifecycle.restore
    raise AssertionError(name)


_NAMES = [
    *("add", "add", "add", "void", "void", "edit", "edit", "discount line", "comp", "accept", "accept", "put", "put"),
    *("cook", "cook", "cook", "recall", "recall", "recall", "edit order", "edit order", "discount", "service", "tell"),
    *("pay", "pay", "pay", "refund", "refund", "status", "status", "complete", "reopen", "cancel", "delete", "restore"),
    "erase",
]


class Step(Struct, frozen=True):
    """One command that was not refused."""

    name: str
    before: Order
    after: Order


class History(Struct, frozen=True):
    trunk: Order
    """What all branches know."""
    branches: list[Order]
    steps: list[Step]


def _step(draw: st.DrawFn, order: Order, label: str, version: int, steps: list[Step], name: str | None = None) -> Order:
    name, command = draw(commands(label, name))
    try:
        after = command(order, act(version, role=Role.MANAGER))
    except Refused:
        return order
    steps.append(Step(name, order, after))
    return after


def _walk(draw: st.DrawFn, order: Order, label: str, versions: range, steps: list[Step]) -> Order:
    for version in versions:
        order = _step(draw, order, f"{label}{version}", version, steps)
    return order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    charge = draw(st.one_of(st.none(), charges))
    new = draw(st.lists(new_lines("first"), min_size=1, max_size=3, unique_by=lambda one: one.id))
    fields = {"type": draw(st.sampled_from(OrderType)), "guests": draw(st.one_of(st.none(), st.integers(1, 4)))}
    terms = Terms(tax=draw(taxes()), service_charge=charge)
    order = placed(*new, terms=terms, auto_accept=draw(st.integers(0, 3)) > 0, **fields)
    state = draw(st.sampled_from([one for one in KitchenState if rank(one) >= rank(KitchenState.FIRED)]))
    return order if order.accepted is None else kitchen.cook(order, act(1), state)


_CLASHES = [
    "edit order",
    "edit order",
    "edit",
    "discount line",
    "discount",
    "service",
    "cook",
    "recall",
    "status",
    "void",
]


@st.composite
def histories(draw: st.DrawFn, branches: int = 3) -> History:
    """Returns an order that took `branches` ways at once. Their versions overlap, and at the end all of them do the
    same thing in other ways as one version, so that registers meet with one rev and with several."""
    steps: list[Step] = []
    trunk = _walk(draw, draw(orders()), "trunk ", range(2, 2 + draw(st.integers(1, 4))), steps)
    ends = []
    clashes = draw(st.lists(st.sampled_from(_CLASHES), max_size=2))
    for number in range(branches):
        label = f"branch {number} "
        end = _walk(draw, trunk, label, range(7, 7 + draw(st.integers(0, 3))), steps)
        for version, name in enumerate(clashes, start=11):
            end = _step(draw, end, f"{label}{version}", version, steps, name)
        ends.append(end)
    return History(trunk, ends, steps)


@st.composite
def shuffled(draw: st.DrawFn, order: Order) -> Order:
    """Returns the same order with its lines, payments and voids in another sequence."""

    def other(found: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.permutations(found)))

    items = tuple(structs.replace(one, voids=other(one.voids)) for one in other(order.items))
    return structs.replace(order, items=items, payments=other(order.payments), prints=other(order.prints))


def later(minutes: int) -> datetime:
    return CREATED_AT + timedelta(minutes=minutes)
