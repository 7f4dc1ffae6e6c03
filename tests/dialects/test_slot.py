"""Streams of providers that leave out, repeat or rename what a Responses stream should have: what comes out
is what should have been sent.
"""

from copy import deepcopy
from typing import Any

import pytest

from responses_ingress.core.deltas import Close, Delta, Mark, Note, Open, Part, Text
from responses_ingress.dialects.responses import ResponsesReader
from tests.core.shapes import (
    DONE,
    ENVELOPE,
    Json,
    call,
    code_call,
    custom_call,
    events_of,
    message,
    reasoning,
    search_call,
    text_item,
)
from tests.dialects.answers import EVENTS, HELLO, NOTE, OUTPUT, read, rebuilt, without


@pytest.mark.parametrize(
    "name",
    [
        "content_part.added",
        "content_part.done",
        "reasoning_summary_part.added",
        "reasoning_summary_part.done",
        "output_text.delta",
        "output_text.done",
        "annotation.added",
        "reasoning_summary_text.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "in_progress",
    ],
)
def test_a_kind_of_event_that_never_comes(name: str) -> None:
    events = rebuilt(without(name))
    assert [event["type"] for event in events if not event["type"].endswith("delta")] == [
        event["type"] for event in EVENTS if not event["type"].endswith("delta")
    ]
    assert events[-1]["response"]["output"] == OUTPUT


@pytest.mark.parametrize("part", ["content_part.added", "content_part.done"])
def test_text_and_annotations_that_only_the_final_item_has(part: str) -> None:
    events = EVENTS
    for name in ("annotation.added", "content_part.done", "output_text.done", "output_text.delta", part):
        events = without(name, events)
    assert rebuilt(events)[-1]["response"]["output"] == OUTPUT


@pytest.mark.parametrize(
    "part", ["text", None, {"type": "output_text", "text": 5}, {"type": "refusal", "annotations": 5}]
)
def test_parts_that_cannot_stream_stay_as_they_are(part: Any) -> None:
    item = {**message(), "status": "completed", "content": [part]}
    final = {**ENVELOPE, "status": "completed", "output": [item]}
    deltas = ResponsesReader().read_json(final)
    assert deltas[1:3] == [Open(0, {**message(), "content": [part]}), Close(0, item)]


@pytest.mark.parametrize("name", ["output_item.added", "output_item.done"])
def test_items_that_are_never_announced_or_never_done(name: str) -> None:
    events = rebuilt(without(name))
    assert events[-1]["response"]["output"] == OUTPUT
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    # A hosted call whose end only the final response tells is backfilled, as OpenAI does with MCP servers.
    assert done == (OUTPUT if name.endswith("added") else [OUTPUT[0], OUTPUT[2], OUTPUT[3]])


def test_a_message_that_only_the_final_response_ends() -> None:
    last = ("output_item.done", "content_part.done", "output_text.done")
    events = [event for event in events_of([*HELLO, Text(0, "lo"), Close(0), DONE]) if not event["type"].endswith(last)]
    del events[5]
    final = {**text_item("Hello"), "phase": "final_answer"}
    events[-1]["response"]["output"] = [final]
    again = rebuilt(events)
    assert [event["delta"] for event in again if "delta" in event] == ["Hel", "lo"]
    assert again[-2]["item"] == final


def test_a_part_that_is_over_is_not_said_again() -> None:
    first: list[Delta] = [Open(0, message()), Part(0, "output_text"), Text(0, "a")]
    events = events_of([*first, Part(0, "output_text"), Text(0, "ab"), Close(0), DONE])
    # The text of the second part is in the final item only.
    gone = ("content_part.done", "output_text.done")
    short = [event for event in events if not event["type"].endswith(gone) and event.get("delta") != "ab"]
    assert rebuilt(short) == events


def test_annotations_that_streamed_are_not_added_again() -> None:
    second = {"type": "url_citation", "url": "v"}
    events = events_of([*HELLO, Note(0, NOTE), Note(0, second), Close(0), DONE])
    short = [event for event in events if event.get("annotation") != second]
    again = rebuilt(short)
    assert [event["annotation"] for event in again if "annotation" in event] == [NOTE, second]
    assert again[-1]["response"] == events[-1]["response"]


def test_text_without_any_announcement() -> None:
    events = without("content_part.added", without("output_item.added"))
    assert rebuilt(events)[-1]["response"]["output"] == OUTPUT
    kinds = [delta.item["type"] for delta in read(events) if isinstance(delta, Open)]
    assert kinds == ["reasoning", "web_search_call", "message", "function_call"]


def test_only_a_final_response() -> None:
    events = rebuilt([EVENTS[0], EVENTS[-1]])
    assert events[-1]["response"]["output"] == OUTPUT
    assert [event["delta"] for event in events if event["type"].endswith("delta")] == ["think", "Hello", '{"a":1}']


@pytest.mark.parametrize("output", [[], None])
def test_a_final_response_without_output_keeps_what_streamed(output: Any) -> None:
    final = {**EVENTS[-1], "response": {**EVENTS[-1]["response"], "output": output}}
    assert rebuilt([*EVENTS[:-1], final])[-1]["response"]["output"] == OUTPUT
    assert rebuilt([*without("output_item.done")[:-1], final])[-1]["response"]["output"][2:] == OUTPUT[2:]


def test_ids_that_change_under_way() -> None:
    def renamed(event: Json) -> Json:
        if event["type"] == "response.output_item.done":
            return {**event, "item": {**event["item"], "id": event["item"]["id"] + "_x"}}
        if event["type"] == "response.completed":
            output = [{**item, "id": item["id"] + "_y"} for item in event["response"]["output"]]
            return {**event, "response": {**event["response"], "output": output}}
        return event

    assert rebuilt([renamed(event) for event in EVENTS]) == EVENTS


def test_one_id_for_all_items() -> None:
    events = [{**event, "item_id": "x"} if "item_id" in event else event for event in deepcopy(EVENTS)]
    for item in [*(event["item"] for event in events if "item" in event), *events[-1]["response"]["output"]]:
        item["id"] = "x"
    output = rebuilt(events)[-1]["response"]["output"]
    assert [{**item, "id": before["id"]} for item, before in zip(output, OUTPUT, strict=True)] == OUTPUT


def test_no_ids() -> None:
    def nameless(event: Json) -> Json:
        event = {key: value for key, value in event.items() if key != "item_id"}
        if "item" in event:
            event["item"] = {**event["item"], "id": ""}
        if event["type"] == "response.completed":
            output = [{**item, "id": None} for item in event["response"]["output"]]
            return {**event, "response": {**event["response"], "output": output}}
        return event

    output = rebuilt([nameless(event) for event in EVENTS])[-1]["response"]["output"]
    assert [item["id"] for item in output] == ["rs_100", "ws_101", "msg_102", "fc_103"]
    assert [{**item, "id": before["id"]} for item, before in zip(output, OUTPUT, strict=True)] == OUTPUT


def test_every_index_is_0() -> None:
    events = [{**event, "output_index": 0} if "output_index" in event else event for event in EVENTS]
    assert rebuilt(events) == EVENTS


def test_items_side_by_side_that_only_their_ids_tell_apart() -> None:
    begun: list[Delta] = [Open(0, call("a")), Open(1, call("b")), Text(0, "1"), Text(1, "2"), Text(0, "3")]
    events = events_of([*begun, Close(0), Close(1), DONE])
    nameless = [{key: value for key, value in event.items() if key != "output_index"} for event in events]
    assert rebuilt(nameless) == events
    assert rebuilt([{**event, "output_index": 1} if "output_index" in event else event for event in events]) == events


def test_no_sequence_numbers() -> None:
    bare = [{key: value for key, value in event.items() if key != "sequence_number"} for event in EVENTS]
    assert rebuilt(bare) == EVENTS


def test_every_event_twice() -> None:
    twice = [
        copy for event in EVENTS for copy in (event, event) if not event["type"].endswith(("delta", "annotation.added"))
    ]
    assert rebuilt(twice)[-1]["response"]["output"] == OUTPUT


def test_content_that_is_null() -> None:
    events = events_of([Open(0, message()), Close(0), Open(1, reasoning()), Close(1), DONE])
    for event in events:
        for item in [event.get("item"), *event.get("response", {}).get("output", [])]:
            if item is not None:
                item.update({"content": None, "summary": None} if item["type"] == "reasoning" else {"content": None})
    output = rebuilt(events)[-1]["response"]["output"]
    assert output == [{**message(), "status": "completed"}, {**reasoning(), "content": None}]


def test_arguments_that_are_an_object() -> None:
    events = without(
        "arguments.delta", without("arguments.done", events_of([Open(0, call()), Text(0, '{"a":1}'), Close(0), DONE]))
    )
    for item in (events[3]["item"], events[4]["response"]["output"][0]):
        item["arguments"] = {"a": 1}
    assert rebuilt(events)[-1]["response"]["output"][0]["arguments"] == '{"a":1}'


def test_an_item_announced_with_its_text() -> None:
    events = events_of(
        [Open(0, call()), Text(0, "{}"), Close(0), Open(1, message()), Part(1, "output_text"), Close(1), DONE]
    )
    events[2]["item"]["arguments"] = "{}"
    part = next(event["part"] for event in events if event["type"].endswith("content_part.added"))
    part["text"] = "twice?"
    assert rebuilt(events)[2]["item"]["arguments"] == ""
    assert rebuilt(events)[-1]["response"]["output"] == events[-1]["response"]["output"]


@pytest.mark.parametrize(
    ("usual", "other"),
    [("response.reasoning_text", "response.reasoning"), ("response.reasoning_text", "reasoning")]
    + [("response.content_part", "response.reasoning_part")],
)
def test_reasoning_under_its_other_names(usual: str, other: str) -> None:
    events = events_of([Open(0, reasoning()), Part(0, "reasoning_text"), Text(0, "hm"), Close(0), DONE])
    named = [{**event, "type": event["type"].replace(usual, other)} for event in events]
    assert named != events
    assert rebuilt(named) == events


def test_items_side_by_side() -> None:
    begun: list[Delta] = [Open(0, reasoning()), Part(0, "summary_text"), Open(1, message()), Part(1, "output_text")]
    events = events_of([*begun, Text(1, "b"), Text(0, "a"), Close(1), Text(0, "a"), Close(0), DONE])
    assert rebuilt(events) == events


def test_a_part_that_does_not_stream() -> None:
    part = {"type": "output_smell", "x": 1}
    events = events_of([Open(0, message()), Close(0, {**text_item(""), "content": [part]}), DONE])
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "part": part}
    added = [{"type": "response.content_part.added", **where}, {"type": "response.content_part.done", **where}]
    assert rebuilt([*events[:3], *added, *events[3:]]) == events


def test_text_for_what_is_over_is_dropped() -> None:
    late = [event for event in EVENTS if event["type"].endswith(("delta", "annotation.added", "done"))]
    assert rebuilt([*EVENTS[:-1], *late, EVENTS[-1]]) == EVENTS


def test_text_for_a_part_that_is_behind_is_dropped() -> None:
    first: list[Delta] = [Open(0, reasoning()), Part(0, "summary_text"), Text(0, "a")]
    events = events_of([*first, Part(0, "summary_text"), Text(0, "b"), Close(0), DONE])
    at = next(number for number, event in enumerate(events) if event.get("delta") == "b")
    assert rebuilt([*events[:at], events[4], *events[at:]]) == events


def test_text_that_a_phase_has_ended_is_not_said_again() -> None:
    events = events_of(
        [Open(0, message()), Part(0, "output_text"), Text(0, "a"), Mark(0, "response.message.over"), Close(0), DONE]
    )
    assert rebuilt(events) == events
    assert rebuilt([*events[:-2], events[4], *events[-2:]]) == events


def test_code_after_its_phase_is_dropped() -> None:
    final = {**code_call(), "code": "1", "status": "completed"}
    phase = Mark(0, "response.code_interpreter_call.interpreting")
    events = events_of([Open(0, code_call()), Text(0, "1"), phase, Close(0, final), DONE])
    late = {**events[3], "delta": "late"}
    assert rebuilt([*events[:6], late, *events[6:]]) == events


def test_a_new_item_under_an_index_that_is_over() -> None:
    first, second = events_of([Open(0, custom_call("a")), Text(0, "x"), Close(0), DONE]), search_call("b")
    added = {"type": "response.output_item.added", "output_index": 0, "item": second}
    done = {"type": "response.output_item.done", "output_index": 0, "item": {**second, "status": "completed"}}
    deltas = read([*first[:-1], added, done, first[-1]])
    assert deltas[-3:-1] == [Open(1, second), Close(1, {**second, "status": "completed"})]
