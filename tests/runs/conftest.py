"""Fixtures of the tests of runs."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from responses_ingress.store import migrate
from tests.runs.stage import Stage, staged


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of the newest schema, made once: copying it is a hundred times quicker."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    asyncio.run(migrate.migrate(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture
def migrated_database(template: Path, tmp_path: Path) -> str:
    """The URL of an empty database of the newest schema."""
    return f"sqlite+aiosqlite:///{shutil.copy(template, tmp_path / 'ingress.db')}"


@pytest.fixture
async def stage(migrated_database: str) -> AsyncIterator[Stage]:
    async with staged(migrated_database) as stage:
        yield stage
