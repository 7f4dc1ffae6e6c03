"""Two workers on one PostgreSQL, and one of them dies: the other one sees to what it left behind."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from responses_ingress.settings import Settings
from tests.crash.client import get, post, resume
from tests.crash.contract import (
    FIELDS,
    FLUSH,
    LEASE,
    SESSION,
    check_database,
    check_history,
    check_next_turn,
    unfinished,
)
from tests.crash.server import MortalServer
from tests.invariants import check_stream
from tests.upstream import Drop, Stream, Upstream, chunk

TAKEOVER = LEASE + 1 + 1
"""Seconds: the promise is the lease and one; a busy machine may take one more."""

Pair = tuple[MortalServer, MortalServer]


@pytest.fixture
async def pair(upstream: Upstream, postgres_database: str, tmp_path: Path) -> AsyncIterator[Pair]:
    settings = Settings(
        backend="chat",
        upstream=upstream.url,
        database_url=postgres_database.replace("+asyncpg", ""),
        lease=LEASE,
        flush_interval=FLUSH,
    )
    async with MortalServer(settings, tmp_path) as one, MortalServer(settings, tmp_path) as other:
        yield one, other


async def test_a_background_response_is_begun_again_by_the_other_worker(pair: Pair, upstream: Upstream) -> None:
    one, other = pair
    upstream.script(Drop(hold=asyncio.Event()))
    asked = asyncio.create_task(post(one.url, {**FIELDS, "background": True}, SESSION))
    await upstream.called(1)
    (response_id,) = unfinished(one.database)
    following = asyncio.create_task(resume(other.url, response_id))
    await one.kill()
    died = time.monotonic()
    seen = await asked
    await upstream.called(2)
    assert time.monotonic() - died < TAKEOVER
    followed = await following
    check_stream(followed.events)
    assert followed.events[-1]["type"] == "response.completed"
    assert followed.events[: len(seen.events)] == seen.events
    assert await get(other.url, response_id) == followed.events[-1]["response"]
    assert len(upstream.calls) == 2
    await check_next_turn(other.url, SESSION, None)
    check_history(upstream, [followed.events[-1]["response"]])
    await check_database(other.database)


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
async def test_what_was_shown_is_closed_as_failed_and_followers_elsewhere_are_told(
    pair: Pair, upstream: Upstream, background: bool
) -> None:
    one, other = pair
    half = [chunk({"content": "Half an "}), chunk({"content": "answer"})]
    upstream.script(Stream(half, close="silent", pace=0.02))
    asked = asyncio.create_task(post(one.url, {**FIELDS, "background": background}, SESSION))
    await upstream.called(1)
    (response_id,) = unfinished(one.database)
    following = asyncio.create_task(resume(other.url, response_id))
    async with asyncio.timeout(TAKEOVER):
        while "answer" not in str(await get(other.url, response_id)):  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.02)
    await one.kill()
    died = time.monotonic()
    seen, followed = await asked, await following
    assert time.monotonic() - died < TAKEOVER
    check_stream(followed.events)
    ending = followed.events[-1]["response"]
    assert (ending["status"], ending["error"]["code"]) == ("failed", "server_restarted")
    assert ending["output"][0]["content"][0]["text"] == "Half an answer"
    assert followed.events[:-1] == seen.events
    assert len(upstream.calls) == 1
    await check_next_turn(other.url, SESSION, None)
    check_history(upstream, [])
    await check_database(other.database)
