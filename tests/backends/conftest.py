"""Fixtures of the tests of backends: a scripted upstream, and no proxy between it and them."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.backends.environment import proxies
from tests.upstream import Upstream


@pytest.fixture(autouse=True)
def no_proxies() -> Iterator[None]:
    with proxies():
        yield


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream
