"""Alignment: what a client that carries its own history sends, laid along what is stored of it.

The stored branch and what the client sends are lists of (type, content); equal pairs have equal digests.
An anchor is sent back by every client; loose items (reasoning, hosted calls) by some.
"""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.context import Alignment, Stored, align

Thing = tuple[str, str]


def user(text: str) -> Thing:
    return ("message", f"user: {text}")


def answer(text: str) -> Thing:
    return ("message", f"assistant: {text}")


def thought(text: str = "") -> Thing:
    return ("reasoning", text)


def search(text: str) -> Thing:
    return ("web_search_call", text)


def call(text: str) -> Thing:
    return ("function_call", text)


def output(text: str) -> Thing:
    return ("function_call_output", text)


def is_loose(thing: Thing) -> bool:
    return thing[0] in ("reasoning", "web_search_call")


def digest(thing: Thing) -> bytes:
    return repr(thing).encode()


def aligned(stored: Sequence[Thing], sent: Sequence[Thing]) -> Alignment:
    return align([Stored(thing[0], digest(thing)) for thing in stored], [digest(thing) for thing in sent])


def result(stored: Sequence[Thing], sent: Sequence[Thing]) -> list[Thing]:
    """The branch as it is after the request."""
    position, tail = aligned(stored, sent)
    return [*stored[:position], *sent[tail:]]


TURN = [user("list"), thought("plan"), call("ls"), output("a b"), answer("two files")]


@pytest.mark.parametrize(
    ("stored", "sent", "position", "tail"),
    [
        ([], [], 0, 0),
        ([], [user("a")], 0, 0),
        (TURN, [*TURN, user("next")], 5, 5),
        (TURN, [t for t in TURN if not is_loose(t)] + [user("next")], 5, 4),
        (TURN, [user("another thread")], 0, 0),
        (TURN, [], 0, 0),
        (TURN, TURN, 5, 5),  # the same request again, its answer taken for the client's
        (TURN, TURN[:4], 4, 4),  # the last answer is wanted again
        (TURN, [TURN[0], user("edited")], 1, 1),
        (TURN, [user("a summary of all that was"), user("next")], 0, 0),
        ([user("again"), answer("1")], [user("again"), answer("1"), user("again")], 2, 2),
        ([user("again"), user("again")], [user("again")], 1, 1),
        ([user("a"), answer("1"), thought()], [user("a"), answer("1"), user("b")], 3, 2),
        ([user("a"), answer("1"), thought()], [user("a"), answer("1")], 2, 2),
        ([thought(), thought(), answer("1")], [thought(), answer("1"), user("b")], 3, 2),
        ([user("a"), search("x"), answer("1")], [user("a"), search("y"), answer("1")], 1, 1),
        ([user("a"), thought("p"), answer("1")], [user("a"), answer("2")], 1, 1),
    ],
)
def test_history_is_shared_up_to_the_first_item_that_differs(
    stored: list[Thing], sent: list[Thing], position: int, tail: int
) -> None:
    assert aligned(stored, sent) == (position, tail)


few = st.sampled_from("ab")  # so that real repeats are common
anchors = st.one_of(few.map(user), few.map(answer), few.map(call), few.map(output))
loose = st.one_of(st.just(thought()), few.map(thought), few.map(search))
histories = st.lists(anchors | loose, max_size=8)


def is_subsequence(part: Sequence[Thing], whole: Sequence[Thing]) -> bool:
    rest = iter(whole)
    return all(thing in rest for thing in part)


def without_loose(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things if not is_loose(thing)]


@given(histories, histories)
def test_whatever_is_sent_is_on_the_branch_once_and_nothing_else_but_what_clients_drop(
    stored: list[Thing], sent: list[Thing]
) -> None:
    found = result(stored, sent)
    assert is_subsequence(sent, found)
    assert without_loose(found) == without_loose(sent)


def longest_shared(stored: Sequence[Thing], sent: Sequence[Thing]) -> int:
    """By trying: how many leading sent items are a stored beginning in which only loose ones are missing."""
    for tail in range(len(sent), -1, -1):
        for position in range(len(stored) + 1):
            beginning = stored[:position]
            if without_loose(beginning) == without_loose(sent[:tail]) and is_subsequence(sent[:tail], beginning):
                return tail
    raise AssertionError("nothing sent is always shared")


@given(histories, histories)
def test_no_longer_beginning_could_be_shared(stored: list[Thing], sent: list[Thing]) -> None:
    assert aligned(stored, sent).tail == longest_shared(stored, sent)


@st.composite
def as_carried(draw: st.DrawFn, stored: Sequence[Thing]) -> list[int]:
    """Places of the stored items that a client sends back: all anchors, and some of the others."""
    return [at for at, thing in enumerate(stored) if not is_loose(thing) or draw(st.booleans())]


@given(st.data())
def test_a_client_that_goes_on_adds_only_what_is_new(data: st.DataObject) -> None:
    stored = data.draw(histories)
    kept = data.draw(as_carried(stored))
    new = [data.draw(anchors), *data.draw(histories)]
    sent = [*(stored[at] for at in kept), *new]
    assert aligned(stored, sent) == (len(stored), len(kept))
    assert result(stored, sent) == [*stored, *new]


@given(st.data())
def test_a_client_that_repeats_its_request_adds_nothing(data: st.DataObject) -> None:
    stored = data.draw(histories)
    kept = data.draw(as_carried(stored))
    sent = [stored[at] for at in kept]
    position, tail = aligned(stored, sent)
    assert tail == len(sent)
    assert without_loose(stored[position:]) == []


@given(st.data())
def test_a_client_that_edits_an_item_branches_off_before_it(data: st.DataObject) -> None:
    stored = data.draw(st.lists(anchors | loose, min_size=1, max_size=8).filter(without_loose))
    kept = data.draw(as_carried(stored))
    at = data.draw(st.sampled_from([at for at, place in enumerate(kept) if not is_loose(stored[place])]))
    sent = [*(stored[place] for place in kept[:at]), user("edited"), *data.draw(histories)]
    position, tail = aligned(stored, sent)
    assert tail == at
    assert position <= kept[at]
    assert all(is_loose(thing) for thing in stored[position : kept[at]])
    assert result(stored, sent) == [*stored[:position], *sent[at:]]


@given(st.data())
def test_a_client_that_rolls_back_branches_off_where_it_stopped(data: st.DataObject) -> None:
    stored = data.draw(st.lists(anchors, min_size=1, max_size=8))
    left = data.draw(st.integers(0, len(stored) - 1))
    assert aligned(stored, stored[:left]) == (left, left)
    sent = [*stored[:left], user("something else")]
    assert aligned(stored, sent) == (left, left)
    assert result(stored, sent) == sent


@given(histories, histories)
def test_a_client_that_compacted_its_history_begins_anew(stored: list[Thing], new: list[Thing]) -> None:
    summary = ("compaction", "all that was")
    first = [thing for thing in stored if not is_loose(thing)]
    position, tail = aligned(stored, [summary, *new])
    assert tail == 0
    if first:
        assert all(is_loose(thing) for thing in stored[:position])
    assert without_loose(result(stored, [summary, *new])) == without_loose([summary, *new])
