"""Fixtures of the acceptance tests: a scripted upstream, and servers over it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from responses_ingress.settings import Settings
from tests.server import running
from tests.upstream import Upstream


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """The SQLite file of the test's server."""
    return tmp_path / "ingress.db"


@pytest.fixture
async def chat(upstream: Upstream, database: Path) -> AsyncIterator[str]:
    """The base URL of a server in front of the scripted upstream."""
    async with running(Settings(backend="chat", upstream=upstream.url, database_url=f"sqlite:///{database}")) as url:
        yield url
