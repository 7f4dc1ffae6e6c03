"""The builder: which events deltas make, and which deltas it refuses."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from responses_ingress.core.builder import Builder
from responses_ingress.core.deltas import (
    Accepted,
    Close,
    Delta,
    Finish,
    Item,
    Mark,
    Note,
    Open,
    Part,
    Remember,
    Text,
)
from responses_ingress.errors import IllegalDelta
from tests.core.shapes import (
    DONE,
    ENVELOPE,
    ERROR,
    QUEUED,
    USAGE,
    Json,
    any_delta,
    build,
    call,
    code_call,
    custom_call,
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

HELLO: list[Delta] = [Open(0, message()), Part(0, "output_text"), Text(0, "Hel"), Text(0, "lo")]
CALLING: list[Delta] = [Open(0, call()), Text(0, '{"a"')]
INCOMPLETE = Finish("incomplete", reason="max_output_tokens")
FAILED = Finish("failed", error=ERROR)
CANCELLED = Finish("cancelled")


def names(events: Sequence[Json]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def last(deltas: Sequence[Delta]) -> Any:
    return events_of(deltas)[-1]["response"]


# Properties


@given(legal_deltas(side_by_side=False), st.sampled_from([ENVELOPE, QUEUED]))
def test_legal_deltas_make_a_stream_that_keeps_every_invariant(deltas: list[Delta], envelope: Json) -> None:
    check_stream(events_of(deltas, envelope))


@given(legal_deltas())
def test_items_may_be_open_side_by_side(deltas: list[Delta]) -> None:
    check_stream(events_of(deltas), interleaved=True)


@settings(max_examples=30)
@given(legal_deltas())
def test_the_same_deltas_make_the_same_bytes(deltas: list[Delta]) -> None:
    assert build(deltas).take() == build(deltas).take()


@given(st.lists(any_delta, max_size=25), legal_deltas())
def test_a_refused_delta_leaves_no_trace(noise: list[Delta], deltas: list[Delta]) -> None:
    builder = Builder(ENVELOPE)
    builder.start()
    taken: list[Delta] = []
    # Without final items: the noise may have added a part to an item that its final form does not have.
    plain = [Close(delta.index) if isinstance(delta, Close) else delta for delta in deltas]
    for delta in [*chain.from_iterable(zip(noise, plain, strict=False)), *noise, *plain]:
        before = (builder.number, builder.ended, builder.status, builder.memory, orjson.dumps(builder.response()))
        try:
            builder.feed(delta)
            taken.append(delta)
        except IllegalDelta:
            after = (builder.number, builder.ended, builder.status, builder.memory, orjson.dumps(builder.response()))
            assert after == before
    events = builder.take()
    assert events == build(taken).take()
    if builder.ended:
        check_stream([orjson.loads(event.data) for event in events], interleaved=True)


@settings(max_examples=30)
@given(legal_deltas())
def test_the_response_object_is_that_of_the_terminal_event(deltas: list[Delta]) -> None:
    builder = build(deltas)
    assert parsed(builder)[-1]["response"] == builder.response()


@settings(max_examples=30)
@given(legal_deltas(), st.sampled_from([ENVELOPE, QUEUED]))
def test_a_silent_builder_tells_the_same_but_makes_no_events(deltas: list[Delta], envelope: Json) -> None:
    loud, silent = build(deltas, envelope), Builder(envelope, silent=True)
    silent.start()
    for delta in deltas:
        silent.feed(delta)
    assert silent.take() == []
    assert (silent.number, silent.response(), silent.output) == (loud.number, loud.response(), loud.output)


# Events


def test_a_message() -> None:
    events = events_of([Accepted(), *HELLO, Close(0), DONE])
    check_stream(events)
    assert names(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
    assert events[3] == {"type": "response.content_part.added", "sequence_number": 3, **where, "part": part}
    head = {"type": "response.output_text.delta", "sequence_number": 4}
    assert events[4] == {**head, **where, "delta": "Hel", "logprobs": []}
    head = {"type": "response.output_text.done", "sequence_number": 6}
    assert events[6] == {**head, **where, "text": "Hello", "logprobs": []}
    assert events[7]["part"] == {**part, "text": "Hello"}
    assert events[8]["item"] == text_item("Hello")
    assert events[9]["response"]["output"] == [text_item("Hello")]


def test_events_name_type_and_number_first() -> None:
    for event in build([Accepted(), *HELLO, Close(0), DONE]).take():
        head = b'{"type":"%b","sequence_number":%d,' % (event.type.encode(), event.number)
        assert event.data.startswith(head)


@pytest.mark.parametrize(
    ("item", "field", "prefix"),
    [
        (call(), "arguments", "response.function_call_arguments"),
        (mcp_call(), "arguments", "response.mcp_call_arguments"),
        (custom_call(), "input", "response.custom_tool_call_input"),
        (code_call(), "code", "response.code_interpreter_call_code"),
    ],
)
def test_a_streamed_field(item: Item, field: str, prefix: str) -> None:
    events = events_of([Open(0, item), Text(0, "ab"), Text(0, "c"), Close(0), DONE])
    check_stream(events)
    where = {"item_id": item["id"], "output_index": 0}
    assert events[3] == {"type": prefix + ".delta", "sequence_number": 3, **where, "delta": "ab"}
    assert events[5] == {"type": prefix + ".done", "sequence_number": 5, **where, field: "abc"}
    assert events[6]["item"] == {**item, field: "abc", "status": "completed"}


@pytest.mark.parametrize(
    ("item", "kind", "place", "field", "text", "part"),
    [
        (message(), "refusal", "content", "refusal", "refusal", "content_part"),
        (reasoning(), "reasoning_text", "content", "text", "reasoning_text", "content_part"),
        (reasoning(), "summary_text", "summary", "text", "reasoning_summary_text", "reasoning_summary_part"),
    ],
)
def test_a_part(item: Item, kind: Any, place: str, field: str, text: str, part: str) -> None:
    events = events_of([Open(0, item), Part(0, kind), Text(0, "ab"), Part(0, kind), Close(0), DONE])
    check_stream(events)
    whole = [f"{part}.added", f"{text}.delta", f"{text}.done", f"{part}.done"]
    again = [f"{part}.added", f"{text}.done", f"{part}.done"]
    assert names(events) == [
        "created",
        "in_progress",
        "output_item.added",
        *whole,
        *again,
        "output_item.done",
        "completed",
    ]
    assert [event[f"{place}_index"] for event in events[3:10]] == [0, 0, 0, 0, 1, 1, 1]
    assert events[3]["part"] == {"type": kind, field: ""}
    assert events[5][field] == "ab"
    assert events[10]["item"][place] == [{"type": kind, field: "ab"}, {"type": kind, field: ""}]


def test_a_streamed_field_is_sealed_once_though_nothing_came() -> None:
    events = events_of([Open(0, call()), Close(0), DONE])
    check_stream(events)
    assert names(events)[3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert events[3]["arguments"] == ""


def test_what_a_streamed_field_begins_with_streams_too() -> None:
    events = events_of([Open(0, {**call(), "arguments": "{"}), Text(0, "}"), Close(0), DONE])
    check_stream(events)
    assert [event.get("delta") for event in events[3:5]] == ["{", "}"]


def test_what_only_the_final_item_has_of_a_streamed_field_streams_before_its_end() -> None:
    item = {**mcp_call(), "arguments": '{"q":1}', "status": "completed"}
    events = events_of([Open(0, mcp_call()), Text(0, '{"q"'), Close(0, item), DONE])
    check_stream(events)
    assert [event.get("delta") for event in events[3:5]] == ['{"q"', ":1}"]


def test_logprobs() -> None:
    one, two = {"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -0.2}
    events = events_of(
        [Open(0, message()), Part(0, "output_text"), Text(0, "a", [one]), Text(0, "b", [two]), Close(0), DONE]
    )
    check_stream(events)
    assert events[4]["logprobs"] == [one]
    assert events[6]["logprobs"] == [one, two]
    # Recorded: they are in the text's end and in the item, not in the part's end.
    assert events[7]["part"]["logprobs"] == []
    assert events[8]["item"]["content"][0]["logprobs"] == [one, two]


def test_logprobs_of_text_that_has_none_are_left_out() -> None:
    events = events_of([Open(0, call()), Text(0, "{}", [{"token": "{}"}]), Close(0), DONE])
    check_stream(events)
    assert "logprobs" not in events[3] and "logprobs" not in events[4]


def test_a_part_without_logprobs_stays_without() -> None:
    bare = {"type": "output_text", "annotations": [], "text": ""}
    events = events_of(
        [Open(0, message()), Part(0, "output_text", bare), Text(0, "a", [{"token": "a"}]), Close(0), DONE]
    )
    assert events[3]["part"] == bare
    assert events[7]["item"]["content"] == [{**bare, "text": "a"}]


def test_annotations() -> None:
    first, second = {"type": "url_citation", "url": "a"}, {"type": "url_citation", "url": "b"}
    events = events_of([*HELLO, Note(0, first), Text(0, "!"), Note(0, second), Close(0), DONE])
    check_stream(events)
    added = [event for event in events if event["type"] == "response.output_text.annotation.added"]
    assert [(event["annotation_index"], event["annotation"]) for event in added] == [(0, first), (1, second)]
    assert events[-1]["response"]["output"][0]["content"][0]["annotations"] == [first, second]


def test_a_phase_seals_and_the_first_phase_does_not() -> None:
    item = {**code_call(), "outputs": [], "status": "completed", "code": "1+1"}
    phases = "response.code_interpreter_call."
    events = events_of(
        [
            Open(0, code_call()),
            Mark(0, phases + "in_progress"),
            Text(0, "1+1"),
            Mark(0, phases + "interpreting"),
            Mark(0, phases + "completed"),
            Close(0, item),
            DONE,
        ]
    )
    check_stream(events)
    assert names(events)[3:8] == [
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
    ]
    assert events[3]["item_id"] == "ci_1" and events[3]["output_index"] == 0


def test_marks_carry_their_fields_and_seal_nothing_they_do_not_name() -> None:
    events = events_of([*CALLING, Mark(0, "response.odd.thing", {"x": 1}), Mark(None, "odd", {"y": 2}), Close(0), DONE])
    check_stream(events)
    assert events[4] == {
        "type": "response.odd.thing",
        "sequence_number": 4,
        "output_index": 0,
        "item_id": "fc_1",
        "x": 1,
    }
    assert events[5] == {"type": "odd", "sequence_number": 5, "y": 2}


@pytest.mark.parametrize("name", ["", "a b", "x\n\nevent: response.completed\ndata: {}\n\n: ", "odd\n", "x" * 129])
@pytest.mark.parametrize("index", [None, 0])
def test_an_event_whose_type_could_forge_another_is_refused(name: str, index: int | None) -> None:
    builder = build([Open(0, call())])
    with pytest.raises(IllegalDelta):
        builder.feed(Mark(index, name))
    builder.feed(Mark(index, "response.odd-1_x"))


def test_the_final_item_of_a_backend_counts_but_for_its_id() -> None:
    final = {**search_call("other"), "status": "completed", "extra": [1]}
    events = events_of([Open(0, search_call()), Close(0, final), DONE])
    check_stream(events)
    assert events[3]["item"] == {**final, "id": "ws_1"}
    assert events[4]["response"]["output"] == [{**final, "id": "ws_1"}]


@pytest.mark.parametrize(("given", "kept"), [({}, "call_a"), ({"call_id": ""}, "call_a"), ({"call_id": "b"}, "b")])
def test_a_call_whose_final_form_has_no_call_id_keeps_its_own(given: Json, kept: str) -> None:
    final = {key: value for key, value in call().items() if key != "call_id"} | given
    opened = Open(0, {**call(), "call_id": "call_a"})
    for ending in ([Close(0, final), DONE], [Finish("completed", items={0: final})]):
        output = events_of([opened, *ending])[-1]["response"]["output"]
        assert output[0]["call_id"] == kept


def test_an_item_that_is_done_is_not_in_progress() -> None:
    events = events_of([Open(0, search_call()), Close(0, search_call()), DONE])
    check_stream(events)
    assert events[3]["item"]["status"] == "completed"


def test_an_item_without_status_gets_none() -> None:
    assert last([Open(0, reasoning()), Close(0), DONE])["output"] == [reasoning()]


# Beginning


@pytest.mark.parametrize(
    "first", [[Accepted(), Accepted()], [], [*HELLO, Close(0)], [Mark(None, "odd")], [Remember({})]]
)
def test_in_progress_comes_second_whatever_comes_first(first: list[Delta]) -> None:
    events = events_of([*first, DONE])
    check_stream(events)
    assert events[1]["response"]["status"] == "in_progress"


def test_a_queued_response() -> None:
    builder = build([], QUEUED)
    assert builder.status == "queued"
    assert [event.type for event in builder.take()] == ["response.created", "response.queued"]
    builder.feed(Accepted())
    assert builder.status == "in_progress"
    assert parsed(builder)[0]["response"]["status"] == "in_progress"
    check_stream(events_of([Accepted(), DONE], QUEUED))


def test_memory_is_no_event() -> None:
    builder = build([Remember({"id": "a"}), Remember({"id": "b"})])
    assert builder.memory == {"id": "b"}
    assert builder.number == 1


def test_take_gives_each_event_once() -> None:
    builder = build([Accepted()])
    assert [event.number for event in builder.take()] == [0, 1]
    assert builder.take() == []
    builder.feed(Open(0, message()))
    assert [event.number for event in builder.take()] == [2]
    assert builder.number == 3


# Under way


def test_the_response_under_way() -> None:
    builder = build([*HELLO, Note(0, {"type": "n"})])
    part = {"type": "output_text", "annotations": [{"type": "n"}], "logprobs": [], "text": "Hello"}
    snapshot = builder.response()
    assert snapshot["status"] == "in_progress" and snapshot["usage"] is None
    assert snapshot["output"] == [{**message(), "content": [part]}]
    builder.feed(Note(0, {"type": "m"}))
    builder.feed(Text(0, "!"))
    builder.feed(Part(0, "refusal"))
    assert snapshot["output"] == [{**message(), "content": [part]}]
    assert [part["type"] for part in builder.output[0]["content"]] == ["output_text", "refusal"]


def test_a_field_under_way() -> None:
    assert build(CALLING).output == [{**call(), "arguments": '{"a"'}]


# Endings


def test_completed() -> None:
    response = last([*HELLO, Close(0), DONE])
    assert response["status"] == "completed"
    assert response["completed_at"] == DONE.at
    assert response["usage"] == USAGE
    assert response["error"] is None and response["incomplete_details"] is None
    assert response["service_tier"] == "default"


def test_incomplete_seals_and_closes_what_is_open() -> None:
    events = events_of([*HELLO, INCOMPLETE])
    check_stream(events)
    response = events[-1]["response"]
    assert events[-2]["type"] == "response.output_item.done"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert [item["status"] for item in response["output"]] == ["incomplete"]


@pytest.mark.parametrize("phase", [[], [Mark(0, "response.function_call.completed")]])
def test_incomplete_does_not_say_that_half_a_call_is_done(phase: list[Delta]) -> None:
    events = events_of([*CALLING, *phase, INCOMPLETE])
    check_stream(events)
    assert not [name for name in names(events) if name == "output_item.done"]
    assert [item["status"] for item in events[-1]["response"]["output"]] == ["incomplete"]


@pytest.mark.parametrize("finish", [FAILED, CANCELLED])
@pytest.mark.parametrize("opened", [HELLO, CALLING])
def test_failed_and_cancelled_abandon_what_is_open(opened: list[Delta], finish: Finish) -> None:
    builder = build([*opened, finish])
    events = parsed(builder)
    check_stream(events)
    assert not [name for name in names(events) if name.endswith("done")]
    assert events[-1]["type"] == "response.failed"
    assert [item["status"] for item in builder.output] == ["incomplete"]
    assert builder.output[0].get("arguments", '{"a"') == '{"a"'


def test_failed() -> None:
    response = last([*HELLO, FAILED])
    assert response["status"] == "failed" and response["error"] == ERROR
    assert response["usage"] is None and response["completed_at"] is None
    assert response["output"] == [{**text_item("Hello"), "status": "incomplete"}]


def test_cancelled_shows_no_output() -> None:
    builder = build([*HELLO, CANCELLED])
    response = builder.response()
    assert response["status"] == "cancelled" and response["error"] is None and response["output"] == []
    assert builder.output == [{**text_item("Hello"), "status": "incomplete"}]


def test_items_that_were_done_before_a_failure_stay_done() -> None:
    assert last([*HELLO, Close(0), FAILED])["output"] == [text_item("Hello")]


ZERO = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}


@pytest.mark.parametrize(
    ("usage", "shown"),
    [
        (None, ZERO),
        ({}, ZERO),
        (USAGE, USAGE),
        ({"input_tokens": 3, "output_tokens": 4}, {**ZERO, "input_tokens": 3, "output_tokens": 4, "total_tokens": 7}),
        ({"input_tokens_details": None, "output_tokens_details": 5, "total_tokens": "9", "cost": 0.1}, ZERO),
    ],
)
def test_usage_is_always_all_integers(usage: Any, shown: Json) -> None:
    assert last([Finish("completed", usage=usage, at=1)])["usage"] == shown
    assert last([Finish("incomplete", reason="content_filter", usage=usage)])["usage"] == shown
    assert last([Finish("failed", error=ERROR, usage=usage)])["usage"] == (shown if usage else None)


def test_the_tier_that_served() -> None:
    assert last([Finish("completed", echo={"service_tier": "flex"}, at=1)])["service_tier"] == "flex"
    assert events_of([DONE], {**ENVELOPE, "service_tier": "flex"})[-1]["response"]["service_tier"] == "flex"
    without = {key: value for key, value in ENVELOPE.items() if key != "service_tier"}
    assert "service_tier" not in events_of([DONE], without)[-1]["response"]


def test_echo_changes_the_final_object_only() -> None:
    events = events_of([Finish("completed", echo={"moderation": {"ok": True}}, at=1)])
    assert "moderation" not in events[1]["response"]
    assert events[-1]["response"]["moderation"] == {"ok": True}


def test_items_that_only_the_end_brings() -> None:
    final = {**search_call("renamed"), "status": "completed"}
    new = text_item("late", "msg_9")
    events = events_of([Open(0, search_call()), Finish("completed", items={1: new, 0: final}, at=1)])
    check_stream(events, backfilled=True)
    assert names(events)[3:] == ["completed"]
    assert events[-1]["response"]["output"] == [{**final, "id": "ws_1"}, new]


def test_the_end_may_have_a_newer_form_of_an_item_that_was_done() -> None:
    again = {**reasoning(), "encrypted_content": "b"}
    events = events_of(
        [
            Open(0, reasoning()),
            Close(0, {**reasoning(), "encrypted_content": "a"}),
            Finish("completed", items={0: again}),
        ]
    )
    assert events[-1]["response"]["output"] == [again]


def test_the_end_of_a_failure_may_bring_the_item_it_cut_short() -> None:
    cut = {**call(), "status": "incomplete", "arguments": "{"}
    events = events_of([Open(0, call()), Finish("failed", error=ERROR, items={0: cut})])
    check_stream(events)
    assert events[-1]["response"]["output"] == [cut]


# Refusals

ILLEGAL: list[tuple[str, list[Delta], Delta]] = [
    ("an item that is not next", [], Open(1, message())),
    ("a negative index", [], Open(-1, message())),
    ("an index that is taken", [Open(0, message())], Open(0, message())),
    ("an item without an id", [], Open(0, {"type": "message"})),
    ("an item without a type", [], Open(0, {"id": "msg_1"})),
    ("a streamed field that is no text", [], Open(0, {**call(), "arguments": {"a": 1}})),
    ("text before any item", [], Text(0, "a")),
    ("text where no part is open", [Open(0, message())], Text(0, "a")),
    ("text of a hosted call", [Open(0, search_call())], Text(0, "a")),
    ("text after its phase", [*CALLING, Mark(0, "response.function_call.completed")], Text(0, "a")),
    ("text of a closed item", [*HELLO, Close(0)], Text(0, "a")),
    ("text that is no Unicode", HELLO, Text(0, "\ud800")),
    ("a part of an item that is not open", [], Part(0, "output_text")),
    ("a part of a call", [Open(0, call())], Part(0, "output_text")),
    ("a part of an unknown kind", [Open(0, message())], Part(0, "output_smell")),  # type: ignore[arg-type]
    ("a part where there is no list", [Open(0, {**message(), "content": "hi"})], Part(0, "output_text")),
    ("a part that is no JSON", HELLO, Part(0, "refusal", {"refusal": "", "x": object()})),
    ("an annotation without a part", [Open(0, message())], Note(0, {})),
    ("an annotation on a refusal", [Open(0, message()), Part(0, "refusal")], Note(0, {})),
    ("an annotation on a field", [Open(0, call())], Note(0, {})),
    ("a mark of an item that is not open", [], Mark(0, "response.odd")),
    ("a mark with an event of ours", [Open(0, message())], Mark(0, "response.output_item.done")),
    ("a mark that ends the response", [], Mark(None, "response.completed")),
    ("a mark with text", HELLO, Mark(0, "response.output_text.delta", {"delta": "x"})),
    ("an end of an item that is not open", [], Close(0)),
    ("an item that ends twice", [*HELLO, Close(0)], Close(0)),
    ("an item that ends as another", HELLO, Close(0, search_call())),
    ("an item too deep to be sent", HELLO, Close(0, {**message(), "x": orjson.loads(b"[" * 252 + b"]" * 252)})),
    ("a completed response with an open item", HELLO, DONE),
    ("an incomplete response without a reason", HELLO, Finish("incomplete")),
    ("a failed response without an error", HELLO, Finish("failed")),
    ("a final item that leaves a gap", HELLO, Finish("failed", error=ERROR, items={2: message()})),
    ("a final item before the first", HELLO, Finish("failed", error=ERROR, items={-1: message()})),
    ("a final item of another type", HELLO, Finish("failed", error=ERROR, items={0: search_call()})),
    ("a final item without an id", [], Finish("completed", items={0: {"type": "message"}})),
]
AFTER: list[Delta] = [Accepted(), Open(0, message()), Text(0, "a"), Mark(None, "odd"), Remember({}), DONE]
ILLEGAL += [(f"{type(delta).__name__} after the end", [Accepted(), DONE], delta) for delta in AFTER]


@pytest.mark.parametrize(("before", "delta"), [case[1:] for case in ILLEGAL], ids=[case[0] for case in ILLEGAL])
def test_an_illegal_delta_is_refused_and_changes_nothing(before: list[Delta], delta: Delta) -> None:
    builder, other = build(before), build(before)
    with pytest.raises(IllegalDelta):
        builder.feed(delta)
    assert builder.number == other.number
    assert builder.response() == other.response()
    rest: list[Delta] = [] if builder.ended else [FAILED]
    for following in rest:
        builder.feed(following)
        other.feed(following)
    assert builder.take() == other.take()


def test_nothing_is_legal_before_the_start_and_it_starts_once() -> None:
    builder = Builder(ENVELOPE)
    for delta in (Accepted(), Open(0, message()), Text(0, "a"), DONE):
        with pytest.raises(IllegalDelta):
            builder.feed(delta)
    builder.start()
    with pytest.raises(IllegalDelta):
        builder.start()
    assert len(builder.take()) == 1
