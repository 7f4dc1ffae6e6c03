"""The same turns through every kind of upstream: whatever it is, clients see Responses streams that keep every
invariant and say what the model said. On real sockets, through the whole application.
"""

import asyncio
import base64
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from tests.conformance.casts import Background, Cast, Fault, Piece, Saying
from tests.conformance.conftest import Serve
from tests.dialects import play
from tests.invariants import check_stream
from tests.wire import Answer, Wire

Json = dict[str, Any]

HELLO = Saying([Piece("text", "Hello there, how are you?")])
LOOK: Json = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
NOTE: Json = {"type": "custom", "name": "note", "description": "Take a note."}
SKY, SEA = Piece("function", '{"at":"sky"}', "look"), Piece("function", '{"at":"sea"}', "look")
SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
PICTURE = base64.b64encode(b"a picture of a cat").decode()


def brief(output: list[Json]) -> list[tuple[str, str]]:
    """Each item's type and text, however it spaces the JSON in it."""
    return [(kind, text.replace(": ", ":") if kind == "call" else text) for kind, text in play.brief(output)]


async def stream(url: str, **fields: Any) -> list[Json]:
    """The events of a streamed response, checked, also against what a GET shows."""
    async with Wire(url) as wire:
        answer = await wire.post({"model": "m", "input": "hi", "stream": True, **fields})
        assert answer.status == 200, answer
        check_stream(answer.events)
        response = answer.events[-1]["response"]
        stored = await wire.request("GET", f"/v1/responses/{response['id']}")
    assert stored.json == response
    return answer.events


async def ask(url: str, **fields: Any) -> Json:
    """A streamed response."""
    response: Json = (await stream(url, **fields))[-1]["response"]
    return response


async def said(url: str, **fields: Any) -> list[tuple[str, str]]:
    response = await ask(url, **fields)
    assert (response["status"], response["error"], response["incomplete_details"]) == ("completed", None, None)
    assert response["usage"]["total_tokens"] > 0
    return brief(response["output"])


def text_of(events: list[Json]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


# What a model says.


async def test_text(cast: Cast, url: str) -> None:
    cast.says(HELLO)
    events = await stream(url)
    assert text_of(events) == "Hello there, how are you?"
    assert brief(events[-1]["response"]["output"]) == [("message", "Hello there, how are you?")]
    assert cast.heard["model"] == "m"


async def test_a_call_and_its_output(cast: Cast, url: str) -> None:
    cast.says(Saying([Piece("text", "Let me look."), SKY]))
    first = await ask(url, tools=[LOOK])
    assert [text.strip() for _, text in brief(first["output"])] == ["Let me look.", 'look {"at":"sky"}']
    called = first["output"][1]
    cast.says(HELLO)
    output = {"type": "function_call_output", "call_id": called["call_id"], "output": "All is blue."}
    assert await said(url, tools=[LOOK], previous_response_id=first["id"], input=[output]) == [
        ("message", "Hello there, how are you?")
    ]
    heard = orjson.dumps(cast.heard).decode()
    assert heard.index("Let me look.") < heard.index("sky") < heard.index("All is blue.")
    assert len(cast.server.calls) == 1 + cast.asks


async def test_calls_side_by_side(cast: Cast, url: str) -> None:
    cast.says(Saying([SKY, SEA]))
    first = await ask(url, tools=[LOOK])
    assert brief(first["output"]) == [("call", 'look {"at":"sky"}'), ("call", 'look {"at":"sea"}')]
    ids = [item["call_id"] for item in first["output"]]
    assert len(set(ids)) == 2
    cast.says(HELLO)
    outputs = [
        {"type": "function_call_output", "call_id": id, "output": text} for id, text in zip(ids, "ab", strict=True)
    ]
    assert await said(url, tools=[LOOK], previous_response_id=first["id"], input=outputs)


async def test_a_custom_tool(cast: Cast, url: str) -> None:
    cast.says(Saying([Piece("custom", 'two "lines"\nof text', "note")]))
    first = await ask(url, tools=[NOTE, LOOK])
    assert brief(first["output"]) == [("custom", 'note two "lines"\nof text')]
    cast.says(HELLO)
    output = {"type": "custom_tool_call_output", "call_id": first["output"][0]["call_id"], "output": "Noted."}
    assert await said(url, tools=[NOTE, LOOK], previous_response_id=first["id"], input=[output])
    assert "Noted." in orjson.dumps(cast.heard).decode()


async def test_reasoning_and_what_becomes_of_it(cast: Cast, url: str) -> None:
    cast.says(Saying([Piece("reasoning", "Let me think of it."), *HELLO.pieces]))
    first = await ask(url, reasoning={"effort": "low"})
    assert brief(first["output"]) == [("reasoning", "Let me think of it."), ("message", "Hello there, how are you?")]
    cast.says(HELLO)
    assert await said(url, previous_response_id=first["id"], input="And?", reasoning={"effort": "low"})
    assert "Let me think of it." in orjson.dumps(cast.heard).decode()  # a backend gets its own reasoning back


async def test_structured_output(cast: Cast, url: str) -> None:
    cast.says(Saying([Piece("text", '{"answer": 42}')]))
    format = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
    assert await said(url, text={"format": format}) == [("message", '{"answer": 42}')]
    assert holds(cast.heard, SCHEMA)


def holds(value: Any, wanted: Json) -> bool:
    """Whether `wanted` stands somewhere in `value`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value == wanted or any(holds(one, wanted) for one in inner)


async def test_an_image(cast: Cast, url: str) -> None:
    cast.says(HELLO)
    image = {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}", "detail": "auto"}
    content = [{"type": "input_text", "text": "What is this?"}, image]
    assert await said(url, input=[{"role": "user", "content": content}])
    heard = orjson.dumps(cast.heard).decode()
    assert heard.index("What is this?") < heard.index(PICTURE)


async def test_an_answer_cut_by_its_length(cast: Cast, url: str) -> None:
    cast.says(Saying(HELLO.pieces, cut=True))
    response = await ask(url, max_output_tokens=16)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert brief(response["output"]) == [("message", "Hello there, how are you?")]
    cast.says(HELLO)
    assert await said(url, previous_response_id=response["id"], input="Go on.")


async def test_a_refusal(cast: Cast, url: str) -> None:
    cast.says(Saying([Piece("refusal", "I will not.")]))
    response = await ask(url)
    reason = (response["incomplete_details"] or {}).get("reason")
    assert (response["status"], reason) == cast.refused
    assert [text.removeprefix("!") for _, text in brief(response["output"])] == ["I will not."]


@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_stream_the_answer_is_the_same(cast: Cast, url: str, stream: bool) -> None:
    """Also where the upstream answers with the other form than it was asked for."""
    saying = Saying([Piece("reasoning", "Let me think of it."), Piece("text", "Let me look."), SKY, SEA])
    cast.says(saying)
    expected = await ask(url, tools=[LOOK])
    cast.says(saying, stream)
    async with Wire(url) as wire:
        answer = await wire.post({"model": "m", "input": "hi", "tools": [LOOK]})
    assert answer.status == 200
    assert brief(answer.json["output"]) == brief(expected["output"])
    assert answer.json["usage"]["total_tokens"] == expected["usage"]["total_tokens"]


# What goes wrong.


async def refusal(url: str, **fields: Any) -> Answer:
    async with Wire(url) as wire:
        return await wire.post({"model": "m", "input": "hi", **fields})


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_event_is_a_status(cast: Cast, serve: Serve, stream: bool) -> None:
    async with serve(cast) as url:
        cast.refuses(429, retry_after=7)
        refused = await refusal(url, stream=stream)
        assert (refused.status, refused.headers["retry-after"]) == (429, "7")
        assert refused.error["code"] == "rate_limit_exceeded"
        cast.says(HELLO)
        assert await said(url)


def impatient(fault: Fault) -> dict[str, float]:
    """Limits of an upstream's silence, short only where it is the fault."""
    seconds = 0.5 if fault == "silent" else 30
    return {"read_timeout": seconds, "first_byte_timeout": seconds}


@pytest.mark.parametrize("fault", ["error", "truncated", "silent"])
async def test_what_breaks_off_is_a_failed_response(cast: Cast, serve: Serve, fault: Fault) -> None:
    async with serve(cast, **impatient(fault)) as url:
        cast.fails(Saying([Piece("text", "Let me look at it."), SKY]), fault)
        async with Wire(url) as wire:
            answer = await wire.post({"model": "m", "input": "hi", "stream": True, "tools": [LOOK]})
        if answer.status != 200:  # the upstream had not accepted it yet
            assert answer.error["code"] == cast.codes[fault]
        else:
            check_stream(answer.events)
            response = answer.events[-1]["response"]
            assert (response["status"], response["error"]["code"]) == ("failed", cast.codes[fault])
            assert all(item["status"] != "completed" for item in response["output"])
            assert text_of(answer.events) in ("", "Let ", "Let", "Let me look at it.")
        assert len(cast.server.calls) == cast.asks  # nothing was asked for again
        cast.says(HELLO)
        assert await said(url)


@pytest.mark.parametrize("fault", ["error", "truncated", "silent"])
async def test_what_breaks_off_without_a_stream_is_a_status(cast: Cast, serve: Serve, fault: Fault) -> None:
    async with serve(cast, **impatient(fault)) as url:
        cast.fails(HELLO, fault)
        refused = await refusal(url)
        assert (refused.status // 100, refused.error["code"]) == (5, cast.codes[fault])


# Time.


async def test_a_slow_stream_is_kept_alive_and_told_of_as_it_comes(cast: Cast, url: str) -> None:
    hold = asyncio.Event()
    cast.pauses(HELLO, hold)
    async with Wire(url) as wire:
        await wire.start("POST", "/v1/responses", orjson.dumps({"model": "m", "input": "hi", "stream": True}))
        if not isinstance(cast, Background):
            await wire.read_until(b"Hello")
        seen = await wire.read_until(b": keep-alive")
        assert b"response.completed" not in seen
        hold.set()
        events = (await wire.answer()).events
    check_stream(events)
    assert text_of(events) == "Hello there, how are you?"


async def test_a_client_that_leaves_takes_the_turn_with_it(cast: Cast, url: str) -> None:
    hold = asyncio.Event()
    cast.pauses(HELLO, hold)
    async with Wire(url) as wire:
        await wire.start("POST", "/v1/responses", orjson.dumps({"model": "m", "input": "hi", "stream": True}))
        begun = await wire.read_until(b"response.in_progress")
    id = orjson.loads(begun.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
    if isinstance(cast, Background):  # what the provider has begun is paid for
        hold.set()
    else:
        await cast.left()
    ended = await ending(url, id)
    assert ended["status"] == ("completed" if isinstance(cast, Background) else "cancelled")


async def test_a_cancel_reaches_the_upstream(cast: Cast, url: str) -> None:
    cast.pauses(HELLO, asyncio.Event())
    asked = {"model": "m", "input": "hi", "stream": True, "background": True}
    async with Wire(url) as wire, Wire(url) as other:
        await wire.start("POST", "/v1/responses", orjson.dumps(asked))
        await cast.server.called(1)
        begun = await wire.read_until(b"response.in_progress")
        id = orjson.loads(begun.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
        cancelled = await other.request("POST", f"/v1/responses/{id}/cancel")
        assert (cancelled.status, cancelled.json["status"], cancelled.json["output"]) == (200, "cancelled", [])
        events = (await wire.answer()).events
    check_stream(events)
    assert events[-1]["response"]["status"] == "cancelled"
    await cast.left()


async def ending(url: str, id: str) -> Mapping[str, Any]:
    """The response when it has ended."""
    async with Wire(url) as wire:
        while True:
            response: Json = (await wire.request("GET", f"/v1/responses/{id}")).json
            if response["status"] not in ("queued", "in_progress"):
                return response
            await asyncio.sleep(0.01)
