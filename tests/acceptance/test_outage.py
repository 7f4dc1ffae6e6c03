"""A PostgreSQL server of its own, stopped and crashed under a server with runs under way."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from responses_ingress.settings import Settings
from responses_ingress.store import migrate
from tests.acceptance.calls import ASK, BACKGROUND, STREAM, create, created, ended, retrieve, streaming, text_of
from tests.conftest import own_postgres
from tests.invariants import check_stream
from tests.server import running
from tests.upstream import Say, Stream, Upstream, chunk


class Cluster:
    """The database server, as something to stop and start."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.url = str(server.get_uri())

    async def crash(self) -> None:
        """Without a word to anybody, in the middle of what it does."""
        pid = self._server.get_pid()
        os.kill(pid, signal.SIGQUIT)
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)

    async def start(self) -> None:
        await asyncio.to_thread(self._server.ensure_postgres_running)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    server = own_postgres()
    yield Cluster(server)
    server.cleanup()


@pytest.fixture
async def url(cluster: Cluster, upstream: Upstream) -> AsyncIterator[str]:
    settings = Settings(backend="chat", upstream=upstream.url, database_url=cluster.url)
    await migrate.migrate(settings.async_database_url)
    async with running(settings) as url:
        yield url


@pytest.mark.parametrize("end", [Cluster.stop, Cluster.crash], ids=["stopped", "crashed"])
async def test_runs_outlast_a_restart_of_the_database(cluster: Cluster, url: str, upstream: Upstream, end: Any) -> None:
    session = {"session-id": "restart"}
    hold = asyncio.Event()
    upstream.script(*(Stream([chunk({"content": f"{turn}"}), hold, chunk(finish="stop")]) for turn in (1, 2)))
    async with streaming(url, STREAM, '"1"', session) as (wire, id):
        behind = await created(url, BACKGROUND)
        await upstream.called(2)
        await end(cluster)
        refused = await create(url, ASK, {"session-id": "refused"})
        assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        hold.set()
        await cluster.start()
        events = (await wire.answer()).events
    check_stream(events)
    assert text_of(events[-1]["response"]) == "1"
    assert await retrieve(url, id) == events[-1]["response"]
    assert text_of(await ended(url, behind["id"])) == "2"
    upstream.script(Say("3"))
    assert text_of(await created(url, {**ASK, "input": "y"}, session)) == "3"
    assert [message["content"] for message in upstream.calls[-1].json["messages"]] == ["x", "1", "y"]
