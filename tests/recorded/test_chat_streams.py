"""Recorded chat answers of 14 vendors: whatever they look like, what comes out is one legal response that
says what was sent. What was sent is worked out here, from the raw chunks, without the reader.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import pytest

from responses_ingress.core.deltas import Delta, Finish
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.sse import Parser
from responses_ingress.dialects.tools import ToolMap
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated
from tests.dialects.play import events_of
from tests.recordings import recordings

Json = dict[str, Any]

RECORDINGS = recordings("chat")
STREAMS = [name for name, recording in RECORDINGS.items() if "stream" in recording]
ERRORS = [name for name, recording in RECORDINGS.items() if recording["status"] >= 400]
WHOLE = [name for name in RECORDINGS if name not in STREAMS and name not in ERRORS]
FOREIGN = [name for name in WHOLE if name.startswith("echo-endpoint")]

ENDINGS = {"stop": "completed", "tool_calls": "completed", "length": "incomplete", "": "completed"}


# What was sent


def chunks_of(stream: str) -> list[Json]:
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    return [orjson.loads(line) for line in lines if line != "[DONE]"]


def said(delta: Json) -> tuple[str, str]:
    """Reasoning and text of a delta or a message."""
    content = delta.get("content") or ""
    parts: list[Json] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    thoughts = [inner["text"] for part in parts if part["type"] == "thinking" for inner in part["thinking"]]
    details = "".join(d.get("text") or d.get("summary") or "" for d in delta.get("reasoning_details") or ())
    return delta.get("reasoning_content") or delta.get("reasoning") or details or "".join(thoughts), text


def expected_of(deltas: Sequence[Json]) -> Json:
    calls: dict[int, list[str]] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls") or ()):
        call = calls.setdefault(piece["index"], ["", "", ""])
        function = piece["function"]
        for place, text in enumerate((piece.get("id"), function.get("name"), function.get("arguments"))):
            call[place] += text or ""
    reasoning, texts = zip(*(said(delta) for delta in deltas), strict=True)
    # A call without arguments (one recording) gets an empty object, so that clients can parse it.
    made = [(id, name, arguments or "{}") for id, name, arguments in calls.values()]
    return {"reasoning": "".join(reasoning), "text": "".join(texts), "calls": made}


def told(output: Iterable[Json]) -> Json:
    """The same of a response's output."""
    items = list(output)
    texts = {
        kind: "".join(part["text"] for item in items if item["type"] == kind for part in item["content"])
        for kind in ("reasoning", "message")
    }
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in items if item["type"] == "function_call"]
    return {"reasoning": texts["reasoning"], "text": texts["message"], "calls": calls}


def usage_of(bodies: Iterable[Json]) -> Json | None:
    found = [body.get("usage") or (body.get("x_groq") or {}).get("usage") for body in bodies]
    return next((usage for usage in reversed(found) if usage), None)


# What came out


def read(chunks: Iterable[bytes]) -> list[Delta]:
    """As a backend and a run would, together."""
    parser, reader = Parser(), ChatReader(ToolMap())
    deltas: list[Delta] = []
    try:
        for name, data in (event for chunk in chunks for event in parser.feed(chunk)):
            if name == "error":
                deltas += reader.fail(orjson.loads(data))
            elif data != b"[DONE]":
                deltas += reader.feed(orjson.loads(data))
        deltas += reader.end()
    except UpstreamTruncated as error:
        deltas.append(Finish("failed", error=error.detail()))
    return deltas


def cut(stream: bytes, seed: int) -> list[bytes]:
    choose = random.Random(seed)
    borders = sorted(choose.sample(range(len(stream)), min(len(stream), 2 + 40 * seed)))
    return [stream[a:b] for a, b in zip([0, *borders], [*borders, len(stream)], strict=True)]


def check_usage(response: Json, sent: Json | None) -> None:
    if sent is None:
        return
    assert response["usage"]["input_tokens"] == sent["prompt_tokens"]
    assert response["usage"]["output_tokens"] == sent["completion_tokens"]
    assert response["usage"]["total_tokens"] == sent["total_tokens"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_says_what_was_sent(name: str) -> None:
    stream = RECORDINGS[name]["stream"]
    deltas = read([stream.encode()])
    for seed in range(3):
        assert read(cut(stream.encode(), seed)) == deltas

    response = events_of(deltas)[-1]["response"]
    chunks = chunks_of(stream)
    choices = [choice for chunk in chunks for choice in chunk.get("choices") or ()]
    assert told(response["output"]) == expected_of([choice["delta"] for choice in choices])

    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if name.startswith("snowflake"):
        assert response["error"]["code"] == "upstream_truncated"
    elif any("error" in chunk for chunk in chunks):
        assert response["error"]["code"] == "server_error"
    else:
        assert response["status"] == ENDINGS[reasons[0]]
        check_usage(response, usage_of(chunks))
        assert response["usage"]["input_tokens"] > 0


@pytest.mark.parametrize("name", sorted(set(WHOLE) - set(FOREIGN)))
def test_a_whole_completion_says_what_was_sent(name: str) -> None:
    body = RECORDINGS[name]["body"]
    response = events_of(ChatReader(ToolMap()).read_json(body))[-1]["response"]
    [choice] = body["choices"]
    calls = choice["message"].get("tool_calls") or []
    numbered = [{**call, "index": number} for number, call in enumerate(calls)]
    assert told(response["output"]) == expected_of([choice["message"] | {"tool_calls": numbered}])
    assert response["status"] == ENDINGS[choice["finish_reason"]]
    check_usage(response, body["usage"])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_body_is_refused(name: str) -> None:
    with pytest.raises(UpstreamInvalid):
        ChatReader(ToolMap()).read_json(RECORDINGS[name]["body"])


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_keeps_its_status_and_words(name: str) -> None:
    recording = RECORDINGS[name]
    sent = recording["body"]["error"]
    error = read_error(recording["status"], orjson.dumps(recording["body"]))
    assert error.status == recording["status"]
    assert sent["message"].rstrip(".") in error.message
    assert error.code == ("rate_limit_exceeded" if recording["status"] == 429 else sent["code"])


def test_there_are_recordings_of_each_kind() -> None:
    assert len(STREAMS) >= 26 and len(WHOLE) >= 80 and len(ERRORS) >= 5 and len(FOREIGN) == 2
