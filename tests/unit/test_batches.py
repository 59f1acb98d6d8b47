"""Batches: how messages are split, which change of an entity is the head, and which tags are acknowledged."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.sync.failures.classification import FailureKind
from services.sync.writer.batches import parse_batch
from services.sync.writer.intake import Tags
from services.sync.writer.upsert import highest
from shared.entities.contract import Lane, encode, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from tests.rigs.builders import OTHER_RESTAURANT, change, message, new_id, order


@dataclass
class Sent:
    body: bytes
    headers: Mapping[str, Any] = field(default_factory=dict)


def test_a_message_is_split_into_changes_byte_for_byte() -> None:
    made = [change(order()) for _ in range(3)]
    odd = encode(made[1]).replace(b"{", b"{ ", 1)
    batch = parse_batch(Lane.NORMAL, [Sent(message(made[0], odd)), Sent(message(made[2]), {"a": 1})])
    assert [one.event for one in batch.changes] == [encode(made[0]), odd, encode(made[2])]
    assert [one.decoded.change.id for one in batch.changes] == [one.id for one in made]
    assert {one.decoded.lane for one in batch.changes} == {Lane.NORMAL}
    assert batch.changes[2].message.headers == {"a": 1}
    assert not batch.failed


def test_an_unreadable_change_fails_alone() -> None:
    good = change(order())
    bad = encode(change(order(), restaurantid=OTHER_RESTAURANT))
    batch = parse_batch(Lane.CRITICAL, [Sent(message(good, bad, b"7")), Sent(b"no batch")])
    assert [one.decoded.change for one in batch.changes] == [good]
    assert [(one.body, one.failure.reason) for one in batch.failed] == [
        (b"[" + bad + b"]", "wrong_tenant"),
        (b"[7]", "contract_broken"),
        (b"no batch", "undecodable"),
    ]
    assert {one.failure.kind for one in batch.failed} == {FailureKind.POISON}
    assert batch.failed[0].change is not None  # the mirror needs the change to show the failure


def test_a_heartbeat_counts_only_in_its_own_lane() -> None:
    heartbeats = [Signal(id=new_id(), type=HEARTBEAT, time=now(), lane=lane) for lane in ("critical", "normal")]
    batch = parse_batch(Lane.CRITICAL, [Sent(encode_signal(heartbeat)) for heartbeat in heartbeats])
    assert batch.heartbeats == heartbeats[:1]
    assert not batch.failed and not batch.changes


def test_the_highest_head_of_each_entity_is_upserted_in_order_of_the_keys() -> None:
    first = change(order())
    second = change(order(id=first.entity_id), base=first)
    fork = change(order(id=first.entity_id, notes="other"), base=first)
    elsewhere = change(order(id=first.entity_id, restaurant_id=OTHER_RESTAURANT))
    several = [second, change(order()), fork, elsewhere, first]
    batch = parse_batch(Lane.CRITICAL, [Sent(message(*several))])
    top = highest(one.decoded for one in batch.changes)
    assert [one.key for one in top] == sorted({(one.restaurantid, one.entity_id) for one in several})
    winner = max(second, fork, key=lambda one: one.id)
    assert winner in [one.change for one in top]
    assert first not in [one.change for one in top]


@given(count=st.integers(1, 60), seed=st.integers())
def test_acknowledgements_cover_exactly_the_settled_messages_in_any_order(count: int, seed: int) -> None:
    chance = random.Random(seed)
    order_of_arrival = list(range(1, count + 1))
    chance.shuffle(order_of_arrival)
    tags, outstanding, settled = Tags(), set(range(1, count + 1)), set[int]()
    while order_of_arrival:
        size = chance.randint(1, len(order_of_arrival))
        batch, order_of_arrival = order_of_arrival[:size], order_of_arrival[size:]
        multiple, single = tags.settle(batch)
        settled |= set(batch)
        if multiple is not None:
            # The broker closes the channel if it does not know the tag.
            assert multiple in outstanding
            outstanding = {tag for tag in outstanding if tag > multiple}
        for tag in single:
            assert tag in outstanding
            outstanding.discard(tag)
        assert outstanding == set(range(1, count + 1)) - settled
