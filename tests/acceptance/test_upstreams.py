"""Upstreams behind a real server: how many turns each gets, and what is told of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from responses_ingress.settings import Settings
from responses_ingress.upstream_settings import Upstream as UpstreamSettings
from tests.core.shapes import text_item
from tests.invariants import check_stream
from tests.responses_upstream import Provider, response, streamed
from tests.server import running
from tests.upstream import Reply, Say, Stream, Upstream, chunk
from tests.wire import Wire

ASK = {"model": "m", "input": "x"}
STREAM = {**ASK, "stream": True}
LOOK = {"type": "function", "name": "look"}
SECRET = "hunter2"

Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serve(upstream: Upstream, database: Path) -> Serve:
    @asynccontextmanager
    async def serving(fields: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[str]:
        given = {"it": UpstreamSettings(url=upstream.url, **(fields or {}))}
        async with running(Settings(upstreams=given, database_url=f"sqlite:///{database}", **settings)) as url:
            yield url

    return serving


async def status(wire: Wire, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = await wire.request("GET", "/v1/upstreams", b"", headers)
    assert answer.status == 200, answer
    assert SECRET.encode() not in answer.body
    (only,) = answer.json["data"]
    return dict(only)


async def until(wire: Wire, **wanted: Any) -> None:
    """Wait until the status is so."""
    while not wanted.items() <= (await status(wire)).items():  # noqa: ASYNC110 - it can only be asked
        await asyncio.sleep(0.01)


async def test_a_limit_lets_some_wait_and_refuses_the_rest(serve: Serve, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "one"}), hold, chunk(finish="stop")]), Say("two"))
    async with serve({"max_concurrent": 1, "max_waiting": 1}) as url, Wire(url) as wire:
        async with Wire(url) as first, Wire(url) as second:
            await first.start("POST", "/v1/responses", orjson.dumps(STREAM))
            await first.read_until(b"one")
            await second.start("POST", "/v1/responses", orjson.dumps(STREAM))
            await until(wire, in_flight=1, waiting=1)
            refused = await wire.post(STREAM)
            assert (refused.status, refused.error["code"]) == (503, "server_is_busy")
            assert int(refused.headers["retry-after"]) > 0
            assert len(upstream.calls) == 1
            hold.set()
            for client in (first, second):
                answer = await client.answer()
                check_stream(answer.events)
                assert answer.events[-1]["type"] == "response.completed"
        await until(wire, in_flight=0, waiting=0)


async def test_a_client_that_leaves_the_line_leaves_no_trace(serve: Serve, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "one"}), hold, chunk(finish="stop")]), Say("three"))
    serving = serve({"max_concurrent": 1}, disconnect_grace=0.01)
    async with serving as url, Wire(url) as wire, Wire(url) as first, Wire(url) as third:
        await first.start("POST", "/v1/responses", orjson.dumps(STREAM))
        await first.read_until(b"one")
        async with Wire(url) as second:
            await second.start("POST", "/v1/responses", orjson.dumps(STREAM))
            await until(wire, waiting=1)
        await until(wire, waiting=0)
        await third.start("POST", "/v1/responses", orjson.dumps(STREAM))
        await until(wire, waiting=1)
        hold.set()
        assert (await first.answer()).events[-1]["type"] == "response.completed"
        assert (await third.answer()).events[-1]["response"]["output"][0]["content"][0]["text"] == "three"
    assert len(upstream.calls) == 2


async def test_the_health_is_that_of_the_last_turn(serve: Serve, upstream: Upstream) -> None:
    upstream.script(Reply({"error": {"message": f"down {SECRET}"}}, status=500), Say("Fine."))
    headers = {"authorization": f"Bearer {SECRET}"}
    async with serve({"headers": headers}) as url, Wire(url) as wire:
        assert (await status(wire))["health"] == "unknown"
        assert (await wire.post(ASK)).status == 502
        failing = await status(wire)
        assert (failing["health"], failing["last_error"]["code"]) == ("failing", "upstream_error")
        assert (await wire.post(ASK)).status == 200
        fine = await status(wire)
        assert fine["health"] == "ok" and fine["last_success"] >= fine["last_error"]["at"]
        assert fine["last_error"] == failing["last_error"]


async def test_models_without_tools_are_told_of(serve: Serve, upstream: Upstream) -> None:
    upstream.script(Reply({"error": {"message": "m does not support tools"}}, status=400), Say("Fine."))
    async with serve() as url, Wire(url) as wire:
        assert (await status(wire))["tools"] == {"mode": "auto", "emulated_for": []}
        assert (await wire.post({**ASK, "tools": [LOOK]})).status == 200
        assert (await status(wire))["tools"] == {"mode": "auto", "emulated_for": ["m"]}


async def test_an_upstream_that_is_busy_for_a_moment_is_asked_again(serve: Serve, upstream: Upstream) -> None:
    upstream.script(Reply({}, status=503, headers={"retry-after": "0"}), Say("Fine."))
    async with serve({"retries": 1}) as url, Wire(url) as wire:
        assert (await wire.post(ASK)).status == 200
    assert [call.json for call in upstream.calls] == [upstream.calls[0].json] * 2


async def test_only_admins_are_told_where_there_are_keys(serve: Serve) -> None:
    keys = {"ops": "key-ops", "a": "key-a"}
    async with serve(api_keys=keys, admins=["ops"]) as url, Wire(url) as wire:
        assert (await status(wire, {"x-api-key": "key-ops"}))["id"] == "it"
        answer = await wire.request("GET", "/v1/upstreams", b"", {"x-api-key": "key-a"})
        assert (answer.status, answer.error["code"]) == (403, "forbidden")
        assert (await wire.request("GET", "/v1/upstreams")).status == 401


# A Responses upstream that keeps its own chain.


@pytest.mark.parametrize("headers", [{"session-id": "s"}, {}], ids=["a session", "previous_response_id"])
async def test_a_chain_of_the_upstreams_own_is_gone_on_with_and_mended(database: Path, headers: dict[str, str]) -> None:
    """Only what is new is sent, and everything where the upstream has forgotten."""
    forgotten = {"error": {"code": "previous_response_not_found", "message": "Not found.", "param": None}}
    answers = [streamed(text_item(text), envelope=response("in_progress", id=f"resp_{text}")) for text in "abc"]
    async with Provider(*answers[:2], Reply(forgotten, status=400), answers[2]) as provider:
        given = UpstreamSettings(kind="responses", url=provider.url, chain=True)
        settings = Settings(upstreams={"theirs": given}, database_url=f"sqlite:///{database}")
        async with running(settings) as url, Wire(url) as wire:
            named: dict[str, str] = {}
            for text in ("one", "two", "three"):
                answer = await wire.post({**STREAM, "input": text, **named}, headers)
                check_stream(answer.events)
                assert answer.events[-1]["response"]["status"] == "completed"
                if not headers:
                    named = {"previous_response_id": answer.events[-1]["response"]["id"]}
    sent = [(call.json.get("previous_response_id"), len(call.json["input"])) for call in provider.calls]
    assert sent == [(None, 1), ("resp_a", 1), ("resp_b", 1), (None, 5)]
    assert all(call.json["store"] for call in provider.calls)
