"""Fixtures of the acceptance tests: a scripted upstream, and servers over it."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from responses_ingress.settings import Settings
from responses_ingress.store import migrate
from tests.server import running
from tests.upstream import Upstream


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of the newest schema, made once: copying it is a hundred times quicker."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    asyncio.run(migrate.migrate(Settings(database_url=f"sqlite:///{path}").async_database_url))
    return path


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    """The SQLite file of the test's server."""
    return Path(shutil.copy(template, tmp_path / "ingress.db"))


@pytest.fixture
async def chat(upstream: Upstream, database: Path) -> AsyncIterator[str]:
    """The base URL of a server in front of the scripted upstream."""
    async with running(Settings(backend="chat", upstream=upstream.url, database_url=f"sqlite:///{database}")) as url:
        yield url
