"""A Responses stream to read, and ways to read, spoil and build it again."""

from collections.abc import Sequence

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Mark, Note, Open, Part, Text
from responses_ingress.dialects.responses import ResponsesReader
from tests.core.shapes import DONE, Json, call, events_of, message, reasoning, search_call
from tests.invariants import check_stream

NOTE = {"type": "url_citation", "url": "u"}
ANSWER: list[Delta] = [
    Accepted(),
    Open(0, reasoning()),
    Part(0, "summary_text"),
    Text(0, "thi"),
    Text(0, "nk"),
    Close(0),
    Open(1, search_call()),
    Mark(1, "response.web_search_call.searching"),
    Close(1, {**search_call(), "status": "completed"}),
    Open(2, message()),
    Part(2, "output_text"),
    Text(2, "Hel"),
    Text(2, "lo"),
    Note(2, NOTE),
    Close(2),
    Open(3, call()),
    Text(3, '{"a"'),
    Text(3, ":1}"),
    Close(3),
    DONE,
]
HELLO: list[Delta] = [Open(0, message()), Part(0, "output_text"), Text(0, "Hel")]
EVENTS = events_of(ANSWER)
OUTPUT = EVENTS[-1]["response"]["output"]


def read(events: Sequence[Json]) -> list[Delta]:
    reader = ResponsesReader()
    deltas = [delta for event in events for delta in reader.feed(event)]
    return [*deltas, *reader.end()]


def rebuilt(events: Sequence[Json]) -> list[Json]:
    """The events after reading and building them again, checked."""
    again = events_of(read(events), dict(events[0]["response"]))
    check_stream(again, interleaved=True, backfilled=True)
    return again


def without(name: str, events: Sequence[Json] = EVENTS) -> list[Json]:
    return [event for event in events if not event["type"].endswith(name)]


def finish_of(deltas: Sequence[Delta]) -> Finish:
    last = deltas[-1]
    assert isinstance(last, Finish)
    return last
