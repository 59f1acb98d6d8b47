"""The commands of the kitchen on lines: hold, fire, start, ready, serve, and recall.

A line only moves forward, and a repeated step changes nothing. So two terminals that were offline agree without a
clock: the later of two states wins, and a stale terminal never undoes `ready`. Only a recall moves a line back. A
recall is written with the version of the order, and no step before that version can overrule it.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from shared.entities.order.acts import Act, Action, permit
from shared.entities.order.derive import derive
from shared.entities.order.refusals import conflict, invalid
from shared.entities.order.state import Kitchen, KitchenState, Line, Mark, Order, Times
from shared.entities.order.writing import is_fired, line_of, rank, written


def accept(order: Order, act: Act) -> Order:
    """Accepts an order and fires its lines. Raises Refused."""
    permit(order, act, Action.ACCEPT)
    if order.accepted is not None:
        return order
    return fire_due(written(order, act, accepted=Mark(at=act.at, by=act.by)), act)


def fire_due(order: Order, act: Act) -> Order:
    """Fires the new lines up to the current course, if the order is accepted. A scheduled order waits until `fire_at`.
    The code that commits a merge calls `fire_due` again, because one side may have added a line while the other side
    accepted the order."""
    at = fire_at(order)
    if order.accepted is None or order.closed is not None or (at is not None and act.at < at):
        return order
    course = _current_course(order.items)
    due = [
        line
        for line in order.items
        if line.kitchen.state is KitchenState.NEW and line.quantity and line.course <= course
    ]
    return _moved(order, act, due, KitchenState.FIRED)


def fire_at(order: Order) -> datetime | None:
    """Returns the time at which a scheduled order goes to the kitchen, early enough for its slowest dish. None if the
    order is not scheduled."""
    if order.scheduled_for is None:
        return None
    longest = max((line.prep_minutes for line in order.items if line.quantity), default=0)
    return order.scheduled_for - timedelta(minutes=longest)


def cook(
    order: Order,
    act: Act,
    state: KitchenState,
    *,
    items: Iterable[str] | None = None,
    station: str | None = None,
    course: int | None = None,
    recall: bool = False,
) -> Order:
    """Moves lines to a state: the lines in `items`, or else all lines of the given station and course. Lines that are
    already further do not move, except in a recall, which moves only these. Voided lines do not move. Raises Refused:
    `order_pending`, `line_fired` if a fired line is to be held back, `unknown_item`, and the codes of `permit`."""
    permit(order, act, Action.COOK)
    if state is KitchenState.NEW:
        raise invalid("invalid_input", "a line cannot become new", field="state")
    if order.accepted is None and state is not KitchenState.HOLD:
        raise conflict("order_pending", "accept the order first", status=order.status)
    if items is not None:
        chosen = [line_of(order, id_) for id_ in dict.fromkeys(items)]
        if state is KitchenState.HOLD and not recall and any(is_fired(line) for line in chosen):
            raise conflict("line_fired", "the kitchen has this item already; recall it", field="item_ids")
    else:
        chosen = [
            line
            for line in order.items
            if station in (None, line.station_id) and (course is None or course == line.course)
        ]
    return _moved(order, act, [line for line in chosen if line.quantity], state, recall=recall)


def _moved(order: Order, act: Act, lines: Iterable[Line], state: KitchenState, *, recall: bool = False) -> Order:
    target = rank(state)
    moved = {}
    for line in lines:
        here = rank(line.kitchen.state)
        if (here > target) if recall else (here < target):
            moved[line.id] = msgspec.structs.replace(
                line,
                kitchen=Kitchen(
                    state=state,
                    rev=act.version if recall else line.kitchen.rev,
                    times=_reached(line.kitchen.times, state, act.at),
                ),
            )
    if not moved:
        return order
    items = tuple(moved.get(line.id, line) for line in order.items)
    return derive(msgspec.structs.replace(order, items=items, updated_at=act.at))


def _reached(times: Times | None, state: KitchenState, at: datetime) -> Times | None:
    if state is KitchenState.HOLD:
        return times
    times = times or Times()
    return times if getattr(times, state) is not None else msgspec.structs.replace(times, **{state: at})


def _current_course(lines: Iterable[Line]) -> int:
    """Returns the current course: the latest one with a fired line, or else the first one with a new line."""
    fired = [line.course for line in lines if is_fired(line) and line.course]
    new = [line.course for line in lines if line.kitchen.state is KitchenState.NEW and line.quantity and line.course]
    return max(fired) if fired else min(new, default=0)
