"""The checker of streams: it accepts a good stream and refuses each way of spoiling it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Note, Open, Part, Text
from tests.core.shapes import DONE, ERROR, call, events_of, message, reasoning
from tests.invariants import check_stream

GOOD: list[Delta] = [
    Accepted(),
    Open(0, message()),
    Part(0, "output_text"),
    Text(0, "a"),
    Text(0, "b"),
    Note(0, {"type": "x"}),
    Close(0),
    Open(1, call()),
    Text(1, "{}"),
    Close(1),
    DONE,
]
CREATED, IN_PROGRESS, ADDED, PART, DELTA, _, NOTE, TEXT_DONE, PART_DONE, ITEM_DONE = range(10)
CALL_ADDED, CALL_DONE, CALL_ITEM_DONE, COMPLETED = 10, 12, 13, 14

Events = list[dict[str, Any]]


def put(at: int, *path: Any, to: Any) -> Callable[[Events], None]:
    def change(events: Events) -> None:
        target: Any = events[at]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return change


def drop(at: int) -> Callable[[Events], None]:
    def change(events: Events) -> None:
        del events[at]
        renumber(events)

    return change


def again(at: int) -> Callable[[Events], None]:
    def change(events: Events) -> None:
        events.insert(at, deepcopy(events[at]))
        renumber(events)

    return change


def renumber(events: Events) -> None:
    for number, event in enumerate(events):
        event["sequence_number"] = number


SPOILED: dict[str, Callable[[Events], None]] = {
    "no created": drop(CREATED),
    "no in_progress": drop(IN_PROGRESS),
    "in_progress twice": again(IN_PROGRESS),
    "no end": drop(COMPLETED),
    "two ends": again(COMPLETED),
    "a gap": put(4, "sequence_number", to=40),
    "output at the start": put(CREATED, "response", "output", to=[{}]),
    "usage at the start": put(CREATED, "response", "usage", to={}),
    "created when completed": put(CREATED, "response", "status", to="completed"),
    "another response": put(IN_PROGRESS, "response", "id", to="resp_2"),
    "an index that is not next": put(ADDED, "output_index", to=1),
    "an item done at its start": put(ADDED, "item", "status", to="completed"),
    "an item with content at its start": put(ADDED, "item", "content", to=[{}]),
    "no added": drop(ADDED),
    "no part": drop(PART),
    "a part twice": again(PART),
    "a part with text at its start": put(PART, "part", "text", to="a"),
    "a delta that is lost": drop(DELTA),
    "a delta twice": again(DELTA),
    "a delta of another item": put(DELTA, "item_id", to="msg_2"),
    "a delta of another part": put(DELTA, "content_index", to=1),
    "an annotation that is lost": drop(NOTE),
    "an annotation out of order": put(NOTE, "annotation_index", to=1),
    "no end of the text": drop(TEXT_DONE),
    "the end of the text twice": again(TEXT_DONE),
    "another text at its end": put(TEXT_DONE, "text", to="a"),
    "no end of the part": drop(PART_DONE),
    "the end of the part twice": again(PART_DONE),
    "another text in the part": put(PART_DONE, "part", "text", to="a"),
    "no end of the item": drop(ITEM_DONE),
    "the end of the item twice": again(ITEM_DONE),
    "another id at the end": put(ITEM_DONE, "item", "id", to="msg_2"),
    "another type at the end": put(ITEM_DONE, "item", "type", to="reasoning"),
    "an item still in progress at its end": put(ITEM_DONE, "item", "status", to="in_progress"),
    "another text in the item": put(ITEM_DONE, "item", "content", 0, "text", to="a"),
    "a part missing from the item": put(ITEM_DONE, "item", "content", to=[]),
    "no end of the arguments": drop(CALL_DONE),
    "other arguments at their end": put(CALL_DONE, "arguments", to="{"),
    "other arguments in the item": put(CALL_ITEM_DONE, "item", "arguments", to="{"),
    "an item missing from the output": put(COMPLETED, "response", "output", 1, to={}),
    "no output": put(COMPLETED, "response", "output", to=[]),
    "another text in the output": put(COMPLETED, "response", "output", 0, "content", 0, "text", to="a"),
    "another status in the end": put(COMPLETED, "response", "status", to="failed"),
    "no usage": put(COMPLETED, "response", "usage", to=None),
    "no time of the end": put(COMPLETED, "response", "completed_at", to=None),
    "an error when completed": put(COMPLETED, "response", "error", to=ERROR),
    "a reason when completed": put(COMPLETED, "response", "incomplete_details", to={"reason": "x"}),
}


def test_a_good_stream() -> None:
    check_stream(events_of(GOOD))


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_stream(how: str) -> None:
    events = events_of(GOOD)
    SPOILED[how](events)
    with pytest.raises(AssertionError):
        check_stream(events)


def test_items_side_by_side_only_when_that_is_said() -> None:
    events = events_of([Open(0, reasoning()), Open(1, reasoning("rs_2")), Close(0), Close(1), DONE])
    check_stream(events, interleaved=True)
    with pytest.raises(AssertionError, match="while"):
        check_stream(events)


def test_items_of_the_final_response_only_when_that_is_said() -> None:
    events = events_of([Open(0, reasoning()), Finish("completed", items={0: reasoning(), 1: reasoning("rs_2")}, at=1)])
    check_stream(events, backfilled=True)
    with pytest.raises(AssertionError, match="never done"):
        check_stream(events)


def test_a_call_that_a_failure_cut_short_is_incomplete() -> None:
    events = events_of([Open(0, call()), Finish("failed", error=ERROR)])
    check_stream(events)
    events[-1]["response"]["output"][0]["status"] = "completed"
    with pytest.raises(AssertionError, match="cut short"):
        check_stream(events)


def test_a_cancelled_response_has_no_output() -> None:
    events = events_of([Open(0, call()), Finish("cancelled")])
    check_stream(events)
    events[-1]["response"]["output"] = [call()]
    with pytest.raises(AssertionError, match="output"):
        check_stream(events)
