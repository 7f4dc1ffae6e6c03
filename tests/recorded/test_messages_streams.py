"""Recorded answers of the Anthropic Messages API: what comes out is one legal response that says what was
sent, and what a client sends back of it becomes the request that was recorded next. What was sent is worked
out here, from the raw blocks, without the reader.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import orjson
import pytest

from responses_ingress.core.deltas import Delta, Finish, Item
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.messages import MessagesOptions, encode
from responses_ingress.dialects.messages_reader import MessagesReader
from responses_ingress.dialects.sse import Parser
from responses_ingress.dialects.tools import ToolMap
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated
from tests.dialects.play import events_of
from tests.recordings import recordings

Json = dict[str, Any]

RECORDINGS = recordings("messages")
STREAMS = [name for name, recording in RECORDINGS.items() if "stream" in recording]
ERRORS = [name for name, recording in RECORDINGS.items() if recording["status"] >= 400]
COUNTS = [name for name, recording in RECORDINGS.items() if "input_tokens" in (recording.get("body") or ())]
WHOLE = [name for name in RECORDINGS if name not in STREAMS + ERRORS + COUNTS]

NEXT = [
    "anthropic.anthropic.memory_tool.01",
    "anthropic.anthropic.mixed_strict_tool_run.02",
    "anthropic.anthropic.model_thinking_part.01",
    "anthropic.anthropic.model_thinking_part_redacted.01",
    "anthropic.anthropic.multiple_parallel_tool_calls.01",
    "anthropic.anthropic.tool_with_thinking.01",
]
"""Second and third requests of a conversation without server tools."""


# What was sent


def sent(name: str) -> list[Json]:
    lines = RECORDINGS[name]["stream"].split("\n")
    return [orjson.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def blocks_of(events: Iterable[Json]) -> list[Json]:
    """The blocks as they are in the end."""
    blocks: list[Json] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = dict(event["delta"]), blocks[event["index"]]
            kind = delta.pop("type")
            if kind == "citations_delta":
                block["citations"] = [*block["citations"], delta["citation"]]
            elif kind == "signature_delta":
                block["signature"] = delta["signature"]
            elif kind in ("text_delta", "thinking_delta"):
                block[block["type"]] += delta[block["type"]]
            elif kind == "input_json_delta":
                block["json"] += delta["partial_json"]
    return blocks


def expected_of(blocks: Sequence[Json]) -> list[tuple[Any, ...]]:
    """Each item: its type and what must be in it. Texts side by side are one."""
    made: list[tuple[Any, ...]] = []
    for kind, group in groupby(blocks, lambda block: str(block["type"])):
        same = list(group)
        if kind == "text":
            text = "".join(block["text"] for block in same)
            cited = [(c["url"], block["text"]) for block in same for c in block.get("citations") or ()]
            made += [("message", text, cited)] if text else []
        elif kind == "thinking":
            made += [("reasoning", block["thinking"], block.get("signature")) for block in same]
        elif kind == "redacted_thinking":
            made += [("reasoning", "", block["data"]) for block in same]
        elif kind == "tool_use":
            made += [
                ("call", block["id"], block["name"], block["input"] or orjson.loads(block["json"])) for block in same
            ]
    return made


def told(output: Iterable[Json]) -> list[tuple[Any, ...]]:
    """The same of a response's output."""
    return [_told(item) for item in output]


def _told(item: Json) -> tuple[Any, ...]:
    if item["type"] == "function_call":
        return "call", item["call_id"], item["name"], orjson.loads(item["arguments"])
    text = "".join(part["text"] for part in item["content"])
    if item["type"] == "message":
        notes = [note for part in item["content"] for note in part["annotations"]]
        return "message", text, [(note["url"], text[note["start_index"] : note["end_index"]]) for note in notes]
    tag, _, content = item["encrypted_content"].partition(":")
    block = orjson.loads(content)
    assert tag == "claude" and block.get("thinking", "") == text
    return "reasoning", text, block.get("signature") or block["data"]


# What came out


def read(chunks: Iterable[bytes]) -> list[Delta]:
    """As a backend and a run would, together."""
    parser, reader = Parser(), MessagesReader(ToolMap(), "claude")
    deltas: list[Delta] = []
    try:
        for _, data in (event for chunk in chunks for event in parser.feed(chunk)):
            deltas += reader.feed(orjson.loads(data))
        deltas += reader.end()
    except UpstreamTruncated as error:
        deltas.append(Finish("failed", error=error.detail()))
    return deltas


def cut(stream: bytes, seed: int) -> list[bytes]:
    choose = random.Random(seed)
    borders = sorted(choose.sample(range(len(stream)), min(len(stream), 2 + 40 * seed)))
    return [stream[a:b] for a, b in zip([0, *borders], [*borders, len(stream)], strict=True)]


def check_usage(response: Json, sent: Json) -> None:
    usage = response["usage"]
    read, wrote = sent["cache_read_input_tokens"], sent["cache_creation_input_tokens"]
    assert usage["input_tokens"] == sent["input_tokens"] + read + wrote > 0
    assert usage["input_tokens_details"] == {"cached_tokens": read, "cache_write_tokens": wrote}
    assert usage["output_tokens"] == sent["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_says_what_was_sent(name: str) -> None:
    stream = RECORDINGS[name]["stream"].encode()
    deltas = read([stream])
    for seed in range(3):
        assert read(cut(stream, seed)) == deltas
    response = events_of(deltas)[-1]["response"]
    events = sent(name)
    assert told(response["output"]) == expected_of(blocks_of(events))
    assert response["status"] == "completed"
    [last] = [event for event in events if event["type"] == "message_delta"]
    check_usage(response, last["usage"])


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_breaks_off_is_never_completed(name: str) -> None:
    blocks = RECORDINGS[name]["stream"].split("\n\n")
    whole = next(at for at, block in enumerate(blocks) if block.startswith("event: message_delta"))
    for length in range(0, whole, 1 + whole // 50):
        stream = "".join(f"{block}\n\n" for block in blocks[:length]).encode()
        response = events_of(read([stream]))[-1]["response"]
        assert response["status"] == "failed"
        assert response["error"]["code"] == "upstream_truncated"


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_message_says_what_was_sent(name: str) -> None:
    body = RECORDINGS[name]["body"]
    response = events_of(MessagesReader(ToolMap(), "claude").read_json(body))[-1]["response"]
    assert told(response["output"]) == expected_of([{"json": "{}", **block} for block in body["content"]])
    assert response["status"] == "completed"
    check_usage(response, body["usage"])


@pytest.mark.parametrize("name", COUNTS)
def test_an_answer_that_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(UpstreamInvalid):
        MessagesReader(ToolMap(), "claude").read_json(RECORDINGS[name]["body"])


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_keeps_its_status_and_words(name: str) -> None:
    recording = RECORDINGS[name]
    error = read_error(recording["status"], orjson.dumps(recording["body"]))
    assert (error.status, error.code) == (recording["status"], "upstream_refused")
    assert recording["body"]["error"]["message"].rstrip(".") in error.message


# What is sent back


def answered(name: str) -> list[Item]:
    deltas = MessagesReader(ToolMap(), "claude").read_json(RECORDINGS[name]["body"])
    output: list[Item] = events_of(deltas)[-1]["response"]["output"]
    return output


def said(block: Json) -> Item:
    if block["type"] == "tool_result":
        return {"type": "function_call_output", "call_id": block["tool_use_id"], "output": block["content"]}
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": block["text"]}]}


def plain(messages: Sequence[Json]) -> list[Json]:
    """Without what may be said in two ways: a string for its text block, `is_error: false`."""
    made: list[Json] = []
    for message in messages:
        content = []
        for block in message["content"]:
            block = {key: value for key, value in block.items() if key != "is_error"}
            if isinstance(block.get("content"), str):
                block["content"] = [{"type": "text", "text": block["content"]}]
            content.append(block)
        made.append({**message, "content": content})
    return made


@pytest.mark.parametrize("name", NEXT)
def test_a_conversation_goes_on_with_the_request_that_was_recorded(name: str) -> None:
    body = RECORDINGS[name]["request"]["body"]
    cassette, _, _ = name.rpartition(".")
    answers = iter(range(len(body["messages"])))
    items: list[Item] = []
    for message in body["messages"]:
        if message["role"] == "assistant":
            items += answered(f"{cassette}.{next(answers):02}")
        else:
            items += [said(block) for block in message["content"]]
    turn = Turn("resp_1", "thread_1", body["model"], new=items, parameters={"max_output_tokens": body["max_tokens"]})
    made = encode(turn, MessagesOptions(cache=False), "claude").body
    assert plain(made["messages"]) == plain(body["messages"])
    assert (made["model"], made["max_tokens"]) == (body["model"], body["max_tokens"])


def test_there_are_recordings_of_each_kind() -> None:
    assert len(STREAMS) >= 14 and len(WHOLE) >= 20 and len(ERRORS) == 3 and len(COUNTS) >= 1
    assert set(NEXT) <= set(WHOLE)
