"""Ids on the command line: the prefixes that are accepted, and the error for a prefix of several ids."""

from uuid import UUID

import click
import pytest

from services.sync.id_argument import only_candidate, prefix_range, whole_id

FIRST = "7d0c5f1e-4c11-4c0a-9b1d-7f0c3b526f1e"
SECOND = "7d0c5f1e-9999-4c0a-9b1d-7f0c3b526f1e"


@pytest.mark.parametrize("text", ["7d0c", "7D0C5F1E", "7d0c5f1e-", "7d0c5f1e-4c11-4c", "7d0c5f1e4c11", FIRST])
def test_a_prefix_matches_exactly_the_ids_that_begin_with_it(text: str) -> None:
    bounds = prefix_range(text)
    assert bounds is not None
    first, last = bounds
    assert first <= UUID(FIRST) <= last
    digits = text.lower().replace("-", "")
    assert first.hex.startswith(digits) and last.hex.startswith(digits)
    assert (first.hex[len(digits) :].strip("0"), last.hex[len(digits) :].strip("f")) == ("", "")


@pytest.mark.parametrize(
    "text", ["", "7d0", "7d0c-5f1e", "order", "7d0c5f1e--4c11", "7d0c5f1e_4c11", FIRST + "0", "-7d0c"]
)
def test_a_text_that_cannot_begin_an_id_is_refused(text: str) -> None:
    assert prefix_range(text) is None


def test_a_whole_id_is_known_in_every_spelling() -> None:
    assert whole_id(FIRST) == whole_id(FIRST.upper()) == whole_id(FIRST.replace("-", "")) == FIRST
    assert whole_id(FIRST[:-1]) is None


def test_a_prefix_of_several_ids_is_refused_and_lists_them() -> None:
    with pytest.raises(click.ClickException) as refused:
        only_candidate("7d0c", "dead letter", [(FIRST, "open, order v3"), (SECOND, "open, table v1")])
    assert refused.value.message.splitlines() == [
        "more than one dead letter has an id that begins with 7d0c:",
        f"  {FIRST}  open, order v3",
        f"  {SECOND}  open, table v1",
    ]


def test_a_long_list_of_candidates_ends_after_ten() -> None:
    with pytest.raises(click.ClickException) as refused:
        only_candidate("7d0c", "conflict", [(str(UUID(int=n)), "") for n in range(11)])
    assert len(refused.value.message.splitlines()) == 12
    assert refused.value.message.endswith("… and more")


def test_a_prefix_of_no_id_is_refused() -> None:
    with pytest.raises(click.ClickException, match="no conflict has an id that begins with abcd"):
        only_candidate("abcd", "conflict", [])
