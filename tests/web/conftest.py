"""Fixtures of the tests of the web edge."""

from collections.abc import AsyncIterator

import pytest

from tests.web.asgi import Site, opened_site


@pytest.fixture
async def site(migrated_database: str) -> AsyncIterator[Site]:
    async with opened_site(migrated_database) as site:
        yield site
