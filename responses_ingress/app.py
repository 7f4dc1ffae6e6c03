"""The composition root: settings in, an ASGI application out. The only place where all rooms meet."""

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import time

from starlette.types import Receive, Scope, Send

from responses_ingress import settings as configuration
from responses_ingress.backends.base import Backend, Route
from responses_ingress.backends.chat import ChatBackend
from responses_ingress.backends.echo import EchoBackend
from responses_ingress.backends.upstream import Timeouts, Upstream
from responses_ingress.dialects.chat import ChatOptions
from responses_ingress.ids import Ids
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.runner import Limits, Runner
from responses_ingress.runs.upkeep import Retention, Upkeep
from responses_ingress.settings import Settings
from responses_ingress.store import migrate
from responses_ingress.store.database import Database, DatabaseClock
from responses_ingress.store.values import Keep
from responses_ingress.web.callers import Keyring
from responses_ingress.web.models import Models
from responses_ingress.web.replies import StreamOptions
from responses_ingress.web.responses import RequestLimits, Responses
from responses_ingress.web.routes import Health, Web, build

_GARBAGE = 20_000  # objects
_DAY = 86_400.0
_FOR_EVER = 1e11  # seconds: so that what was used last can still be told
_SWEEPS = 60.0  # seconds between two looks for what is to be deleted, where nothing is kept for less


class Application:
    """The application for `settings`, as ASGI. It opens its database and backends when the server starts it.

    at: is told the named points of a run's life that are passed, for tests that end the process there.
    """

    def __init__(self, settings: Settings, at: Callable[[str], None] = lambda _: None) -> None:
        ids = Ids()
        self._at = at
        self._settings = settings
        self._ids = ids
        self._runner: Runner | None = None
        self._app = build(self._open, ids)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def stop(self) -> None:
        """Begin nothing more and end what runs, so that every open stream gets its terminal event. A server
        calls this when it is told to stop, before it closes its connections."""
        if self._runner is not None:
            await self._runner.close(self._settings.shutdown_grace)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Web]:
        settings = self._settings
        await migrate.ensure(settings.async_database_url, auto=settings.migrates)
        clock = time if settings.database_url.startswith("sqlite") else DatabaseClock()
        database = Database(settings.async_database_url, clock, settings.synchronous)
        await database.keep_time()
        backends = make_backends(settings)
        routes, metrics = make_routes(settings, backends), Metrics()
        self._runner = Runner(database, routes, make_limits(settings), metrics, self._ids, self._at)
        upkeep = Upkeep(database, self._runner, make_retention(settings))
        _settle_heap()
        try:
            yield make_web(settings, self._runner, database, metrics)
        finally:
            await self.stop()
            await upkeep.close()
            for backend in backends.values():
                await backend.close()
            await database.close()


def create_app(settings: Settings) -> Application:
    return Application(settings)


def _settle_heap() -> None:
    """Collect garbage rarely, and never walk what was loaded at the start and lives as long as the process:
    with Python's defaults that is a sixth of a small turn's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)


def make_backends(settings: Settings) -> dict[str, Backend]:
    """The backend of every upstream, by name. Inside the running loop."""
    return {name: _make_backend(name, upstream) for name, upstream in settings.effective_upstreams.items()}


def _make_backend(name: str, given: configuration.Upstream) -> Backend:
    if given.kind == "echo":
        return EchoBackend()
    upstream = Upstream(
        name=name,
        url=(given.url or "").rstrip("/"),
        key=given.api_key,
        pass_bearer=given.pass_bearer,
        headers=given.headers,
        timeouts=Timeouts(given.connect_timeout, given.first_byte_timeout, given.read_timeout),
    )
    options = ChatOptions(given.max_tokens_field, given.system, given.reasoning, given.forward)
    return ChatBackend(upstream, options, goes_on=given.on_disconnect == "continue")


def make_routes(settings: Settings, backends: dict[str, Backend]) -> list[Route]:
    return [Route(route.model, backends[route.upstream], route.upstream_model) for route in settings.effective_routes]


def make_limits(settings: Settings) -> Limits:
    return Limits(
        flush_interval=settings.flush_interval,
        disconnect_grace=settings.disconnect_grace,
        thread_wait=settings.thread_wait,
        lease=settings.lease,
        max_runs=settings.max_runs,
        max_background=settings.max_background,
        max_queued=settings.max_queued,
        keep=Keep(settings.keep_journals, settings.keep_responses * _DAY if settings.keep_responses else _FOR_EVER),
    )


def make_retention(settings: Settings) -> Retention:
    days = (settings.keep_responses, settings.keep_threads)
    return Retention(
        most_responses=settings.keep_most_responses,
        threads=settings.keep_threads * _DAY if settings.keep_threads else None,
        interval=min(_SWEEPS, settings.keep_journals, *(kept * _DAY for kept in days if kept)),
    )


def _forwarded(settings: Settings) -> frozenset[str]:
    return frozenset(name for upstream in settings.effective_upstreams.values() for name in upstream.forward)


def make_web(settings: Settings, runner: Runner, database: Database, metrics: Metrics) -> Web:
    keyring = Keyring(settings.key_hashes)
    responses = Responses(
        runner=runner,
        database=database,
        keyring=keyring,
        limits=RequestLimits(settings.max_body, settings.max_items, settings.strict, _forwarded(settings)),
        stream=StreamOptions(settings.accept_wait, settings.keepalive_interval, settings.sse_done),
    )
    return Web(responses, Models(runner, keyring), Health(database, metrics))
