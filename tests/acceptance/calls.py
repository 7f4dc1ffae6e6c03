"""Single requests, each on a connection of its own, for tests with several servers."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson

from tests.invariants import check_stream
from tests.wire import Answer, Wire

Json = dict[str, Any]
ASK: Json = {"model": "test-model", "input": "x"}
STREAM: Json = {**ASK, "stream": True}
BACKGROUND: Json = {**ASK, "background": True}
_POLL = 0.02


async def call(url: str, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    async with Wire(url) as wire:
        return await wire.request(method, f"/v1/responses{path}", b"", headers)


async def create(url: str, fields: Json, headers: Mapping[str, str] | None = None) -> Answer:
    async with Wire(url) as wire:
        return await wire.post(fields, headers)


async def created(url: str, fields: Json, headers: Mapping[str, str] | None = None) -> Json:
    """Create a response that must be answered with one; the response."""
    answer = await create(url, fields, headers)
    assert answer.status == 200, answer
    response: Json = answer.json
    return response


async def retrieve(url: str, response_id: str) -> Json:
    answer = await call(url, "GET", f"/{response_id}")
    assert answer.status == 200, answer
    response: Json = answer.json
    return response


async def cancel(url: str, response_id: str) -> Json:
    answer = await call(url, "POST", f"/{response_id}/cancel")
    assert answer.status == 200, answer
    response: Json = answer.json
    return response


async def followed(url: str, response_id: str, after: int | None = None) -> list[Json]:
    """The events of a response from its first one, or from the one behind number `after`, until its end."""
    query = "" if after is None else f"&starting_after={after}"
    answer = await call(url, "GET", f"/{response_id}?stream=true{query}")
    assert answer.status == 200, answer
    if after is None:
        check_stream(answer.events)
    return answer.events


async def ended(url: str, response_id: str) -> Json:
    """Wait until a response has ended; the response."""
    while True:
        response = await retrieve(url, response_id)
        if response["status"] not in ("queued", "in_progress"):
            return response
        await asyncio.sleep(_POLL)


async def says(url: str, response_id: str, text: str) -> Json:
    """Wait until the text of a response is `text`; the response."""
    while True:
        response = await retrieve(url, response_id)
        if text_of(response) == text:
            return response
        await asyncio.sleep(_POLL)


@asynccontextmanager
async def streaming(
    url: str, fields: Json, text: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Wire, str]]:
    """A client that has begun a stream and read it up to `text`, and the response's id. It leaves with a reset."""
    async with Wire(url) as wire:
        await wire.start("POST", "/v1/responses", orjson.dumps(fields), headers)
        body = await wire.read_until(text.encode())
        yield wire, id_in(body)


def id_in(body: bytes) -> str:
    """The id of the response that a stream is about, or only its beginning."""
    first = body.split(b"\n\n")[0].split(b"data: ")[1]
    return str(orjson.loads(first)["response"]["id"])


def text_of(response: Json) -> str:
    """All text of a response's messages."""
    parts = [part for item in response["output"] for part in item.get("content") or ()]
    return "".join(part["text"] for part in parts)
