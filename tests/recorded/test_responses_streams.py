"""Recorded Responses traffic: read into deltas, journaled and built again, every stream comes out event for
event as it went in, and every JSON answer as the same response object.

What is set aside on both sides: `obfuscation`; usage is brought into its one shape; fields that are newer
than a recording (`completed_at`). Streams that differ in more are named below, each with its reason.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from responses_ingress.core.deltas import Delta, Finish, decode, encode
from responses_ingress.dialects.responses import ResponsesReader
from responses_ingress.dialects.sse import Parser
from responses_ingress.errors import UpstreamTruncated
from tests.core.shapes import build, parsed
from tests.invariants import check_stream
from tests.recordings import recordings

Json = dict[str, Any]

RECORDINGS = recordings("responses")
STREAMS = [name for name, recording in RECORDINGS.items() if "stream" in recording]
WHOLE = [name for name, recording in RECORDINGS.items() if (recording.get("body") or {}).get("object") == "response"]
RUNNING = [name for name in WHOLE if RECORDINGS[name]["body"]["status"] in ("queued", "in_progress")]

RESUMED = "openai.openai_responses.background_mode_streaming_starting_after_vcr.01"
"""Asked for from event 1 on, so `response.created` is not in it."""

EARLY = ("openai.openai_responses.stream.00", "openai.openai_responses.stream.01")
"""Early 2025: events had no sequence numbers, text events no logprobs."""

ROUTER = "openrouter.openai_responses.raw_cot_stream_openrouter.00"
"""A message inside of the open reasoning item, which has another temporary id in the final response; we
keep the id that was streamed."""

BACKFILLED = "openai.openai_responses.model_mcp_list_tools_stream_backfills_missing_results.00"
"""Three hosted tool lists open at once, two of them done in the final response only."""


def sent(name: str) -> list[Json]:
    parts = Parser().feed(RECORDINGS[name]["stream"].encode())
    return [orjson.loads(data) for _, data in parts if data != b"[DONE]"]


def usage_in_one_shape(usage: Json | None) -> Json | None:
    if usage is None:
        return None
    return {
        **{key: usage[key] for key in ("input_tokens", "output_tokens", "total_tokens", "output_tokens_details")},
        "input_tokens_details": {"cache_write_tokens": 0, **usage["input_tokens_details"]},
    }


def response_in_one_shape(response: Json) -> Json:
    return {**response, "usage": usage_in_one_shape(response.get("usage"))}


def in_one_shape(event: Json) -> Json:
    event = {key: value for key, value in event.items() if key != "obfuscation"}
    return {**event, "response": response_in_one_shape(event["response"])} if "response" in event else event


def came_out(deltas: Sequence[Delta], envelope: Json) -> list[Json]:
    """The events of our own; the time of the end is the run's to set where the provider told none."""
    journaled = [
        replace(delta, at=delta.at or 1) if isinstance(delta, Finish) else delta for delta in decode(encode(deltas))
    ]
    return parsed(build(journaled, envelope))


def without(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_comes_out_as_it_went_in(name: str) -> None:
    events = sent(name)
    reader = ResponsesReader()
    deltas = [delta for event in events for delta in reader.feed(event)]
    deltas += reader.end()
    assert reader.envelope is not None
    ours = came_out(deltas, dict(reader.envelope))
    check_stream(ours, interleaved=name in (ROUTER, BACKFILLED), backfilled=name == BACKFILLED)

    theirs = [in_one_shape(event) for event in events]
    if name == RESUMED:
        ours = ours[1:]
    if name == ROUTER:
        streamed, final = events[2]["item"]["id"], theirs[-1]["response"]["output"][0]
        assert final["id"] != streamed
        final["id"] = streamed
    newer = ["sequence_number", "logprobs"] if name in EARLY else []
    if "completed_at" not in events[-1]["response"]:
        newer.append("completed_at")
    assert without([in_one_shape(event) for event in ours], newer) == theirs


@pytest.mark.parametrize("name", sorted(set(WHOLE) - set(RUNNING)))
def test_a_json_answer_comes_out_as_it_went_in(name: str) -> None:
    body = RECORDINGS[name]["body"]
    reader = ResponsesReader()
    deltas = reader.read_json(body)
    assert reader.envelope is not None
    ours = came_out(deltas, dict(reader.envelope))
    check_stream(ours)
    final = ours[-1]["response"]
    if "completed_at" not in body:
        del final["completed_at"]
    assert final == response_in_one_shape(body)


@pytest.mark.parametrize("name", RUNNING)
def test_a_response_under_way_is_no_answer(name: str) -> None:
    with pytest.raises(UpstreamTruncated):
        ResponsesReader().read_json(RECORDINGS[name]["body"])


def test_there_are_recordings_of_each_kind() -> None:
    assert len(STREAMS) >= 39 and len(WHOLE) >= 280 and len(RUNNING) >= 8
    assert {RESUMED, ROUTER, BACKFILLED, *EARLY} <= set(STREAMS)
