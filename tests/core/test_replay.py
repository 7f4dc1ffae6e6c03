"""Making a response again, from its journal or from its output."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Item, Note, Open, Part, Text, encode
from responses_ingress.core.replay import deltas_of, deltas_of_response, fold
from tests.core.shapes import (
    DONE,
    ENVELOPE,
    ERROR,
    QUEUED,
    USAGE,
    build,
    call,
    events_of,
    legal_deltas,
    mcp_call,
    message,
    parsed,
    reasoning,
    search_call,
    text_item,
)
from tests.invariants import check_stream

CITED: dict[str, Any] = {
    "type": "output_text",
    "annotations": [{"type": "url_citation", "url": "a"}],
    "logprobs": [{"token": "x", "logprob": -0.1}],
    "text": "cited",
}
OUTPUT: list[Item] = [
    {**reasoning(), "summary": [{"type": "summary_text", "text": "thought"}], "encrypted_content": "e"},
    {**reasoning("rs_2"), "content": [{"type": "reasoning_text", "text": "raw"}]},
    {**search_call(), "status": "completed"},
    {**mcp_call(), "status": "failed", "arguments": "{}", "error": {"type": "x"}},
    {**message(), "status": "completed", "content": [CITED, {"type": "refusal", "refusal": ""}]},
    {**call(), "status": "completed", "arguments": '{"a":1}'},
    {"id": "cmp_1", "type": "compaction", "encrypted_content": "e"},
]


@settings(max_examples=50)
@given(legal_deltas(), st.lists(st.integers(0, 20), max_size=4), st.sampled_from([ENVELOPE, QUEUED]))
def test_fold_gives_back_the_builder(deltas: list[Delta], cuts: list[int], envelope: dict[str, Any]) -> None:
    borders = [0, *sorted(min(cut, len(deltas)) for cut in cuts), len(deltas)]
    batches = [encode(deltas[start:end]) for start, end in zip(borders, borders[1:], strict=False)]
    folded, built = fold(envelope, batches), build(deltas, envelope)
    assert folded.take() == built.take()
    assert folded.response() == built.response()
    assert (folded.number, folded.memory) == (built.number, built.memory)


def test_a_fold_of_half_a_journal_can_go_on() -> None:
    builder = fold(ENVELOPE, [encode([Accepted(), Open(0, message()), Part(0, "output_text")]), encode([Text(0, "a")])])
    builder.take()
    assert builder.output[0]["content"][0]["text"] == "a"
    builder.feed(Finish("failed", error=ERROR))
    assert [event.number for event in builder.take()] == [5]


def test_an_output_streams_as_itself() -> None:
    builder = build([*deltas_of(OUTPUT), DONE])
    assert builder.output == OUTPUT
    check_stream(parsed(builder))


def test_the_deltas_of_a_message() -> None:
    bare = {"type": "output_text", "text": "", "extra": 1}
    item = {
        **text_item("hi"),
        "content": [*text_item("hi")["content"], {**bare, "text": "you"}, {"type": "odd", "x": 1}],
    }
    assert deltas_of([item]) == [
        Open(0, {**message(), "content": [{"type": "odd", "x": 1}]}),
        Part(0, "output_text", None),
        Text(0, "hi"),
        Part(0, "output_text", bare),
        Text(0, "you"),
        Close(0, item),
    ]


def test_the_deltas_of_calls() -> None:
    search = {**search_call(), "status": "completed"}
    asked = {**call(), "status": "completed", "arguments": "{}"}
    assert deltas_of([search, asked]) == [
        Open(0, search_call()),
        Close(0, search),
        Open(1, call()),
        Text(1, "{}"),
        Close(1, asked),
    ]


@pytest.mark.parametrize("arguments", [None, {"a": 1}, 5])
def test_a_field_that_is_no_text_does_not_stream(arguments: Any) -> None:
    item = {**call(), "arguments": arguments}
    assert deltas_of([item]) == [Open(0, call()), Close(0, item)]


def test_annotations_and_logprobs_of_a_part() -> None:
    deltas = deltas_of([{**message(), "content": [CITED]}])
    assert deltas[1:4] == [
        Part(0, "output_text", None),
        Text(0, "cited", CITED["logprobs"]),
        Note(0, CITED["annotations"][0]),
    ]


ENDINGS: list[dict[str, Any]] = [
    {"status": "completed", "usage": USAGE, "completed_at": 5, "service_tier": "flex"},
    {"status": "incomplete", "usage": USAGE, "incomplete_details": {"reason": "content_filter"}},
    {"status": "failed", "error": ERROR},
]


@pytest.mark.parametrize("ending", ENDINGS, ids=[ending["status"] for ending in ENDINGS])
def test_a_response_streams_as_itself(ending: dict[str, Any]) -> None:
    response = {**ENVELOPE, "service_tier": "default", "output": OUTPUT, **ending}
    events = events_of(deltas_of_response(response))
    check_stream(events)
    assert events[-1]["response"] == response


def test_a_cancelled_response_streams_as_itself() -> None:
    response = {**ENVELOPE, "service_tier": "default", "status": "cancelled"}
    assert events_of(deltas_of_response(response))[-1]["response"] == response


@pytest.mark.parametrize("status", ["in_progress", "incomplete"])
def test_what_a_failure_cut_short_is_not_done_again(status: str) -> None:
    cut = {**call(), "arguments": '{"a', "status": "incomplete"}
    given = [text_item("done"), {**cut, "status": status}]
    response = {**ENVELOPE, "service_tier": "default", "status": "failed", "error": ERROR, "output": given}
    events = events_of(deltas_of_response(response))
    done = [event["item"]["type"] for event in events if event["type"] == "response.output_item.done"]
    assert done == ["message"]
    assert events[-1]["response"] == response


def test_a_response_under_way_cannot_be_replayed() -> None:
    with pytest.raises(ValueError, match="not ended"):
        deltas_of_response({**ENVELOPE, "output": []})
