"""One thread over several upstreams: what one has said, the next understands, and nobody gets what only another
can read. On real sockets, through the whole application.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from responses_ingress.settings import Route, Settings
from responses_ingress.upstream_settings import Upstream
from tests.conformance.casts import CASTS, Cast, Piece, Saying
from tests.dialects.play import brief
from tests.invariants import check_stream
from tests.server import running
from tests.wire import Wire

Json = dict[str, Any]

LOOK: Json = {"type": "function", "name": "look", "parameters": {"type": "object"}}
NOTE: Json = {"type": "custom", "name": "note"}
CALL = Piece("function", '{"at":"sky"}', "look")
BLUE = {"type": "function_call_output", "output": "All is blue."}
NOTED = {"type": "custom_tool_call_output", "output": "It is noted."}
KINDS = ("chat", "messages", "responses", "background", "emulated")


@dataclass
class Stage:
    """All kinds of upstream behind one server; a model's name is the name of its kind."""

    url: str
    casts: dict[str, Cast]
    last: str | None = None

    async def ask(self, kind: str, input: Any, *pieces: Piece, headers: dict[str, str] | None = None) -> Json:
        """The next turn of the thread, on this kind of upstream."""
        self.casts[kind].says(Saying(pieces))
        fields: Json = {"model": kind, "input": input, "tools": [LOOK, NOTE], "stream": True}
        fields["reasoning"] = {"effort": "low"}
        if headers is None and self.last:
            fields["previous_response_id"] = self.last
        async with Wire(self.url) as wire:
            answer = await wire.post(fields, headers)
        assert answer.status == 200, answer
        check_stream(answer.events)
        response: Json = answer.events[-1]["response"]
        assert response["status"] == "completed", response
        self.last = response["id"]
        return response

    def heard(self, kind: str) -> str:
        return orjson.dumps(self.casts[kind].heard).decode()


@pytest.fixture
async def stage(sqlite_database: str) -> AsyncIterator[Stage]:
    casts = {kind: CASTS[kind]() for kind in KINDS}
    async with AsyncExitStack() as stack:
        for cast in casts.values():
            await stack.enter_async_context(cast.server)
        upstreams = {kind: Upstream(url=cast.server.url, **cast.settings) for kind, cast in casts.items()}
        routes = tuple(Route(model=kind, upstream=kind) for kind in KINDS)
        settings = Settings(upstreams=upstreams, routes=routes, database_url=sqlite_database)
        yield Stage(await stack.enter_async_context(running(settings)), casts)


def calls(response: Json) -> list[str]:
    return [item["call_id"] for item in response["output"] if "call_id" in item]


async def test_chat_then_messages_then_responses_and_back(stage: Stage) -> None:
    first = await stage.ask("chat", "What is above?", Piece("reasoning", "Chat thinks."), CALL)

    (id,) = calls(first)
    second = await stage.ask(
        "messages", [{**BLUE, "call_id": id}], Piece("reasoning", "Claude thinks."), Piece("custom", "a sky", "note")
    )
    assert brief(second["output"]) == [("reasoning", "Claude thinks."), ("custom", "note a sky")]
    question, asked, answered = stage.casts["messages"].heard["messages"]
    assert [message["role"] for message in (question, asked, answered)] == ["user", "assistant", "user"]
    assert [block["type"] for block in asked["content"]] == ["tool_use"]  # Chat's thoughts bear no signature
    assert answered["content"][0]["content"][0]["text"] == "All is blue."

    (id,) = calls(second)
    third = await stage.ask(
        "responses", [{**NOTED, "call_id": id}], Piece("reasoning", "GPT thinks."), Piece("text", "It is blue.")
    )
    heard = stage.casts["responses"].heard["input"]
    assert [item["type"] for item in heard] == [
        "message",
        *("reasoning", "function_call", "function_call_output"),
        *("reasoning", "custom_tool_call", "custom_tool_call_output"),
    ]
    assert "encrypted_content" not in stage.heard("responses").replace("reasoning.encrypted_content", "")
    assert third["output"][0]["encrypted_content"] == "responses:gAAAA"

    await stage.ask("messages", "Sure?", Piece("text", "Sure."))
    heard = stage.casts["messages"].heard["messages"]
    blocks = [block for message in heard for block in message["content"]]
    thoughts = [block for block in blocks if block["type"] == "thinking"]
    assert thoughts == [{"type": "thinking", "thinking": "Claude thinks.", "signature": "signed"}]
    assert "It is blue." in stage.heard("messages") and "gAAAA" not in stage.heard("messages")

    await stage.ask("responses", "Really?", Piece("text", "Really."))
    heard = stage.casts["responses"].heard["input"]
    assert [item.get("encrypted_content") for item in heard if item["type"] == "reasoning"] == [None, None, "gAAAA"]
    assert [item["content"] for item in heard if item["type"] == "message" and item["role"] == "user"][-1] == [
        {"type": "input_text", "text": "Really?"}
    ]

    await stage.ask("chat", "And now?", Piece("text", "Now it is night."))
    assert "signed" not in stage.heard("chat") and "gAAAA" not in stage.heard("chat")
    roles = [message["role"] for message in stage.casts["chat"].heard["messages"]]
    assert roles[:5] == ["user", "assistant", "tool", "assistant", "tool"]


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
async def test_each_goes_on_with_a_call_of_each(stage: Stage, before: str, after: str) -> None:
    """In a thread that a header names, as in a chain."""
    session = {"session-id": "one"}
    first = await stage.ask(before, "What is above?", Piece("text", "Let me look."), CALL, headers=session)
    (id,) = calls(first)
    second = await stage.ask(after, [{**BLUE, "call_id": id}], Piece("text", "It is blue."), headers=session)
    assert brief(second["output"]) == [("message", "It is blue.")]
    heard = stage.heard(after)
    places = [heard.index(text) for text in ("What is above?", "Let me look.", "sky", "All is blue.")]
    assert places == sorted(places)
