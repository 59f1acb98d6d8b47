"""Frozen sample bytes of every event type: what is on the wire, in queues and in `changes` stays readable.

`samples/<type>.json` is never edited. A new event type gets a sample by `python -m tests.contract.freeze`, which writes
missing ones alone; a change of the encoding that this test shows needs a new major version of the type.
"""

import pytest

from shared.entities.contract import decode_change, encode
from shared.entities.registry import ENTITIES, read
from tests.contract.freeze import SAMPLES, sample

TYPES = sorted(entity.type(event) for entity in ENTITIES.values() for event in entity.events)


@pytest.mark.parametrize("type_", TYPES)
def test_every_event_type_has_a_frozen_sample(type_: str) -> None:
    assert (SAMPLES / f"{type_}.json").exists(), "a new event type: `python -m tests.contract.freeze`"


def test_no_sample_is_left_of_a_type_that_nobody_reads() -> None:
    assert sorted(path.stem for path in SAMPLES.glob("*.json")) == TYPES


@pytest.mark.parametrize("type_", TYPES)
def test_todays_code_reads_the_frozen_bytes_to_the_same_state(type_: str) -> None:
    change = decode_change((SAMPLES / f"{type_}.json").read_bytes())
    made = sample(type_)
    assert read(change) == read(made)
    assert change == made


@pytest.mark.parametrize("type_", TYPES)
def test_todays_encoder_writes_exactly_the_frozen_bytes(type_: str) -> None:
    assert encode(sample(type_)) == (SAMPLES / f"{type_}.json").read_bytes()
