"""Fixtures of the tests of the web edge."""

from collections.abc import AsyncIterator

import pytest

from tests.web.asgi import Site, opened_site


@pytest.fixture
def migrated_database(each_database: str) -> str:
    """Every test of this folder runs on SQLite and on PostgreSQL."""
    return each_database


@pytest.fixture
async def site(migrated_database: str) -> AsyncIterator[Site]:
    async with opened_site(migrated_database) as site:
        yield site
