"""Another of our servers as the upstream: the one kind of Responses server that is at hand in every detail."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from responses_ingress.settings import Settings
from responses_ingress.upstream_settings import Kind
from responses_ingress.upstream_settings import Upstream as UpstreamSettings
from tests.dialects.play import brief
from tests.invariants import check_stream
from tests.server import running
from tests.upstream import Say, Stream, Upstream, chunk
from tests.wire import Wire

ASK = {"model": "m", "input": "hi", "stream": True}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}}
NOTE = {"type": "custom", "name": "note"}

Serve = Callable[..., AbstractAsyncContextManager[Wire]]


@pytest.fixture
def serve(upstream: Upstream, database: Path, tmp_path: Path) -> Serve:
    """A server in front of a server in front of a scripted upstream."""

    @asynccontextmanager
    async def serving(kind: Kind, **fields: Any) -> AsyncIterator[Wire]:
        behind = Settings(
            backend="chat",
            upstream=upstream.url,
            database_url=f"sqlite:///{tmp_path / 'behind.db'}",
            disconnect_grace=0,
        )
        async with running(behind) as their_url:
            upstreams = {"theirs": UpstreamSettings(kind=kind, url=their_url, **fields)}
            before = Settings(upstreams=upstreams, database_url=f"sqlite:///{database}", disconnect_grace=0)
            async with running(before) as url, Wire(url) as wire:
                yield wire

    return serving


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("responses", {}), ("responses", {"chain": True}), ("background", {"first_poll": 0.01, "longest_poll": 0.01})],
)
async def test_turns_pass_through_both(serve: Serve, upstream: Upstream, kind: Kind, fields: dict[str, Any]) -> None:
    said = Say("Let me look.", [("look", {"at": "sky"}), ("note", {"input": "a note"})], reasoning="Hm.")
    upstream.script(said, Say("It is blue."))
    session = {"session-id": "s"}
    async with serve(kind, **fields) as wire:
        first = await wire.post({**ASK, "tools": [LOOK, NOTE]}, session)
        check_stream(first.events)
        output = first.events[-1]["response"]["output"]
        assert brief(output) == [
            ("reasoning", "Hm."),
            ("message", "Let me look."),
            ("call", 'look {"at":"sky"}'),
            ("custom", "note a note"),
        ]
        results = [
            {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "Done."} for item in output[2:]
        ]
        second = await wire.post({**ASK, "input": results, "tools": [LOOK, NOTE]}, session)
        check_stream(second.events)
        assert brief(second.events[-1]["response"]["output"]) == [("message", "It is blue.")]
    roles = [message["role"] for message in upstream.calls[1].json["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]


async def test_a_client_that_leaves_is_felt_at_the_far_end(serve: Serve, upstream: Upstream) -> None:
    upstream.script(Stream([chunk({"content": "so"}), asyncio.Event()]))
    async with serve("responses") as wire:
        await wire.start("POST", "/v1/responses", b'{"model":"m","input":"hi","stream":true}')
        await wire.read_until(b"so")
        wire.abort()
        await upstream.closed(0)


async def test_a_cancel_is_felt_at_the_far_end(serve: Serve, upstream: Upstream) -> None:
    upstream.script(Stream([chunk({"content": "so"}), asyncio.Event()]))
    async with serve("background", first_poll=0.01) as wire:
        created = await wire.post({"model": "m", "input": "hi", "background": True})
        await upstream.called(1)
        cancelled = await wire.request("POST", f"/v1/responses/{created.json['id']}/cancel")
        assert cancelled.json["status"] == "cancelled"
        await upstream.closed(0)
