"""Fixtures of the crash tests: a scripted upstream that any call may reach, and a server that can die."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from responses_ingress.settings import Settings
from tests.crash.contract import FLUSH, LEASE
from tests.crash.server import MortalServer
from tests.upstream import Answer, Received, Say, Stream, Upstream, chunk, chunks, usage

WORDS = " ".join(f"word{number}" for number in range(24))


def answer(received: Received) -> Answer:
    """A message and a call, slowly; no two answers say the same."""
    number = received.number
    say = Say(f"answer {number} says {WORDS}", calls=[("look", {"at": number})])
    return Stream([*chunks(say, number), {**chunk(), "choices": [], "usage": usage(10, 5)}], pace=0.006)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        upstream.answer = answer
        yield upstream


@pytest.fixture
def settings(upstream: Upstream, sqlite_database: str) -> Settings:
    return Settings(
        backend="chat",
        upstream=upstream.url,
        database_url=sqlite_database.replace("+aiosqlite", ""),
        lease=LEASE,
        flush_interval=FLUSH,
        disconnect_grace=0,
    )


@pytest.fixture
async def server(settings: Settings, tmp_path: Path) -> AsyncIterator[MortalServer]:
    async with MortalServer(settings, tmp_path) as server:
        yield server
