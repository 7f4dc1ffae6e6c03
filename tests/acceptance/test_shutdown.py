"""A server that is told to stop, and what the next one makes of what was under way."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator

import orjson
import pytest

from tests.acceptance.calls import (
    ASK,
    BACKGROUND,
    STREAM,
    cancel,
    create,
    created,
    ended,
    followed,
    retrieve,
    says,
    streaming,
    text_of,
)
from tests.invariants import check_stream
from tests.server import ServerProcess
from tests.stranger import stranger
from tests.upstream import Drop, Reply, Say, Stream, Upstream, chunk, completion
from tests.wire import Wire, head, parse_events

LEASE = 1.0
STARTED, STOPS = "Application startup complete", "Shutting down"


def environment(upstream: Upstream, database_url: str, **more: str) -> dict[str, str]:
    settings = {
        "BACKEND": "chat",
        "UPSTREAM": upstream.url,
        "DATABASE_URL": re.sub(r"\+\w+", "", database_url, count=1),
        "LEASE": str(LEASE),
        "SHUTDOWN_GRACE": "1",
        **more,
    }
    return {f"RESPONSES_INGRESS_{name}": value for name, value in settings.items()}


@pytest.fixture
async def server(upstream: Upstream, sqlite_database: str) -> AsyncIterator[ServerProcess]:
    async with ServerProcess(environment=environment(upstream, sqlite_database, FLUSH_INTERVAL="0")) as server:
        yield server


def unheard() -> Drop:
    """An upstream that says nothing."""
    return Drop(hold=asyncio.Event())


def unfinished(text: str) -> Stream:
    """An upstream that says `text` and then nothing more."""
    return Stream([chunk({"content": text})], close="silent")


async def test_what_runs_gets_its_time_and_is_then_handed_over_or_closed(
    server: ServerProcess, upstream: Upstream
) -> None:
    hold = asyncio.Event()
    upstream.script(unheard(), unfinished("unseen "), unheard(), unfinished("half "))
    upstream.script(Reply(completion(Say("In time.")), hold=hold))
    unsaid = await created(server.url, {**BACKGROUND, "input": "unsaid"})
    await upstream.called(1)
    unseen = await created(server.url, {**BACKGROUND, "input": "unseen"})
    await upstream.called(2)
    async with (
        streaming(server.url, {**STREAM, "background": True, "input": "watched"}, "response.queued") as (watched, id),
        Wire(server.url) as late,
    ):
        await upstream.called(3)
        async with streaming(server.url, {**STREAM, "input": "in front"}, "half ") as (in_front, failed_id):
            in_time = asyncio.create_task(created(server.url, {**ASK, "input": "in time"}))
            await upstream.called(5)
            body = orjson.dumps(ASK)
            await late.send(head("POST", "/v1/responses", {"content-length": str(len(body))}))

            server.signal(signal.SIGTERM)
            await server.said(STOPS)
            await late.send(body)
            refused = await late.answer()
            assert (refused.status, refused.error["code"]) == (503, "server_is_busy")
            assert int(refused.headers["retry-after"]) >= 1
            with pytest.raises(OSError):
                await create(server.url, ASK)
            hold.set()
            assert text_of(await in_time) == "In time."
            events = (await in_front.answer()).events
            with pytest.raises(ConnectionError):  # cut off and not ended: another process goes on with it
                await watched.answer()
            seen = parse_events(await watched.read_until(b"response.queued"))
    assert await server.ended() == 0
    check_stream(events)
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"], text_of(failed)) == ("failed", "server_restarted", "half ")
    assert [event["type"] for event in seen] == ["response.created", "response.queued"]
    assert len(upstream.calls) == 5

    upstream.answer = lambda request: Say(f"Now {request.json['messages'][-1]['content']}.")
    await server.start()
    assert text_of(await ended(server.url, unsaid["id"])) == "Now unsaid."
    assert text_of(await ended(server.url, unseen["id"])) == "Now unseen."
    seen += await followed(server.url, id, after=1)
    check_stream(seen)
    assert text_of(seen[-1]["response"]) == "Now watched."
    assert await retrieve(server.url, failed_id) == failed
    assert len(upstream.calls) == 8


async def test_a_second_signal_is_a_crash(server: ServerProcess, upstream: Upstream) -> None:
    session = {"session-id": "crash"}
    upstream.script(unheard(), unfinished("half "), Say("Behind."), Say("Next."))
    behind = await created(server.url, BACKGROUND)
    await upstream.called(1)
    async with streaming(server.url, STREAM, "half ", session) as (wire, id):
        await says(server.url, id, "half ")
        server.signal(signal.SIGTERM)
        await server.said(STOPS)
        server.signal(signal.SIGTERM)
        assert await server.ended() == 128 + signal.SIGTERM
        with pytest.raises(ConnectionError):
            await wire.answer()
    await server.start()
    failed = await ended(server.url, id)
    assert (failed["error"]["code"], text_of(failed)) == ("server_restarted", "half ")
    assert text_of(await ended(server.url, behind["id"])) == "Behind."
    assert text_of(await created(server.url, {**ASK, "input": "next?"}, session)) == "Next."
    assert [message["content"] for message in upstream.calls[-1].json["messages"]] == ["next?"]


async def test_several_workers(upstream: Upstream, each_database: str) -> None:
    """Any of them answers for any response, and all stop as one does alone."""
    variables = environment(upstream, each_database, DISCONNECT_GRACE="60", SHUTDOWN_GRACE="0.2")
    async with ServerProcess("--workers", "2", environment=variables) as server:
        assert ("no more throughput" in server.log) == each_database.startswith("sqlite")
        await server.said(STARTED, times=2)
        upstream.script(unfinished("half "))
        response = await created(server.url, BACKGROUND)
        for _ in range(8):  # each on a connection of its own, so that both are asked
            await says(server.url, response["id"], "half ")
        following = [asyncio.create_task(followed(server.url, response["id"])) for _ in range(4)]
        assert (await cancel(server.url, response["id"]))["status"] == "cancelled"
        await asyncio.wait_for(upstream.closed(0), 5)
        first, *others = [await one for one in following]
        assert others == [first] * 3

        upstream.answer = lambda call: unfinished("half ") if b"in front" in call.body else unheard()
        behind = await created(server.url, BACKGROUND)
        await upstream.called(2)
        async with streaming(server.url, {**STREAM, "input": "in front"}, "half ") as (wire, _):
            server.signal(signal.SIGTERM)
            failed = (await wire.answer()).events[-1]["response"]
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_restarted")
        assert await server.ended() == 0
    with stranger(each_database) as database:
        (left,) = database.rows("SELECT status, owner FROM responses WHERE id = ?", behind["id"])
    assert left == {"status": "queued", "owner": None}
