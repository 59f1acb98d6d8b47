"""The prefixes of order numbers: each identity of a mirror has its own, until they begin again."""

from datetime import UTC, datetime

from shared.mirror.identity import mirror_identity

AT = datetime(2026, 3, 14, 23, 59, tzinfo=UTC)


def test_first_identity_has_no_prefix_and_the_others_have_a_to_zz_and_round_again() -> None:
    prefixes = [mirror_identity(id_, AT).prefix for id_ in range(1, 706)]
    assert prefixes[:4] == ["", "A", "B", "C"]
    assert prefixes[25:29] == ["Y", "Z", "AA", "AB"]
    assert prefixes[701:] == ["ZY", "ZZ", "A", "B"]
    assert len(set(prefixes)) == 703


def test_prefix_covers_the_next_business_day_of_every_time_zone() -> None:
    # In UTC+14 the next business day is the day after tomorrow in UTC.
    assert mirror_identity(2, AT).prefix_until == "2026-03-16"
