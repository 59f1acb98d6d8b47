"""Frozen sample bytes of every event type prove that events on the wire, in queues and in `changes` stay readable.

`samples/<type>.json` is never edited. `python -m tests.contract.freeze` writes the sample of a new event type; it only
writes missing samples. A field may be added if it has a default: the type gets a further sample (`<type>.2.json`), and
the older samples must still be read to the same state. Any other change of the encoding needs a new major version.
"""

import pytest
from msgspec import structs

from shared.entities.contract import decode_change, encode
from shared.entities.entity import event_of
from shared.entities.registry import ENTITIES, read
from tests.contract.freeze import SAMPLES, path_of, revisions, sample

TYPES = sorted(entity.type(event) for entity in ENTITIES.values() for event in entity.events)
# The first sample of an event type may be a later revision, if the type is newer than the earlier ones.
REVISIONS = [
    (type_, revision)
    for type_ in TYPES
    for revision in range(1, revisions(event_of(type_)[0]) + 1)
    if revision == revisions(event_of(type_)[0]) or path_of(type_, revision).exists()
]


@pytest.mark.parametrize("type_", TYPES)
def test_every_event_type_has_a_frozen_sample(type_: str) -> None:
    last = revisions(event_of(type_)[0])
    assert path_of(type_, last).exists(), "a new event type or new fields: run `python -m tests.contract.freeze`"


def test_every_sample_belongs_to_a_current_event_type() -> None:
    expected = sorted(path_of(type_, revision).name for type_, revision in REVISIONS)
    assert sorted(path.name for path in SAMPLES.glob("*.json")) == expected


@pytest.mark.parametrize(("type_", "revision"), REVISIONS)
def test_frozen_bytes_are_read_to_the_same_state(type_: str, revision: int) -> None:
    change = decode_change(path_of(type_, revision).read_bytes())
    made = sample(type_, revision)
    assert read(change) == read(made)
    assert structs.replace(change, id=made.id, data=made.data) == made


@pytest.mark.parametrize("type_", TYPES)
def test_the_encoder_writes_exactly_the_frozen_bytes(type_: str) -> None:
    last = revisions(event_of(type_)[0])
    assert encode(sample(type_, last)) == path_of(type_, last).read_bytes()
