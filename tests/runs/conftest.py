"""Fixtures of the tests of runs."""

from collections.abc import AsyncIterator

import pytest

from tests.runs.stage import Stage, staged


@pytest.fixture
async def stage(migrated_database: str) -> AsyncIterator[Stage]:
    async with staged(migrated_database) as stage:
        yield stage
