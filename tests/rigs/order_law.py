"""Orders under the rules of prices, without any store, and random histories of them.

`placed` opens an order. `histories` draws a history of one order: some commands, then two or three independent
branches, as forks, offline terminals and imports make them.
"""

from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from random import Random
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import hypothesis.strategies as st
from msgspec import Struct, structs

from shared.entities.menu_item import Consumption
from shared.entities.order import kitchen, lifecycle, lines, payments, registers
from shared.entities.order.acts import Act, CallerRole
from shared.entities.order.lines import NewLine, NewVoid
from shared.entities.order.opening import NewOrder, place
from shared.entities.order.payments import NewPayment, NewRefund
from shared.entities.order.refusals import Refused
from shared.entities.order.state import Discount, KitchenState, Line, Order, OrderStatus, ServiceRate
from shared.entities.order.terms import OrderType, Rounding, ServiceCharge, Tax, TaxedDiscounts, TaxMode, Terms
from shared.entities.order.writing import rank
from tests.rigs.builders import CREATED_AT, RESTAURANT

DAY = date(2026, 3, 14)
FLOUR = "f1000000-0000-4000-8000-000000000000"


def named(name: str) -> str:
    """Returns the same UUID for the same name."""
    return str(uuid5(NAMESPACE_OID, name))


def act(version: int = 2, *, minutes: int | None = None, role: CallerRole = CallerRole.STAFF, **fields: Any) -> Act:
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

CATEGORIES = ("standard", "drinks", "books")
_PPM = (0, 50_000, 70_000, 88_750, 190_000, 1_000_000)
Command = Callable[[Order, Act], Order]


class Step(Struct, frozen=True):
    """One command that was not refused."""

    name: str
    before: Order
    after: Order


class History(Struct, frozen=True):
    trunk: Order
    """The state that all branches know."""
    branches: list[Order]
    steps: list[Step]

    def __repr__(self) -> str:
        return f"<{', '.join(step.name for step in self.steps)}>"


class Dice:
    """Draws orders and commands. Hypothesis draws the seed and the lengths alone: if it drew each part, it would be
    slow and would try the same few commands repeatedly."""

    def __init__(self, seed: bytes) -> None:
        self._random = Random(seed)
        self.number, self.one_of = self._random.randint, self._random.choice

    def chance(self, probability: float = 0.5) -> bool:
        return self._random.random() < probability

    def maybe(self, value: Any) -> Any:
        return value if self.chance() else None

    def price(self) -> int:
        return (
            self.number(0, 10**9) if self.chance(0.1) else self.one_of([0, self.number(1, 20), self.number(1, 3_000)])
        )

    def tax(self) -> Tax:
        return Tax(
            mode=self.one_of(list(TaxMode)),
            rounding=self.one_of(list(Rounding)),
            discounts=self.one_of(list(TaxedDiscounts)),
            rates={
                name: {"default": self.one_of(_PPM), "takeaway": self.one_of(_PPM)}
                for name in CATEGORIES[:2]
                if self.chance(0.8)
            },
        )

    def charge(self) -> ServiceCharge:
        return ServiceCharge(
            bp=self.number(0, 2_000),
            types=(OrderType.DINE_IN, OrderType.DELIVERY),
            min_guests=self.number(0, 3),
            tax=self.one_of([None, "as_lines", "untaxed", "drinks"]),
        )

    def discount(self) -> Discount:
        if self.chance():
            return Discount(bp=self.number(0, 10_000), reason="regular")
        return Discount(amount=self.number(0, 3_000), reason="regular")

    def line(self, label: str) -> NewLine:
        return line(
            label,
            self.price(),
            self.number(1, 5),
            tax_category=self.one_of([None, *CATEGORIES]),
            course=self.number(0, 3),
            hold=self.chance(0.2),
            special_instructions=self.one_of([None, "no onions", "for Ada"]),
            consumes=self.one_of([(), (Consumption(FLOUR, 2),)]),
        )

    def order(self) -> Order:
        order = placed(
            *(self.line(f"first {number}") for number in range(self.number(1, 3))),
            terms=Terms(tax=self.tax(), service_charge=self.maybe(self.charge())),
            type=self.one_of(list(OrderType)),
            guests=self.maybe(self.number(1, 4)),
            auto_accept=self.chance(0.7),
        )
        return kitchen.cook(order, act(1), self.one_of(_AT_WORK)) if order.accepted and self.chance() else order

    def fields(self) -> dict[str, Any]:
        found = {
            "table_id": self.one_of([None, named("table 1"), named("table 2")]),
            "type": self.one_of(list(OrderType)),
            "guests": self.maybe(self.number(1, 8)),
            "notes": self.one_of([None, "birthday", "window"]),
            "customer_name": self.one_of([None, "Ada", "Ben"]),
            "customer_phone": self.maybe("+4930123456"),
            "tip": self.number(0, 500),
            "deposit_used": self.number(0, 500),
        }
        return {name: value for name, value in found.items() if self.chance(0.4)}

    def command(self, label: str, name: str, order: Order) -> Command:
        """`label` makes the ids of new facts."""
        at = self.one_of(order.items).id if order.items else named("no line")
        amount = self.one_of([self.number(1, 3_000), max(1, abs(order.balance))])
        id_ = named(label)
        match name:
            case "add":
                new = [self.line(f"{label} {number}") for number in range(self.number(1, 2))]
                return lambda order, act: lines.add_lines(order, act, new)
            case "void":
                pieces = self.maybe(self.number(1, 3))
                fact = NewVoid(id=id_, line=at, quantity=pieces, reason="dropped", wasted=self.maybe(True))
                return lambda order, act: lines.void(order, act, fact)
            case "edit":
                text, course = self.one_of([None, "well done", "for Ben"]), self.number(0, 3)
                return lambda order, act: lines.edit_line(order, act, at, special_instructions=text, course=course)
            case "discount line":
                discount = self.maybe(self.discount())
                return lambda order, act: lines.discount_line(order, act, at, discount)
            case "comp":
                return lambda order, act: lines.comp(order, act, at, "apology")
            case "accept":
                return kitchen.accept
            case "cook" | "recall":
                state, items = self.one_of([KitchenState.HOLD, *_AT_WORK]), self.maybe([at])
                return lambda order, act: kitchen.cook(order, act, state, items=items, recall=name == "recall")
            case "edit order":
                fields = self.fields()
                return lambda order, act: registers.edit_order(order, act, **fields)
            case "discount":
                discount = self.maybe(self.discount())
                return lambda order, act: registers.discount_order(order, act, discount)
            case "service":
                service = self.one_of([None, ServiceRate(0, "waived"), ServiceRate(1_250, "party")])
                return lambda order, act: registers.set_service(order, act, service)
            case "tell":
                tax, total = self.maybe(self.number(0, 900)), self.maybe(self.number(0, 9_000))
                subtotal = self.maybe(amount)
                return lambda order, act: registers.tell(order, act, subtotal=subtotal, tax_amount=tax, total=total)
            case "pay":
                tip = self.one_of([0, self.number(0, 100)])
                payment = NewPayment(id=id_, amount=amount + tip, tip=tip, method="card")
                return lambda order, act: payments.pay(order, act, payment)
            case "refund":
                back = NewRefund(id=id_, amount=amount, method="card", reason="cold", correction=self.chance(0.3))
                return lambda order, act: payments.refund(order, act, back)
            case "status":
                status = self.one_of(list(OrderStatus))
                return lambda order, act: lifecycle.set_status(order, act, status)
            case "put":
                kept = [_wanted(one, self.number(1, 4)) for one in order.items if self.chance(0.7)]
                return lambda order, act: _put(order, act, kept, label)
            case "erase":
                return lambda order, act: lifecycle.erase(order, act.at)
            case _:
                return getattr(lifecycle, name)

    def step(self, order: Order, label: str, version: int, steps: list[Step], name: str | None = None) -> Order:
        name = name or self.one_of(_NAMES)
        try:
            after = self.command(label, name, order)(order, act(version, role=CallerRole.MANAGER))
        except Refused:
            return order
        steps.append(Step(name, order, after))
        return after


_AT_WORK = [state for state in KitchenState if rank(state) >= rank(KitchenState.FIRED)]
_NAMES = [
    *("add", "add", "add", "void", "void", "edit", "edit", "discount line", "comp", "accept", "accept", "put", "put"),
    *("cook", "cook", "cook", "recall", "recall", "edit order", "edit order", "discount", "service", "tell", "tell"),
    *("pay", "pay", "pay", "refund", "refund", "status", "complete", "reopen", "cancel", "delete", "restore", "erase"),
]
_CLASHES = ["edit order", "edit", "discount line", "discount", "service", "cook", "recall", "complete", "void"]


def _wanted(one: Line, pieces: int) -> lines.Wanted:
    options = tuple((choice.name, choice.option) for choice in one.customizations)
    return lines.Wanted(one.menu_item_id, pieces, options, one.special_instructions)


def _put(order: Order, act: Act, wanted: Sequence[lines.Wanted], label: str) -> Order:
    plan = lines.plan_items(order, wanted)
    more = [
        line(f"{label} {place}", 700, pieces, menu_item_id=wanted[place].menu_item_id) for place, pieces in plan.more
    ]
    return lines.put_items(order, act, plan, more)


def _history(seed: bytes, trunk_steps: int, branch_steps: int, clashes: int, branches: int) -> History:
    dice, steps = Dice(seed), list[Step]()
    trunk = dice.order()
    for version in range(2, 2 + trunk_steps):
        trunk = dice.step(trunk, f"trunk {version}", version, steps)
    names = [dice.one_of(_CLASHES) for _ in range(clashes)]
    ends = []
    for number in range(branches):
        end, first = trunk, 2 + trunk_steps
        for version in range(first, first + dice.number(0, branch_steps)):
            end = dice.step(end, f"branch {number} {version}", version, steps)
        for version, name in enumerate(names, first + branch_steps):
            end = dice.step(end, f"branch {number} {version}", version, steps, name)
        ends.append(end)
    return History(trunk, ends, steps)


def histories(branches: int = 3) -> st.SearchStrategy[History]:
    """Returns histories of an order that took `branches` ways at once. The versions of the ways overlap, and at the end
    all of them do the same thing in other ways as one version, so that registers meet with one rev and with several."""
    return st.builds(
        _history, _SEEDS, st.integers(0, 10), st.integers(0, 6), st.integers(0, 2), branches=st.just(branches)
    )


_SEEDS = st.binary(min_size=8, max_size=8)


def orders() -> st.SearchStrategy[Order]:
    return _SEEDS.map(lambda seed: Dice(seed).order())


def new_lines(label: str) -> st.SearchStrategy[NewLine]:
    """Returns lines, often other ones with one id."""
    return st.builds(lambda seed, number: Dice(seed).line(f"{label} {number}"), _SEEDS, st.integers(0, 2))


@st.composite
def shuffled(draw: st.DrawFn, order: Order) -> Order:
    """Returns the same order with its lines, payments and voids in another sequence."""

    def other(found: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.permutations(found)))

    items = tuple(structs.replace(one, voids=other(one.voids)) for one in other(order.items))
    return structs.replace(order, items=items, payments=other(order.payments), prints=other(order.prints))


def later(minutes: int) -> datetime:
    return CREATED_AT + timedelta(minutes=minutes)
