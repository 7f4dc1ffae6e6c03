"""Desks at an empty database, on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator

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
