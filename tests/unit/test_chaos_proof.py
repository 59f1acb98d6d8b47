"""The proof of `make chaos` on made-up stores: it finds and names every violation."""

from collections import Counter
from typing import Any

import msgspec
import pytest

from tests.chaos.load import Acknowledged
from tests.chaos.proof import Proof, check_answers, pushed_to_other_restaurants
from tests.chaos.stores import MirroredOrder, OrderChange, StoreContents

MINE, OTHERS = "restaurant-1", "restaurant-2"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def a_change(
    change: str, version: int, notes: str, *, wrote: bool = True, payments: tuple[str, ...] = ()
) -> OrderChange:
    type_ = "order.created.v1" if version == 1 else "order.updated.v1"
    return OrderChange(MINE, change, "order-1", version, type_, "now", TRACE, notes, wrote, payments)


CREATED = a_change("change-1", 1, "first")
CHANGED = a_change("change-2", 2, "second")
PAID = a_change("change-3", 3, "second", wrote=False, payments=("payment-1",))
CHANGES = [CREATED, CHANGED, PAID]
ACKNOWLEDGED = [
    Acknowledged(MINE, "order-1", "created", 0, "first"),
    Acknowledged(MINE, "order-1", "changed", 2, "second"),
    Acknowledged(MINE, "order-1", "paid", 0, "payment-1"),
]
CONTENTS = StoreContents(
    changes=CHANGES,
    payments=Counter({"payment-1": 1}),
    conflicts=set(),
    logged=[*CHANGES, CHANGED],  # the log may have a change more than once
    mirror={"order-1": MirroredOrder(3, "change-3", "second", ("payment-1",))},
)


def checked(*, refused: str | None = None, unknown: str | None = None, **changed: Any) -> Proof:
    contents = msgspec.structs.replace(CONTENTS, **changed)
    return check_answers(ACKNOWLEDGED, {refused: "503"} if refused else {}, [unknown] if unknown else [], contents)


def test_the_proof_holds_if_every_change_is_in_every_store_once() -> None:
    proof = checked(refused="another", unknown="a third one")
    assert proof.holds, proof
    assert proof.acknowledged == 3


@pytest.mark.parametrize(
    ("stores", "message"),
    [
        ({"changes": [CREATED, PAID]}, "changed order-1 (second): not in PostgreSQL; change change-2"),
        ({"changes": [CREATED, PAID]}, f"trace {TRACE}"),
        ({"changes": [CREATED, PAID], "logged": [CREATED, PAID]}, "not in PostgreSQL; not in the log either"),
        ({"logged": [CREATED, PAID]}, "changed order-1 (second): not in the log"),
        ({"logged": [CREATED, CHANGED]}, "payment payment-1 of order-1: 0 times in the log"),
        ({"payments": Counter()}, "payment payment-1 of order-1: 0 times in PostgreSQL"),
        ({"mirror": {}}, "created order-1 (first): not in the mirror"),
        ({"mirror": {"order-1": MirroredOrder(1, "change-1", "first", ("payment-1",))}}, "(second): not in the mirror"),
        (
            {"mirror": {"order-1": MirroredOrder(2, "change-2", "first", ("payment-1",))}},
            "its notes in the mirror are first",
        ),
        ({"mirror": {"order-1": MirroredOrder(3, "change-3", "second", ())}}, "0 times in the mirror"),
    ],
)
def test_a_change_that_one_store_lacks_is_lost(stores: dict[str, Any], message: str) -> None:
    assert any(message in line for line in checked(**stores).lost)


@pytest.mark.parametrize(
    ("stores", "message"),
    [
        ({"changes": [*CHANGES, a_change("change-4", 4, "second")]}, "changed order-1 (second): 2 times"),
        (
            {
                "changes": [
                    *CHANGES,
                    OrderChange(MINE, "change-9", "order-9", 1, "order.created.v1", "now", None, "first", True, ()),
                ]
            },
            "created order-1 (first): 2 times",
        ),
        ({"payments": Counter({"payment-1": 2})}, "2 times in PostgreSQL"),
        ({"mirror": {"order-1": MirroredOrder(3, "change-3", "second", ("payment-1",) * 2)}}, "2 times in the mirror"),
        ({"changes": [*CHANGES, a_change("change-4", 3, "x", wrote=False)]}, "version 3 of order-1 exists 2 times"),
    ],
)
def test_a_change_that_is_stored_twice_is_doubled(stores: dict[str, Any], message: str) -> None:
    assert any(message in line for line in checked(**stores).doubled)


def test_a_fork_with_an_open_conflict_is_counted_and_not_doubled() -> None:
    proof = checked(changes=[*CHANGES, a_change("change-4", 3, "x", wrote=False)], conflicts={("order-1", 3)})
    assert proof.holds
    assert proof.forks == 1


@pytest.mark.parametrize("mark", ["first", "second", "payment-1"])
@pytest.mark.parametrize(
    "stores",
    [
        {"logged": [], "mirror": {}},
        {"changes": [], "payments": Counter(), "mirror": {}},
    ],
)
def test_a_refused_change_must_not_be_in_any_store(mark: str, stores: dict[str, Any]) -> None:
    assert any("refused, but present" in line for line in checked(refused=mark, **stores).wrong)


@pytest.mark.parametrize("mark", ["second", "payment-1"])
def test_a_refused_change_must_not_be_in_the_mirror_alone(mark: str) -> None:
    message = checked(refused=mark, changes=[], payments=Counter(), logged=[]).wrong
    assert any(line.startswith("refused") and "the mirror" in line for line in message)


def test_a_change_without_a_reply_may_be_stored_once() -> None:
    once = [*CHANGES, a_change("change-4", 4, "third")]
    assert not checked(unknown="third", changes=once).doubled
    twice = [*once, a_change("change-5", 5, "third")]
    assert any("without a reply" in line for line in checked(unknown="third", changes=twice).doubled)
    assert any(
        "without a reply" in line for line in checked(unknown="x", payments=Counter({"payment-1": 1, "x": 2})).doubled
    )


@pytest.mark.parametrize(
    ("stores", "message"),
    [
        ({"changes": [CREATED, PAID]}, "versions of order-1 have a gap: [1, 3]"),
        ({"repeated_numbers": ["0007 given 2 times"]}, "order number 0007 given 2 times"),
        ({"dead": ["a.queue: poison"]}, "dead: a.queue: poison"),
        ({"differs": ["behind order order-1"]}, "mirror: behind order order-1"),
        ({"changes": [CREATED, a_change("change-2", 7, "second")]}, "the reply says version 2"),
    ],
)
def test_other_violations_are_named_as_wrong(stores: dict[str, Any], message: str) -> None:
    proof = checked(**stores)
    assert any(message in line for line in proof.wrong)
    assert not proof.holds


def test_an_unexplained_change_breaks_the_proof() -> None:
    assert not checked(unexplained=["change-2"]).holds


def test_a_change_that_is_pushed_to_another_restaurant_is_found() -> None:
    assert not pushed_to_other_restaurants({MINE: {"change-1": 1, "unheard of": 1}, OTHERS: {}}, CONTENTS)
    (message,) = pushed_to_other_restaurants({MINE: {"change-1": 1}, OTHERS: {"change-2": 1}}, CONTENTS)
    assert message == f"change change-2 of restaurant {MINE} was pushed to {OTHERS}"
    assert pushed_to_other_restaurants({MINE: {}}, CONTENTS) == [f"nothing was pushed to {MINE}"]
