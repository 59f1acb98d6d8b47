"""The commands on lines: add, edit, void, discount, comp; and `PUT items` of the original systems."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID, uuid5

import msgspec
from msgspec import UNSET, Struct, UnsetType

from shared.entities.menu_item import Consumption
from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.derive import derive
from shared.entities.order.kitchen import fire_due
from shared.entities.order.refusals import conflict, invalid
from shared.entities.order.state import (
    MAX_LINES,
    Customization,
    Discount,
    Kitchen,
    KitchenState,
    Line,
    Order,
    Void,
)
from shared.entities.order.writing import (
    ON_THE_HOUSE,
    check_discount,
    check_subtotal,
    is_fired,
    line_of,
    rank,
    with_line,
)

_PLACES = 1_000
"""The number of lines that one version can add."""


class NewLine(Struct, frozen=True, kw_only=True):
    """A dish as the menu has it now, with the options that the guest chose."""

    id: str
    menu_item_id: str
    name: str
    unit_price: int
    ordered: int = 1
    customizations: tuple[Customization, ...] = ()
    special_instructions: str | None = None
    consumes: tuple[Consumption, ...] = ()
    tax_category: str | None = None
    station_id: str | None = None
    prep_minutes: int = 0
    course: int = 0
    seat: int | None = None
    hold: bool = False


class NewVoid(Struct, frozen=True, kw_only=True):
    """`quantity`: None voids the whole line. `wasted`: None means that the line is wasted if the kitchen has started
    it."""

    id: str
    line: str
    quantity: int | None = None
    reason: str | None = None
    wasted: bool | None = None


def new_lines(
    new: Sequence[NewLine], act: Act, by: str | None = None, since: datetime | None = None
) -> tuple[Line, ...]:
    """Returns new lines of an order. `by`: the id of the user or session that adds them; None means `placed_by` of the
    order. `since`: the time from which they hold their stock; None means the time of the act."""
    return tuple(
        Line(
            id=one.id,
            menu_item_id=one.menu_item_id,
            name=one.name,
            ordered=one.ordered,
            unit_price=one.unit_price,
            customizations=one.customizations,
            seq=act.version * _PLACES + place,
            added_at=act.at,
            special_instructions=one.special_instructions,
            kitchen=Kitchen(state=KitchenState.HOLD if one.hold else KitchenState.NEW),
            added_by=by,
            consumes=one.consumes,
            tax_category=one.tax_category,
            station_id=one.station_id,
            prep_minutes=one.prep_minutes,
            held_at=since if one.consumes else None,
            course=one.course,
            seat=one.seat,
        )
        for place, one in enumerate(new)
    )


def _hold_time(order: Order, at: datetime) -> datetime | None:
    """Returns the time from which new lines hold their stock; None means `at`. The time is later than that of each
    other line, even if the clock goes back, so that the claim recognizes new holds."""
    held = [line.held_at or line.added_at for line in order.items if line.consumes]
    if order.held_from is not None:
        held.append(order.held_from)
    return max(held) + timedelta(microseconds=1) if held and max(held) >= at else None


def add_lines(order: Order, act: Act, new: Sequence[NewLine]) -> Order:
    """Adds lines, and fires those that are due. A line whose id the order already has is not added again. Raises
    Refused: `id_reused`, `too_many_items`, `order_too_large`, and the codes of `permit`."""
    known = {line.id: line for line in order.items}
    added = []
    by = None if act.by == order.placed_by else act.by
    for line in new_lines(new, act, by, _hold_time(order, act.at)):
        if (earlier := known.get(line.id)) is None:
            known[line.id] = line
            added.append(line)
        elif _fixed(earlier) != _fixed(line):
            raise conflict("id_reused", "this id belongs to another item", field="items")
    if not added:
        return order
    permit(order, act, Action.ADD_LINE)
    if len(known) > MAX_LINES or len(new) > _PLACES:
        raise conflict("too_many_items", f"an order has at most {MAX_LINES} items", field="items")
    changed = derive(msgspec.structs.replace(order, items=(*order.items, *added), updated_at=act.at))
    check_subtotal(changed)
    return fire_due(changed, act)


def _fixed(line: Line) -> tuple[object, ...]:
    """Returns the values that a repeated request must repeat. The time, the author and the version may differ."""
    return line.menu_item_id, line.name, line.ordered, line.unit_price, line.customizations, line.tax_category


def edit_line(
    order: Order,
    act: Act,
    id_: str,
    *,
    special_instructions: str | UnsetType | None = UNSET,
    course: int | UnsetType = UNSET,
    seat: int | UnsetType | None = UNSET,
) -> Order:
    """Changes a line that is not fired yet. Raises Refused: `line_fired`, `unknown_item`, and the codes of `permit`."""
    permit(order, act, Action.EDIT_LINE)
    line = line_of(order, id_)
    if is_fired(line):
        raise conflict("line_fired", "the kitchen has this item already")
    fields = {"special_instructions": special_instructions, "course": course, "seat": seat}
    fields = {name: value for name, value in fields.items() if value is not UNSET and value != getattr(line, name)}
    return _rewritten(order, act, line, **fields) if fields else order


def discount_line(order: Order, act: Act, id_: str, discount: Discount | None) -> Order:
    """Sets or removes the discount of a line; `reason` is a part of it. Raises Refused: `discount_above_subtotal`,
    `unknown_item`, and the codes of `permit`."""
    if discount is None:
        permit(order, act, Action.DISCOUNT, reason="removed")
    else:
        permit(order, act, Action.COMP if discount.comp else Action.DISCOUNT, reason=discount.reason)
    line = line_of(order, id_)
    if discount is not None:
        check_discount(discount, line.line_total, "discount")
    return _rewritten(order, act, line, discount=discount) if line.discount != discount else order


def comp(order: Order, act: Act, id_: str, reason: str) -> Order:
    """Discounts a line by 100 %: it is on the house. Raises Refused with the codes of `discount_line`."""
    return discount_line(order, act, id_, Discount(bp=ON_THE_HOUSE, reason=reason, comp=True))


def _rewritten(order: Order, act: Act, line: Line, **fields: object) -> Order:
    changed = with_line(order, act, msgspec.structs.replace(line, rev=act.version, **fields))
    return fire_due(changed, act)  # a line that was moved to the current course is due


def void(order: Order, act: Act, new: NewVoid) -> Order:
    """Takes pieces of a line back. Raises Refused: `id_reused`, `void_above_quantity` with the quantity that is left,
    `unknown_item`, `manager_needed` and `reason_needed` for a fired line, and the other codes of `permit`."""
    line = line_of(order, new.line)
    made = rank(line.kitchen.state) >= rank(KitchenState.STARTED)
    wasted = new.wasted if new.wasted is not None else made
    for earlier in line.voids:
        if earlier.id == new.id:
            if (earlier.quantity, earlier.reason) != (new.quantity, new.reason):
                raise conflict("id_reused", "this id belongs to another void", field="id")
            return order
    permit(order, act, Action.VOID_FIRED_LINE if is_fired(line) else Action.VOID_LINE, reason=new.reason)
    if new.quantity is not None and new.quantity < 1:
        raise invalid("invalid_input", "must be at least 1", field="quantity")
    if not line.quantity or (new.quantity or 0) > line.quantity:
        raise conflict(
            "void_above_quantity",
            f"{line.quantity} of this item are left",
            field="quantity",
            quantity=line.quantity,
        )
    fact = Void(id=new.id, at=act.at, by=act.by, quantity=new.quantity, reason=new.reason, wasted=wasted)
    return with_line(order, act, msgspec.structs.replace(line, voids=(*line.voids, fact)))


class Wanted(Struct, frozen=True):
    """An item of the original systems' `PUT items`."""

    menu_item_id: str
    quantity: int
    customizations: tuple[tuple[str, str], ...] = ()
    """(group, option)"""
    special_instructions: str | None = None


class Plan(Struct, frozen=True):
    """The changes of a `PUT items`: more of some dishes, less of others. All other items keep their line and their
    price."""

    more: tuple[tuple[int, int], ...]
    """(place in the request, pieces): new lines, priced by the menu."""
    fewer: tuple[tuple[str, int | None], ...]
    """(line id, pieces; None means the whole line): voids."""


def plan_items(order: Order, wanted: Sequence[Wanted]) -> Plan:
    """Compares the items that a client wants with those of the order. Items with the same dish, options and
    instructions are the same item. Raises Refused: `items_are_fixed` once a line is fired."""
    if any(is_fired(line) for line in order.items):
        raise conflict("items_are_fixed", f"the items of an order that is {order.status} cannot change", field="items")
    places: dict[Wanted, int] = {}
    pieces: dict[Wanted, int] = {}
    for place, one in enumerate(wanted):
        key = msgspec.structs.replace(one, quantity=0)
        places.setdefault(key, place)
        pieces[key] = pieces.get(key, 0) + one.quantity
    fewer: list[tuple[str, int | None]] = []
    for line in order.items:
        if not line.quantity:
            continue
        key = Wanted(
            line.menu_item_id,
            0,
            tuple((one.name, one.option) for one in line.customizations),
            line.special_instructions,
        )
        kept = min(line.quantity, pieces.get(key, 0))
        if kept:
            pieces[key] -= kept
        if kept < line.quantity:
            fewer.append((line.id, line.quantity - kept if kept else None))
    return Plan(tuple((places[key], left) for key, left in pieces.items() if left), tuple(fewer))


def put_items(order: Order, act: Act, plan: Plan, more: Sequence[NewLine]) -> Order:
    """Executes a plan. `more`: the new lines for `plan.more`. The id of a void follows from its line and the version,
    so that a repeated request makes the same void. Raises the errors of `add_lines` and `void`."""
    changed = order
    for line, quantity in plan.fewer:
        id_ = str(uuid5(UUID(line), f"void/{act.version}"))
        changed = void(changed, act, NewVoid(id=id_, line=line, quantity=quantity))
    return add_lines(changed, act, more)
