"""The openai SDK with what outlives a connection: background, resumed streams, cancel, retries, retention."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from responses_ingress.settings import Settings
from tests.acceptance.calls import BACKGROUND, call, create, created, ended, streaming
from tests.cable import Cable
from tests.invariants import check_stream
from tests.server import running
from tests.upstream import Reply, Say, Stream, Upstream, chunk, completion

MODEL = "test-model"
KEEP = 0.5


@pytest.fixture
async def url(upstream: Upstream, database: Path) -> AsyncIterator[str]:
    settings = Settings(
        backend="chat",
        upstream=upstream.url,
        database_url=f"sqlite:///{database}",
        max_background=2,
        max_queued=1,
        accept_wait=10,
        keep_journals=KEEP,
    )
    async with running(settings) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=url, api_key="test", max_retries=0) as client:
        yield client


async def polled(client: AsyncOpenAI, response_id: str) -> Response:
    """The response when it has ended, as the guide says to wait for it."""
    while True:
        response = await client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        await asyncio.sleep(0.02)


async def collect(stream: Any) -> list[dict[str, Any]]:
    return [event.to_dict() async for event in stream]


# Background.


async def test_create_and_poll(client: AsyncOpenAI, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Reply(completion(Say("Done.")), hold=hold))
    response = await client.responses.create(model=MODEL, input="Think", background=True)
    assert (response.status, response.background, response.output) == ("queued", True, [])
    hold.set()
    response = await polled(client, response.id)
    assert (response.status, response.output_text) == ("completed", "Done.")
    upstream.script(Say("More."))
    child = await client.responses.create(model=MODEL, input="Go on", previous_response_id=response.id)
    assert child.output_text == "More."
    items = await client.responses.input_items.list(response.id)
    assert [item.to_dict()["content"][0]["text"] for item in items.data] == ["Think"]  # type: ignore[index]


async def test_stream_and_resume(client: AsyncOpenAI, upstream: Upstream) -> None:
    """The connection of the first stream is lost; another goes on where it was."""
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "One "}), hold, chunk({"content": "two."}), chunk(finish="stop")]))
    seen = []
    stream = await client.responses.create(model=MODEL, input="Count", background=True, stream=True)
    async for event in stream:
        seen.append(event.to_dict())
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    id = seen[0]["response"]["id"]  # type: ignore[index]
    last = int(seen[-1]["sequence_number"])  # type: ignore[call-overload]
    hold.set()
    seen += await collect(await client.responses.retrieve(id, stream=True, starting_after=last))
    check_stream(seen)
    assert [event["type"] for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response = await client.responses.retrieve(id)
    assert response.output_text == "One two."
    assert seen[-1]["response"] == response.to_dict()


async def test_resume_with_the_stream_helper(client: AsyncOpenAI, upstream: Upstream) -> None:
    """The helper asks for all events, and leaves out itself what was seen."""
    upstream.script(Say("One two three."))
    async with client.responses.stream(model=MODEL, input="Count", background=True) as stream:
        async for event in stream:
            if event.type == "response.created":
                id = event.response.id
            elif event.type == "response.output_text.delta":
                break
    async with client.responses.stream(response_id=id, starting_after=event.sequence_number) as rest:
        numbers = [event.sequence_number async for event in rest]
        final = await rest.get_final_response()
    assert numbers[0] == event.sequence_number + 1
    assert final.output_text == "One two three."


async def test_cancel(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Stream([chunk({"content": "word "})], close="silent"))
    stream = await client.responses.create(model=MODEL, input="Speak", background=True, stream=True)
    events: list[dict[str, Any]] = []
    async for event in stream:
        events.append(event.to_dict())
        if event.type == "response.output_text.delta":
            cancelled = await client.responses.cancel(events[0]["response"]["id"])
    check_stream(events)
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "cancelled")
    assert (cancelled.status, cancelled.output) == ("cancelled", [])
    await asyncio.wait_for(upstream.closed(0), 5)
    again = await client.responses.cancel(cancelled.id)
    assert again.to_dict() == cancelled.to_dict() == (await client.responses.retrieve(cancelled.id)).to_dict()


async def test_cancel_of_what_is_not_in_the_background(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Done."))
    response = await client.responses.create(model=MODEL, input="Speak")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await client.responses.cancel(response.id)


async def test_what_waits_in_the_queue(client: AsyncOpenAI, upstream: Upstream) -> None:
    """Two run, one waits and is cancelled there, one more is refused until there is room."""
    hold = asyncio.Event()
    upstream.script(*(Reply(completion(Say(f"{turn}")), hold=hold) for turn in (1, 2)), Say("4"))
    first, second, third = [
        await client.responses.create(model=MODEL, input=f"{turn}", background=True) for turn in (1, 2, 3)
    ]
    with pytest.raises(openai.RateLimitError) as refused:
        await client.responses.create(model=MODEL, input="4", background=True)
    assert (refused.value.code, int(refused.value.response.headers["retry-after"]) >= 1) == ("queue_full", True)
    with pytest.raises(openai.BadRequestError, match="in-flight"):
        await client.responses.delete(third.id)
    assert (await client.responses.cancel(third.id)).status == "cancelled"
    fourth = await client.responses.create(model=MODEL, input="4", background=True)
    assert fourth.status == "queued"
    await upstream.called(2)
    hold.set()
    done = [await polled(client, response.id) for response in (first, second, fourth)]
    assert {response.output_text for response in done[:2]} == {"1", "2"}
    assert done[2].output_text == "4"
    assert len(upstream.calls) == 3


# Retries.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("session", [{}, {"session-id": "retried"}])
async def test_a_retry_attaches_to_what_it_began_before(
    url: str, upstream: Upstream, stream: bool, session: dict[str, str]
) -> None:
    hold = asyncio.Event()
    answer = Stream([chunk({"content": "Once."}), chunk(finish="stop")], hold=hold)
    upstream.script(answer if stream else Reply(completion(Say("Once.")), hold=hold))
    async with Cable(url) as cable, AsyncOpenAI(base_url=f"{cable.url}/v1", api_key="test", max_retries=2) as client:
        create: Any = client.responses.create
        asked = asyncio.create_task(create(model=MODEL, input="Hi", stream=stream, extra_headers=session))
        await upstream.called(1)
        cable.cut()
        while cable.connections < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        hold.set()
        got = await asked
        if stream:
            events = await collect(got)
            check_stream(events)
            text = events[-1]["response"]["output"][0]["content"][0]["text"]
        else:
            text = got.output_text
    assert (text, len(upstream.calls)) == ("Once.", 1)


async def test_an_idempotency_key_means_one_response(client: AsyncOpenAI, upstream: Upstream) -> None:
    key = {"Idempotency-Key": "an order"}
    upstream.script(Say("Once."))
    first = await client.responses.create(model=MODEL, input="Hi", extra_headers=key)
    again = await client.responses.create(model=MODEL, input="Hi", extra_headers=key)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=MODEL, input="Something else", extra_headers=key)
    assert refused.value.code == "idempotency_key_reused"
    assert len(upstream.calls) == 1


# Retention.


async def test_what_was_not_to_be_stored_is_gone_soon(url: str, upstream: Upstream) -> None:
    upstream.script(Say("Soon gone."))
    response = await created(url, {**BACKGROUND, "store": False})
    assert (await ended(url, response["id"]))["status"] == "completed"
    while (await call(url, "GET", f"/{response['id']}")).status == 200:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert (await call(url, "GET", f"/{response['id']}")).status == 404
    refused = await create(url, {"model": MODEL, "input": "x", "previous_response_id": response["id"]})
    assert (refused.status, refused.error["code"]) == (400, "previous_response_not_found")


async def test_cursors_are_good_for_a_while_and_then_refused(url: str, upstream: Upstream) -> None:
    upstream.script(Say("Stays."))
    async with streaming(url, {**BACKGROUND, "stream": True}, "response.completed") as (_, id):
        pass
    while (answer := await call(url, "GET", f"/{id}?stream=true&starting_after=3")).status == 200:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert (answer.status, answer.error["code"]) == (400, "stream_cursor_expired")
    whole = await call(url, "GET", f"/{id}?stream=true")
    check_stream(whole.events)
    assert (await ended(url, id))["output"] == whole.events[-1]["response"]["output"]
