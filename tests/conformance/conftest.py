"""Fixtures of the conformance tests: a cast, and the whole application in front of it."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from responses_ingress.settings import Settings
from responses_ingress.upstream_settings import Upstream
from tests.conformance.casts import CASTS, Cast
from tests.server import running

Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture(params=CASTS)
async def cast(request: pytest.FixtureRequest) -> AsyncIterator[Cast]:
    cast = CASTS[request.param]()
    async with cast.server:
        yield cast


@pytest.fixture
def serve(sqlite_database: str) -> Serve:
    """Serve in front of a cast, with these settings of its upstream; gives the base URL."""

    @asynccontextmanager
    async def serving(cast: Cast, **upstream: Any) -> AsyncIterator[str]:
        given = Upstream(url=cast.server.url, **{**cast.settings, **upstream})
        settings = Settings(
            upstreams={"it": given}, database_url=sqlite_database, disconnect_grace=0.05, keepalive_interval=0.05
        )
        async with running(settings) as url:
            yield url

    return serving


@pytest.fixture
async def url(cast: Cast, serve: Serve) -> AsyncIterator[str]:
    async with serve(cast) as url:
        yield url
