"""A provider that works in the background, behind a real server: how its responses end, and what a restart of the
server does to them.
"""

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
from tests.responses_upstream import Provider, response, whole
from tests.server import ServerProcess, running
from tests.upstream import Drop, Reply
from tests.wire import Wire

Json = dict[str, Any]
Serve = Callable[..., AbstractAsyncContextManager[Wire]]

SPEEDY = {"first_poll": 0.01, "longest_poll": 0.01}
QUEUED, RUNNING = Reply(response("queued")), Reply(response("in_progress"))
DONE = whole(text_item("It took a while."))
LIMIT = {"incomplete_details": {"reason": "max_output_tokens"}}
ASK = {"model": "m", "input": "hi", "stream": True}


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
def serve(provider: Provider, database: Path) -> Serve:
    @asynccontextmanager
    async def serving(**fields: Any) -> AsyncIterator[Wire]:
        given = UpstreamSettings(kind="background", url=provider.url, **{**SPEEDY, **fields})
        settings = Settings(upstreams={"slow": given}, database_url=f"sqlite:///{database}")
        async with running(settings) as url, Wire(url) as wire:
            yield wire

    return serving


async def streamed(wire: Wire, **fields: Any) -> Json:
    answer = await wire.post({**ASK, **fields})
    assert answer.status == 200, answer
    check_stream(answer.events)
    last: Json = answer.events[-1]["response"]
    return last


@pytest.mark.parametrize(
    ("looks", "status", "code"),
    [
        ([DONE], "completed", None),
        ([QUEUED, RUNNING, RUNNING, DONE], "completed", None),
        ([Reply({}, status=500), Drop(), Reply({}, status=429), Reply(body=b"<html>"), DONE], "completed", None),
        ([Reply(response("incomplete", text_item("So far."), **LIMIT))], "incomplete", None),
        ([Reply(response("failed", error={"code": "server_error", "message": "No."}))], "failed", "server_error"),
        ([Reply(response("expired"))], "failed", "upstream_expired"),
        ([RUNNING, Reply({"error": {"message": "Unknown."}}, status=410)], "failed", "upstream_response_gone"),
        ([RUNNING, Reply({"error": {"message": "No."}}, status=400)], "failed", "upstream_refused"),
        ([Reply({}, status=403), Reply({}, status=401), Reply({}, status=404), DONE], "completed", None),
    ],
)
async def test_every_ending_is_told(
    serve: Serve, provider: Provider, looks: list[Any], status: str, code: str | None
) -> None:
    provider.script(QUEUED)
    provider.looks(*looks)
    async with serve() as wire:
        ended = await streamed(wire)
    assert (ended["status"], (ended["error"] or {}).get("code")) == (status, code)
    assert len(provider.calls) == 1
    sent = provider.calls[0].json
    assert (sent["background"], sent["stream"], sent["store"]) == (True, False, True)


async def test_one_that_the_provider_cancels_is_cancelled(serve: Serve, provider: Provider) -> None:
    provider.script(QUEUED)
    provider.looks(Reply(response("cancelled")))
    async with serve() as wire:
        assert (await streamed(wire))["status"] == "cancelled"


async def test_a_client_that_wants_no_stream_gets_the_answer_when_it_is_there(serve: Serve, provider: Provider) -> None:
    provider.script(QUEUED)
    provider.looks(RUNNING, DONE)
    async with serve() as wire:
        answer = await wire.post({"model": "m", "input": "hi"})
    assert (answer.status, answer.json["status"]) == (200, "completed")


async def test_the_window_is_the_requests_or_the_settings(serve: Serve, provider: Provider) -> None:
    provider.looks(DONE)
    async with serve(completion_window="24h") as wire:
        for metadata in ({}, {"completion_window": "1h", "mine": "x"}):
            provider.script(QUEUED)
            ended = await streamed(wire, metadata=metadata)
            assert ended["metadata"] == metadata
    assert [call.json["metadata"] for call in provider.calls] == [
        {"completion_window": "24h"},
        {"completion_window": "1h"},
    ]


async def test_one_that_takes_too_long_is_given_up(serve: Serve, provider: Provider) -> None:
    provider.script(QUEUED)
    provider.looks(RUNNING)
    async with serve(patience=0.05, margin=0) as wire:
        ended = await streamed(wire)
        await provider.cancelled()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "upstream_timeout")


async def test_an_answer_to_the_request_that_is_lost_is_not_asked_for_again(serve: Serve, provider: Provider) -> None:
    provider.script(Drop(), QUEUED)
    async with serve() as wire:
        refused = await wire.post(ASK)
    assert (refused.status, refused.error["code"]) == (502, "upstream_create_unknown")
    assert len(provider.calls) == 1


# A restart of the server.


def process(provider: Provider, database: Path) -> ServerProcess:
    upstreams = {"slow": {"kind": "background", "url": provider.url, **SPEEDY}}
    environment = {
        "RESPONSES_INGRESS_UPSTREAMS": orjson.dumps(upstreams).decode(),
        "RESPONSES_INGRESS_LEASE": "1",
        "RESPONSES_INGRESS_SHUTDOWN_GRACE": "0.1",
    }
    return ServerProcess("--database-url", f"sqlite:///{database}", environment=environment)


@pytest.mark.parametrize(("end", "background"), [("killed", True), ("killed", False), ("stopped", False)])
async def test_after_a_restart_the_same_response_is_polled_on(
    provider: Provider, database: Path, end: str, background: bool
) -> None:
    provider.script(QUEUED)
    provider.looks(RUNNING)
    async with process(provider, database) as server:
        async with Wire(server.url) as wire:
            await wire.start("POST", "/v1/responses", orjson.dumps({**ASK, "background": background}))
            begun = await wire.read_until(b"response.in_progress")
            id = orjson.loads(begun.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
            await provider.polled(2)
        await (server.kill() if end == "killed" else server.terminate())
        polls = len(provider.polls)
        await server.start()
        await provider.polled(polls + 1)
        provider.looks_over()
        provider.looks(DONE)
        async with Wire(server.url) as wire:
            ended = await ending(wire, id)
            again = await wire.request("GET", f"/v1/responses/{id}?stream=true")
    assert (ended["status"], ended["error"]) == ("completed", None)
    assert ended["output"][0]["content"][0]["text"] == "It took a while."
    check_stream(again.events)
    assert again.events[-1]["response"] == ended
    assert len(provider.calls) == 1  # it was made once, and asked for under one name
    assert len({poll.path for poll in provider.polls}) == 1
    assert not provider.cancels


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("end", ["killed", "stopped"])
async def test_what_is_being_created_is_not_created_again(
    provider: Provider, database: Path, end: str, background: bool
) -> None:
    hold = asyncio.Event()
    provider.script(Reply(response("queued"), hold=hold), QUEUED)
    provider.looks(DONE)
    async with process(provider, database) as server:
        async with Wire(server.url) as wire:
            await wire.start("POST", "/v1/responses", orjson.dumps({**ASK, "background": background}))
            begun = await wire.read_until(b"response.created")
            id = orjson.loads(begun.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
            await provider.called(1)
        await (server.kill() if end == "killed" else server.terminate())
        hold.set()
        await server.start()
        async with Wire(server.url) as wire:
            ended = await ending(wire, id)
    assert (ended["status"], len(provider.calls)) == ("failed", 1)


async def ending(wire: Wire, id: str) -> Json:
    """The response when it has ended."""
    while True:
        answer = await wire.request("GET", f"/v1/responses/{id}")
        if answer.json["status"] not in ("queued", "in_progress"):
            ended: Json = answer.json
            return ended
        await asyncio.sleep(0.02)
