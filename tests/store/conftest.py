"""Desks at an empty database, on SQLite and on PostgreSQL."""

import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.store.desk import Desk, at_desk


@pytest.fixture
async def desk(each_database: str) -> AsyncIterator[Desk]:
    async with at_desk(each_database) as desk:
        yield desk


@pytest.fixture
async def other_desk(desk: Desk, each_database: str) -> AsyncIterator[Desk]:
    """Another worker at the same database, with the same clock."""
    async with at_desk(each_database, desk.clock, seed=1) as other:
        yield other


@pytest.fixture
def copy_of_database(sqlite_template: Path, tmp_path: Path) -> Callable[[], str]:
    """Makes the URL of an empty database, another one each time: for tests with many examples."""
    numbers = itertools.count()
    return lambda: f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path / f'{next(numbers)}.db')}"
