"""Recorded answers behind the reader of calls in text: one without such calls passes as it is, and the calls
that real models made natively come back when the same is said in text.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import pytest

from responses_ingress.core.deltas import Close, Delta, Finish, Open, Part, Text
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.emulation import emulate, refuses_tools
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.responses import ResponsesReader
from responses_ingress.dialects.sse import Parser
from responses_ingress.dialects.text_calls import TextCalls
from responses_ingress.dialects.tools import Tool, ToolMap
from tests.core.shapes import ENVELOPE, build
from tests.dialects.play import events_of, response_of
from tests.recordings import recordings

Json = dict[str, Any]

RESPONSES, CHAT = recordings("responses"), recordings("chat")
STREAMS = [name for name, recording in RESPONSES.items() if "stream" in recording]
CHAT_STREAMS = [name for name, recording in CHAT.items() if "stream" in recording and "snowflake" not in name]
ERRORS = [name for name, recording in (RESPONSES | CHAT).items() if recording["status"] >= 400]


def outputs() -> Iterator[tuple[str, list[Json]]]:
    for name, recording in RESPONSES.items():
        body = recording.get("body") or {}
        if body.get("object") == "response" and any(item["type"] == "function_call" for item in body["output"]):
            yield name, body["output"]


CALLING = dict(outputs())


def parsed(stream: str) -> list[Any]:
    return [orjson.loads(data) for _, data in Parser().feed(stream.encode()) if data != b"[DONE]"]


def filtered(deltas: Iterable[Delta], tools: dict[str, Tool]) -> list[Delta]:
    calls = TextCalls(tools)
    return [made for delta in deltas for made in calls.feed(delta)]


def unscored(value: Any) -> Any:
    """Without logprobs, which the reader leaves out."""
    if isinstance(value, dict):
        return {key: unscored(inner) for key, inner in value.items() if key != "logprobs"}
    return [unscored(inner) for inner in value] if isinstance(value, list) else value


def output_of(deltas: Iterable[Delta]) -> Any:
    """Numbers and ids set aside: a message is opened with its first text."""
    made = unscored(build(deltas, ENVELOPE).response())
    return sorted(orjson.dumps({**item, "id": ""}) for item in made["output"]), made["status"], made["usage"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_responses_answer_passes_as_it_is(name: str) -> None:
    reader = ResponsesReader()
    deltas = [delta for event in parsed(RESPONSES[name]["stream"]) for delta in reader.feed(event)]
    assert output_of(filtered(deltas, {"f": Tool("function", "f")})) == output_of(deltas)


@pytest.mark.parametrize("name", CHAT_STREAMS)
def test_a_chat_answer_passes_as_it_is(name: str) -> None:
    reader = ChatReader(ToolMap())
    deltas = [delta for chunk in parsed(CHAT[name]["stream"]) for delta in reader.feed(chunk)]
    deltas += reader.end()
    assert unscored(response_of(filtered(deltas, {"f": Tool("function", "f")}))) == unscored(response_of(deltas))


def declared(call: Json) -> Json:
    tool = {"type": "function", "name": call["name"]}
    return {"type": "namespace", "name": call["namespace"], "tools": [tool]} if call.get("namespace") else tool


def called(call: Json) -> tuple[Any, ...]:
    return call["name"], call.get("namespace"), orjson.loads(call["arguments"])


@pytest.mark.parametrize("name", CALLING)
def test_the_calls_that_models_make_come_back_out_of_text(name: str) -> None:
    calls = [item for item in CALLING[name] if item["type"] == "function_call"]
    emulated = emulate(Turn("resp_1", "thread_1", "m", new=calls, tools=[declared(call) for call in calls]))
    assert emulated is not None
    text = "\n".join(part["text"] for part in emulated.turn.new[0]["content"])
    message = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
    pieces = [Text(0, text[at : at + 5]) for at in range(0, len(text), 5)]
    deltas: list[Delta] = [Open(0, message), Part(0, "output_text"), *pieces, Close(0), Finish("completed")]
    output = events_of(filtered(deltas, dict(emulated.tools)))[-1]["response"]["output"]
    assert [called(item) for item in output] == [called(call) for call in calls]


@pytest.mark.parametrize("name", ERRORS)
def test_no_recorded_error_is_a_refusal_of_tools(name: str) -> None:
    recording = (RESPONSES | CHAT)[name]
    assert not refuses_tools(read_error(recording["status"], orjson.dumps(recording["body"])))


def test_there_are_recordings_of_each_kind() -> None:
    assert len(STREAMS) >= 39 and len(CHAT_STREAMS) >= 24 and len(CALLING) >= 50 and len(ERRORS) >= 14
