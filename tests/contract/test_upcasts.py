"""Samples of each major version of an entity, beside those of its events: `upcasts/<entity>.v<n>.json` is a state of
version n. Each upcast must convert the sample of its version into the sample of the next one.

The samples are never edited. A new major version gets its upcast and its sample in the release that reads it. The
release that writes it, the next one, gets the samples of its events (freeze.py).
"""

from pathlib import Path

import msgspec
import pytest
from msgspec import Raw, structs

from shared.entities import registry
from shared.entities.contract import BrokenContract, Change, ChangeData, decode_change, encode
from shared.entities.entity import Entity, version_of
from shared.entities.registry import ENTITIES
from tests.contract.freeze import TABLE, path_of
from tests.rigs import builders
from tests.rigs.newer_release import READS_V2, WRITES_V2, Places, TableV2, registered

UPCASTS = Path(__file__).parent / "upcasts"
# No entity has a second major version yet, so a table of a future release proves that the check can fail.
VERSIONS = [(entity, version) for entity in (*ENTITIES.values(), READS_V2) for version in range(1, entity.reads + 1)]
WITH_UPCASTS = [(entity, version) for entity, version in VERSIONS if entity.upcasts]


def sample(entity: Entity, version: int) -> bytes:
    return (UPCASTS / f"{entity.name}.v{version}.json").read_bytes()


@pytest.mark.parametrize(("entity", "version"), WITH_UPCASTS, ids=lambda value: getattr(value, "name", f"v{value}"))
def test_each_version_is_read_to_the_state_of_the_newest_one(entity: Entity, version: int) -> None:
    newest = sample(entity, entity.reads)
    assert version_of(sample(entity, version)) == version
    assert msgspec.json.decode(entity.upcast(sample(entity, version))) == msgspec.json.decode(newest)
    assert entity.decode_state(sample(entity, version)) == entity.decode_state(newest)


def test_every_sample_belongs_to_a_version() -> None:
    assert {path.name for path in UPCASTS.iterdir()} == {f"{one.name}.v{version}.json" for one, version in WITH_UPCASTS}


def event(version: int, after: bytes) -> Change:
    change = decode_change(path_of("ticketrail.table.created.v1", 1).read_bytes())
    return structs.replace(change, type=f"ticketrail.table.created.v{version}", data=ChangeData(after=Raw(after)))


def test_an_event_of_an_older_version_is_read_as_the_newest_one_and_keeps_unknown_fields() -> None:
    after = encode({**msgspec.json.decode(sample(READS_V2, 1)), "newer": 1})
    with registered(READS_V2):
        entity, state = registry.read(event(1, after))
    assert state == entity.decode_state(sample(READS_V2, 2))
    assert msgspec.json.decode(entity.upcast(after))["newer"] == 1


def test_a_newer_version_is_unsupported_in_an_event_and_in_a_store() -> None:
    for version, entity in ((2, ENTITIES["table"]), (3, READS_V2)):
        after = encode({**msgspec.json.decode(sample(READS_V2, 2)), "schema_version": version})
        with registered(entity):
            for read in (lambda: registry.read(event(version, after)), lambda: entity.decode_state(after)):  # noqa: B023
                with pytest.raises(BrokenContract) as broken:
                    read()
                assert broken.value.reason == "unsupported_version"


@pytest.mark.parametrize(
    ("type_version", "after"),
    [
        (1, sample(READS_V2, 2)),
        (2, sample(READS_V2, 1)),
        (1, b'{"seats": "four"}'),
        (1, b"[]"),
        (2, b'{"schema_version": 0}'),
        (2, b'{"schema_version": "2"}'),
        (2, b'{"schema_version": 2, "places": 4}'),
    ],
)
def test_a_state_of_another_version_than_its_type_breaks_the_contract(type_version: int, after: bytes) -> None:
    with registered(READS_V2), pytest.raises(BrokenContract) as broken:
        registry.read(event(type_version, after))
    assert broken.value.reason == "contract_broken"


@pytest.mark.parametrize("version", ["v0", "v01", "v", "v1.5", "v99999", "2", "v1\n", "w1"])
def test_a_type_without_a_version_is_unknown(version: str) -> None:
    change = structs.replace(builders.change(builders.order(items=1)), type=f"ticketrail.order.created.{version}")
    with pytest.raises(BrokenContract) as broken:
        registry.read(change)
    assert broken.value.reason == "unknown_type"


def state(places: int) -> TableV2:
    found: TableV2 = READS_V2.decode_state(sample(READS_V2, 2))
    return structs.replace(found, places=(Places("inside", places),))


def test_a_release_writes_its_version_and_never_an_older_one_over_a_newer_one() -> None:
    assert WRITES_V2.type("updated") == "ticketrail.table.updated.v2"
    version, written = WRITES_V2.encode_state(state(6), sample(WRITES_V2, 1))
    assert (version, version_of(written)) == (2, 2)
    assert WRITES_V2.decode_state(written) == state(6)
    assert "seats" not in msgspec.json.decode(written)
    # A release that only reads version 2 leaves a table of that version in it.
    version, written = READS_V2.encode_state(state(8), written)
    assert (version, version_of(written)) == (2, 2)
    # It still writes version 1 for other tables.
    assert READS_V2.type("updated") == "ticketrail.table.updated.v1"


def test_the_first_version_has_no_version_field() -> None:
    assert ENTITIES["table"].encode_state(TABLE) == (1, encode(TABLE))
    assert version_of(encode({**msgspec.json.decode(encode(TABLE)), "label": '"schema_version":2'})) == 1


def test_a_base_of_a_newer_version_than_this_release_reads_is_refused() -> None:
    with pytest.raises(BrokenContract) as broken:
        ENTITIES["table"].encode_state(TABLE, sample(READS_V2, 2))
    assert broken.value.reason == "unsupported_version"
