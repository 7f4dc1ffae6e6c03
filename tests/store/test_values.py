"""What the store is given: values, which nobody changes on the way."""

from dataclasses import FrozenInstanceError, fields

import pytest

from responses_ingress.store.values import DEFAULT_KEEP, Ending, Entry


@pytest.mark.parametrize(
    ("status", "moves"), [("completed", True), ("incomplete", True), ("failed", False), ("cancelled", False)]
)
def test_only_a_turn_that_got_somewhere_moves_its_branch(status: str, moves: bool) -> None:
    assert Ending(status, [], []).moves_branch is moves


def test_cursors_are_good_for_ten_minutes_and_responses_are_kept_for_thirty_days() -> None:
    assert (DEFAULT_KEEP.journal, DEFAULT_KEEP.response) == (600, 30 * 24 * 3600)


def test_nobody_changes_an_ending_on_its_way() -> None:
    ending = Ending("completed", [], [])
    for field in fields(ending):
        with pytest.raises(FrozenInstanceError):
            setattr(ending, field.name, None)


def test_an_entry_is_a_row_as_it_is_read() -> None:
    assert Entry(3, 2, b"[]") == (3, 2, b"[]")
