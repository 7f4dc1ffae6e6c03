"""Fixtures of the tests of runs."""

from collections.abc import AsyncIterator

import pytest

from responses_ingress.runs.runner import Limits
from tests.runs.stage import Stage, staged


@pytest.fixture
def migrated_database(each_database: str) -> str:
    """Every test of this folder runs on SQLite and on PostgreSQL."""
    return each_database


@pytest.fixture
async def stage(migrated_database: str) -> AsyncIterator[Stage]:
    async with staged(migrated_database) as stage:
        yield stage


@pytest.fixture
async def unhurried(migrated_database: str) -> AsyncIterator[Stage]:
    """A stage whose runs write their text ahead of nothing but an item's end."""
    async with staged(migrated_database, Limits(flush_interval=3600)) as stage:
        yield stage


@pytest.fixture
async def careful(migrated_database: str) -> AsyncIterator[Stage]:
    """A stage where every event waits for its commit."""
    async with staged(migrated_database, Limits(flush_interval=0)) as stage:
        yield stage
