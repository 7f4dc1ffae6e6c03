"""The reader of the Responses dialect: what a provider's stream becomes, also when it is a faulty one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Mark, Note, Open, Part, Text
from responses_ingress.dialects.responses import ResponsesReader
from responses_ingress.errors import UpstreamError, UpstreamInvalid, UpstreamTruncated
from tests.core.shapes import (
    DONE,
    ENVELOPE,
    ERROR,
    QUEUED,
    USAGE,
    Json,
    build,
    call,
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
from tests.dialects.answers import ANSWER, EVENTS, NOTE, OUTPUT, finish_of, read, rebuilt, without
from tests.invariants import check_stream

# Sound streams


def test_a_stream_as_deltas() -> None:
    deltas = read(EVENTS)
    assert deltas == [
        Accepted(),
        Open(0, reasoning()),
        Part(0, "summary_text"),
        Text(0, "thi"),
        Text(0, "nk"),
        Close(0, OUTPUT[0]),
        Open(1, search_call()),
        Mark(1, "response.web_search_call.searching"),
        Close(1, OUTPUT[1]),
        Open(2, message()),
        Part(2, "output_text"),
        Text(2, "Hel"),
        Text(2, "lo"),
        Note(2, NOTE),
        Close(2, OUTPUT[2]),
        Open(3, call()),
        Text(3, '{"a"'),
        Text(3, ":1}"),
        Close(3, OUTPUT[3]),
        Finish("completed", usage=USAGE, echo={"service_tier": "default"}, at=DONE.at),
    ]


@given(legal_deltas(), st.sampled_from([ENVELOPE, QUEUED]))
def test_what_we_send_we_read_back(deltas: list[Delta], envelope: Json) -> None:
    events = events_of(deltas, envelope)
    assert events_of(read(events), envelope) == events


def test_logprobs_come_with_their_text() -> None:
    scored = Text(0, "a", [{"token": "a", "logprob": -0.5}])
    events = events_of([Open(0, message()), Part(0, "output_text"), scored, Close(0), DONE])
    assert scored in read(events)
    assert Text(0, "a") in read([{**event, "logprobs": "odd"} for event in events])


def test_the_envelope_is_the_response_as_created() -> None:
    reader = ResponsesReader()
    for event in EVENTS:
        reader.feed(event)
    assert reader.envelope == ENVELOPE


def test_the_envelope_of_a_stream_that_begins_at_its_end() -> None:
    reader = ResponsesReader()
    reader.feed(EVENTS[-1])
    assert reader.envelope == {**ENVELOPE, "service_tier": "default"}


def test_what_changed_since_creation_is_echoed() -> None:
    final = {**EVENTS[-1]["response"], "moderation": {"ok": True}, "model": "other", "id": "resp_2"}
    finish = finish_of(read([*EVENTS[:-1], {**EVENTS[-1], "response": final}]))
    assert finish.echo == {"service_tier": "default", "moderation": {"ok": True}, "model": "other"}


def test_the_newer_encrypted_content_is_kept() -> None:
    first = {**reasoning(), "encrypted_content": "a"}
    events = events_of([Open(0, first), Close(0), DONE])
    events[-1]["response"]["output"][0]["encrypted_content"] = "b"
    assert finish_of(read(events)).items == {0: {**first, "encrypted_content": "b"}}
    assert rebuilt(events) == events


def test_encrypted_content_is_sealed_wherever_it_stands() -> None:
    first: Json = {**reasoning(), "encrypted_content": "a"}
    compaction: Json = {"type": "compaction", "id": "cmp_1", "encrypted_content": "c"}
    events = events_of([Open(0, first), Close(0), Open(1, compaction), Close(1), DONE])
    events[-1]["response"]["output"][0]["encrypted_content"] = "b"
    reader = ResponsesReader("mine")
    deltas = [delta for event in events for delta in reader.feed(event)]
    opened = [delta.item["encrypted_content"] for delta in deltas if isinstance(delta, Open)]
    closed = [(delta.item or {})["encrypted_content"] for delta in deltas if isinstance(delta, Close)]
    assert opened == closed == ["mine:a", "mine:c"]
    assert finish_of(deltas).items == {0: {**first, "encrypted_content": "mine:b"}}
    whole = [delta for delta in ResponsesReader("mine").read_json(events[-1]["response"]) if isinstance(delta, Close)]
    assert [(delta.item or {})["encrypted_content"] for delta in whole] == ["mine:b", "mine:c"]


def test_encrypted_parts_are_sealed_too() -> None:
    part = {"type": "encrypted_content", "encrypted_content": "a"}
    agent = {"id": "am_1", "type": "agent_message", "content": [part, {"type": "input_text", "text": "so"}]}
    output = {"id": "fco_1", "type": "function_call_output", "call_id": "c", "output": [part, "odd"]}
    response = {**EVENTS[-1]["response"], "output": [agent, output]}
    closed = [delta.item for delta in ResponsesReader("mine").read_json(response) if isinstance(delta, Close)]
    sealed = {**part, "encrypted_content": "mine:a"}
    assert closed == [{**agent, "content": [sealed, agent["content"][1]]}, {**output, "output": [sealed, "odd"]}]


@pytest.mark.parametrize("made", [call, custom_call])
def test_a_call_without_a_call_id_is_given_one_by_the_run(made: Callable[..., Json]) -> None:
    """An empty one is what says so."""
    nameless = {key: value for key, value in made().items() if key != "call_id"}
    response = {**EVENTS[-1]["response"], "output": [nameless]}
    opened = [delta.item for delta in ResponsesReader().read_json(response) if isinstance(delta, Open)]
    assert [item["call_id"] for item in opened] == [""]


def test_unknown_events_are_marks() -> None:
    odd = {"type": "response.odd", "sequence_number": 2, "x": 1, "obfuscation": "zz"}
    about = {"type": "response.odd.one", "output_index": 1, "item_id": "ws_1", "y": 2}
    assert read([*EVENTS[:2], odd, *EVENTS[2:]])[1] == Mark(None, "response.odd", {"x": 1})
    at = next(n for n, event in enumerate(EVENTS) if event["type"].endswith("searching"))
    assert Mark(1, "response.odd.one", {"y": 2}) in read([*EVENTS[:at], about, *EVENTS[at:]])
    for nobody in ({"item_id": "nobody"}, {"output_index": 9}, {"item_id": "rs_1"}):
        assert read([*EVENTS[:at], {"type": "response.odd.one", **nobody}, *EVENTS[at:]]) == read(EVENTS)


@pytest.mark.parametrize("name", ["keepalive", "ping", "response.metadata"])
def test_events_about_the_connection_are_dropped(name: str) -> None:
    assert read([{"type": name}, *EVENTS]) == read(EVENTS)


# Endings


@pytest.mark.parametrize("status", ["incomplete", "failed"])
def test_an_ending_with_a_call_cut_short(status: str) -> None:
    finish = Finish("incomplete", reason="content_filter") if status == "incomplete" else Finish("failed", error=ERROR)
    events = events_of([*ANSWER[:-2], finish])
    check_stream(events)
    assert rebuilt(events) == events


@pytest.mark.parametrize("status", ["incomplete", "completed"])
@pytest.mark.parametrize("left_out", ["nothing", "function_call_arguments.delta", "output_item.added", "output"])
def test_half_a_call_is_never_told_as_done(status: str, left_out: str) -> None:
    half = {**call(), "arguments": '{"a', "status": "incomplete"}
    finish = (
        Finish("incomplete", reason="max_output_tokens") if status == "incomplete" else replace(DONE, items={0: half})
    )
    events = events_of([Accepted(), Open(0, call()), Text(0, '{"a'), finish])
    done = {"type": "response.output_item.done", "output_index": 0, "item": half}
    final = {**events[-1]["response"], "output": [] if left_out == "output" else [half]}
    again = rebuilt(without(left_out, [*events[:-1], done, done, {**events[-1], "response": final}]))
    assert not [event for event in again if event["type"].endswith(".done")]
    assert "".join(event.get("delta", "") for event in again) == half["arguments"]
    assert again[-1]["response"]["output"] == [half]


def test_half_a_call_that_only_the_final_response_tells() -> None:
    half = {**call(), "arguments": '{"a', "status": "incomplete"}
    final = {**ENVELOPE, "status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": [half]}
    again = rebuilt([EVENTS[0], {"type": "response.incomplete", "response": final}])
    assert [event["type"] for event in again[3:]] == ["response.function_call_arguments.delta", "response.incomplete"]
    assert again[-1]["response"]["output"] == [half]


def half_a_call(kind: str, status: str | None) -> Json:
    if kind == "custom_tool_call":
        item: Json = {**custom_call(), "input": "rm -rf /tm", "status": status}
    else:
        item = {
            **(call() if kind == "function_call" else mcp_call()),
            "arguments": '{"cmd":"rm -rf /tm',
            "status": status,
        }
    return {key: value for key, value in item.items() if key != "status" or value is not None}


def cut_response(output: list[Json], status: str) -> Json:
    details, error = {"reason": "max_output_tokens"}, {"error": ERROR}
    ending = {"incomplete_details": details} if status == "incomplete" else error
    return {**ENVELOPE, "status": status, "output": output, **ending}


@pytest.mark.parametrize("ending", ["incomplete", "failed"])
@pytest.mark.parametrize("status", ["completed", "in_progress", None])
@pytest.mark.parametrize("kind", ["function_call", "mcp_call", "custom_tool_call"])
def test_half_a_call_is_not_done_whatever_its_status_says(kind: str, status: str | None, ending: str) -> None:
    half = half_a_call(kind, status)
    final = cut_response([text_item("Sure."), half], ending)
    told = [
        events_of(ResponsesReader().read_json(final)),
        rebuilt([EVENTS[0], {"type": f"response.{ending}", "response": final}]),
    ]
    if kind != "custom_tool_call":
        done = {"type": "response.output_item.done", "output_index": 0, "item": half}
        told.append(rebuilt([EVENTS[0], done, {"type": f"response.{ending}", "response": final}]))
        told.append(rebuilt([EVENTS[0], done, {"type": f"response.{ending}", "response": cut_response([], ending)}]))
    for events in told:
        check_stream(events, interleaved=True)
        ends = [event for event in events if event["type"].endswith(".done")]
        assert not [event for event in ends if "arguments" in event or "input" in event]
        assert all(event["item"]["type"] == "message" for event in ends if "item" in event)
        calls = [item for item in events[-1]["response"]["output"] if item["type"] == kind]
        assert [item["status"] for item in calls] == ["incomplete"]


@pytest.mark.parametrize("ending", ["incomplete", "failed"])
def test_a_call_that_was_told_as_done_stays_so_in_a_response_cut_short(ending: str) -> None:
    done: list[Json] = [{**call(), "arguments": '{"a":1}', "status": "completed"}]
    done.append({**custom_call(), "input": "ls", "status": "completed"})
    events = [
        {"type": "response.output_item.done", "output_index": index, "item": item} for index, item in enumerate(done)
    ]
    again = rebuilt([EVENTS[0], *events, {"type": f"response.{ending}", "response": cut_response(done, ending)}])
    check_stream(again)
    assert [event["item"] for event in again if event["type"] == "response.output_item.done"] == done
    assert again[-1]["response"]["output"] == done


@pytest.mark.parametrize("final", [[], [text_item("Sure.")], None])
@pytest.mark.parametrize("make", [call, mcp_call])
def test_a_response_completed_in_the_middle_of_a_call_is_truncated(make: Callable[[], Json], final: Any) -> None:
    events = events_of([Accepted(), Open(0, make()), Text(0, '{"cmd":"rm -rf /tm'), replace(DONE, items={0: make()})])
    end = {**events[-1], "response": {**events[-1]["response"], "output": final}}
    with pytest.raises(UpstreamTruncated):
        read([*events[:-1], end])
    whole = [{**event, "delta": '{"cmd":"ls"}'} if "delta" in event else event for event in events[:-1]]
    assert Close(0) in read([*whole, end])


@pytest.mark.parametrize("arguments", ["", "[]", '{"a', "look up"])
@pytest.mark.parametrize("final", ["as it was", "left out"])
def test_arguments_that_the_model_wrote_wrong_are_done_with_the_response(arguments: str, final: str) -> None:
    written = {**call(), "arguments": arguments, "status": "completed"}
    done = {"type": "response.output_item.done", "output_index": 0, "item": written}
    end = {**EVENTS[-1]["response"], "output": [] if final == "left out" else [written]}
    again = rebuilt([EVENTS[0], done, {"type": "response.completed", "response": end}])
    check_stream(again)
    assert again[-2]["item"] == again[-1]["response"]["output"][0] == written


def test_a_failure_closes_nothing_and_keeps_what_it_tells() -> None:
    told = {**call("fc_9"), "arguments": "{", "status": "incomplete"}
    events = events_of([Accepted(), Finish("failed", error=ERROR)])
    events[-1]["response"]["output"] = [told]
    assert read(events) == [
        Accepted(),
        Finish("failed", error=ERROR, items={0: told}, echo={"service_tier": "default"}),
    ]


@pytest.mark.parametrize("name", ["response.failed", "response.cancelled"])
def test_a_cancelled_response(name: str) -> None:
    events = events_of([Accepted(), Finish("cancelled")])
    assert finish_of(read([*events[:-1], {**events[-1], "type": name}])).status == "cancelled"


def test_incomplete_without_a_reason_is_a_failure() -> None:
    events = events_of([Accepted(), Finish("incomplete", reason="x")])
    events[-1]["response"]["incomplete_details"] = None
    finish = finish_of(read(events))
    assert finish.status == "failed" and finish.error is not None
    assert "without a reason" in finish.error["message"]


@pytest.mark.parametrize(
    "event",
    [
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "code": "odd_code", "message": "No.", "param": "x"},
        },
        {"type": "error", "code": "odd_code", "message": "No.", "param": None},
    ],
    ids=["nested", "flat"],
)
def test_an_error_event_fails_the_response(event: Json) -> None:
    failed = events_of([Finish("failed", error=ERROR)])[-1]
    assert read([*EVENTS[:5], event, failed])[-1] == Finish("failed", error={"code": "odd_code", "message": "No."})


def test_an_error_without_a_type_fails_the_response() -> None:
    error = {"code": "odd_code", "message": "No."}
    assert read([*EVENTS[:5], {"error": error}])[-1] == Finish("failed", error=error)
    assert ResponsesReader().read_json({"error": error}) == [Finish("failed", error=error)]


@pytest.mark.parametrize(
    "error", [None, "broken", {}, {"code": 429, "message": "slow down"}, {"message": "No."}, {"code": "odd"}]
)
def test_any_error_is_told_with_code_and_message(error: Any) -> None:
    deltas = read([{"type": "error", "error": error}])
    detail = finish_of(deltas).error
    assert detail is not None and set(detail) == {"code", "message"} and all(detail.values())


def test_trouble_with_the_upstreams_key_shows_nothing_of_it() -> None:
    error = {"code": "invalid_api_key", "message": "Incorrect API key provided: sk-proj-****1234."}
    for deltas in (read([{"type": "error", "error": error}]), ResponsesReader().read_json({"error": error})):
        assert finish_of(deltas).error == {
            "code": "upstream_refused",
            "message": "The upstream refused its credentials.",
        }


def test_a_full_context_has_its_one_code() -> None:
    error = {"code": "bad", "message": "This model's maximum context length is 8192 tokens."}
    detail = finish_of(read([{"type": "error", "error": error}])).error
    assert detail == {"code": "context_length_exceeded", "message": error["message"]}


def test_nothing_comes_after_the_end() -> None:
    assert read([*EVENTS, *EVENTS]) == read(EVENTS)


@pytest.mark.parametrize("count", range(len(EVENTS)))
def test_a_stream_without_its_end_is_truncated(count: int) -> None:
    with pytest.raises(UpstreamTruncated):
        read(EVENTS[:count])


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": 5},
        {"type": ""},
        {"type": "x\n\nevent: response.completed\ndata: {}\n\n: "},
        {"type": "response.odd\r"},
        {"type": "response.odd\u2028"},
        {"type": "x" * 129},
        {"type": "response.created"},
        {"type": "response.completed"},
        {"type": "response.completed", "response": {"id": "r", "output": [{"id": "x"}]}},
        {"type": "response.output_item.added"},
        {"type": "response.output_item.added", "item": {"id": "x"}},
        {"type": "response.output_item.done", "item": []},
        {"type": "response.content_part.added", "part": "x"},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": None},
        {"type": "response.output_item.done", "output_index": 0, "item": {"id": "rs_1", "type": "message"}},
    ],
)
def test_events_that_say_nothing_are_the_upstreams_fault(event: Json) -> None:
    with pytest.raises(UpstreamInvalid):
        read([*EVENTS[:4], event])


# JSON answers


def test_a_json_answer() -> None:
    reader = ResponsesReader()
    response = EVENTS[-1]["response"]
    deltas = reader.read_json(response)
    assert reader.envelope is not None
    events = events_of(deltas, reader.envelope)
    check_stream(events)
    assert events[-1]["response"] == response
    assert reader.feed(EVENTS[0]) == [] and reader.end() == []


@pytest.mark.parametrize("status", ["queued", "in_progress", None])
def test_a_json_answer_that_has_not_ended(status: str | None) -> None:
    with pytest.raises(UpstreamTruncated):
        ResponsesReader().read_json({**ENVELOPE, "status": status})


@pytest.mark.parametrize("output", [None, {}, "text"])
def test_a_json_answer_without_output(output: Any) -> None:
    with pytest.raises(UpstreamInvalid):
        ResponsesReader().read_json({**ENVELOPE, "status": "completed", "output": output})


@pytest.mark.parametrize("output", [None, {}, []])
def test_a_failure_needs_no_output(output: Any) -> None:
    deltas = ResponsesReader().read_json({**ENVELOPE, "status": "failed", "output": output, "error": ERROR})
    assert deltas == [Accepted(), Finish("failed", error=ERROR, echo={"service_tier": "auto"})]


def test_a_json_answer_with_faults() -> None:
    response = {
        **ENVELOPE,
        "status": "completed",
        "output": [{"type": "message", "content": None}],
        "completed_at": 5.5,
    }
    assert ResponsesReader().read_json(response) == [
        Accepted(),
        Open(0, {"type": "message", "content": [], "id": "msg_100"}),
        Close(0, {"type": "message", "content": [], "id": "msg_100"}),
        Finish("completed", echo={"service_tier": "auto"}, at=5),
    ]


# Anything at all

junk: st.SearchStrategy[Any] = (
    st.none() | st.integers(-1, 2) | st.sampled_from(["", "x", "msg_1"]) | st.lists(st.none(), max_size=1)
)
Change = Callable[[list[Json]], None]


def spoiled(value: Any, path: Sequence[int], by: Any) -> Any:
    """`value` with `by` somewhere in it: `path` picks keys and positions."""
    if not path or not value or not isinstance(value, dict | list):
        return by
    keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = value.copy()
    copy[key] = spoiled(value[key], path[1:], by)
    return copy


@st.composite
def changes(draw: st.DrawFn) -> Change:
    what = draw(st.sampled_from(["drop", "repeat", "swap", "spoil", "spoil"]))
    at, by, path = draw(st.integers(0, 200)), draw(junk), draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))

    def change(events: list[Json]) -> None:
        number = at % len(events)
        event = events[number]
        if what == "drop" and len(events) > 1:
            del events[number]
        elif what == "repeat":
            events.insert(number, event)
        elif what == "swap":
            events[number], events[number - 1] = events[number - 1], event
        elif what == "spoil":
            events[number] = spoiled(event, path, by)

    return change


@settings(max_examples=300)
@given(st.just(ANSWER) | legal_deltas(), st.lists(changes(), min_size=1, max_size=4))
def test_whatever_comes_is_legal_or_the_upstreams_fault(deltas: list[Delta], spoil: list[Change]) -> None:
    events = events_of(deltas)
    for change in spoil:
        change(events)
    try:
        read_back = read(events)
    except UpstreamError:
        return
    builder = build(read_back)
    assert builder.ended
    assert parsed(builder)
