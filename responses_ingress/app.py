"""The composition root: settings in, an ASGI application out. The only place where all rooms meet."""

import gc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from time import time
from typing import TypeVar

from starlette.types import Receive, Scope, Send

from responses_ingress.backends.background import BackgroundBackend, BackgroundOptions
from responses_ingress.backends.base import Backend, Route
from responses_ingress.backends.chat import ChatBackend
from responses_ingress.backends.echo import EchoBackend
from responses_ingress.backends.emulated import EmulatedTools
from responses_ingress.backends.gate import Gate
from responses_ingress.backends.messages import MessagesBackend
from responses_ingress.backends.responses import ResponsesBackend
from responses_ingress.backends.upstream import Retries, Timeouts, Upstream
from responses_ingress.dialects.chat import ChatOptions
from responses_ingress.dialects.messages import MessagesOptions
from responses_ingress.dialects.responses_encoder import ResponsesOptions
from responses_ingress.ids import Ids
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.runner import Limits, Runner
from responses_ingress.runs.upkeep import Retention, Upkeep
from responses_ingress.settings import Settings
from responses_ingress.store import migrate
from responses_ingress.store.database import Database, DatabaseClock
from responses_ingress.store.values import Keep
from responses_ingress.upstream_settings import Upstream as UpstreamSettings
from responses_ingress.web.callers import Keyring
from responses_ingress.web.models import Models
from responses_ingress.web.replies import StreamOptions
from responses_ingress.web.responses import RequestLimits, Responses
from responses_ingress.web.routes import Health, Web, build
from responses_ingress.web.upstreams import Upstreams, UpstreamStatus

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
            yield make_web(settings, self._runner, database, metrics, backends)
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


def make_backends(settings: Settings) -> dict[str, Gate]:
    """The backend of every upstream, by name. Inside the running loop."""
    return {name: _make_backend(name, given) for name, given in settings.effective_upstreams.items()}


def _make_backend(name: str, given: UpstreamSettings) -> Gate:
    upstream = Upstream(
        name=name,
        url=(given.url or "").rstrip("/"),
        key=given.api_key,
        pass_bearer=given.pass_bearer,
        headers=given.headers,
        timeouts=Timeouts(given.connect_timeout, given.first_byte_timeout, given.read_timeout),
        authorization=given.authorization or ("x-api-key" if given.kind == "messages" else "bearer"),
        ca_file=given.ca_file,
        retries=Retries(given.retries),
    )
    backend = _MAKERS[given.kind](upstream, given)
    if given.kind != "echo":
        backend = EmulatedTools(backend, given.tools)
    return Gate(backend, given.max_concurrent, given.max_waiting)


def _goes_on(given: UpstreamSettings) -> bool:
    return given.on_disconnect == "continue"


_MAKERS: Mapping[str, Callable[[Upstream, UpstreamSettings], Backend]] = {
    "chat": lambda upstream, given: ChatBackend(upstream, options(ChatOptions, given), goes_on=_goes_on(given)),
    "responses": lambda upstream, given: ResponsesBackend(
        upstream, options(ResponsesOptions, given), goes_on=_goes_on(given)
    ),
    "background": lambda upstream, given: BackgroundBackend(
        upstream, replace(options(BackgroundOptions, given), requests=options(ResponsesOptions, given))
    ),
    "messages": lambda upstream, given: MessagesBackend(
        upstream, options(MessagesOptions, given), goes_on=_goes_on(given)
    ),
    "echo": lambda _, __: EchoBackend(),
}

_Options = TypeVar("_Options", ChatOptions, ResponsesOptions, BackgroundOptions, MessagesOptions)


def options(kind: type[_Options], given: UpstreamSettings) -> _Options:
    """The options that an upstream's settings name. What they leave open is as the backend has it."""
    found = {field.name: getattr(given, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in found.items() if value is not None})


def make_routes(settings: Settings, backends: Mapping[str, Backend]) -> list[Route]:
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
    """The request fields that some upstream is sent on."""
    upstreams = settings.effective_upstreams.values()
    chosen = [given.forward for given in upstreams if given.forward is not None]
    chosen += [ChatOptions().forward for given in upstreams if given.kind == "chat" and given.forward is None]
    return frozenset(name for names in chosen for name in names)


def upstream_status(settings: Settings, backends: Mapping[str, Gate]) -> list[UpstreamStatus]:
    return [_status(name, given, backends[name]) for name, given in settings.effective_upstreams.items()]


def _status(name: str, given: UpstreamSettings, gate: Gate) -> UpstreamStatus:
    fare, tools = gate.fare, gate.inner if isinstance(gate.inner, EmulatedTools) else None
    return UpstreamStatus(
        name=name,
        kind=given.kind,
        in_flight=fare.in_flight,
        waiting=fare.waiting,
        max_concurrent=given.max_concurrent,
        max_waiting=given.max_waiting if given.max_concurrent else None,
        last_success=fare.last_success,
        last_error=fare.last_error,
        tools=given.tools if tools else None,
        without_tools=tools.without_tools if tools else (),
        completion_window=given.completion_window,
    )


def make_web(
    settings: Settings, runner: Runner, database: Database, metrics: Metrics, backends: Mapping[str, Gate]
) -> Web:
    keyring = Keyring(settings.key_hashes)
    upstreams = Upstreams(lambda: upstream_status(settings, backends), keyring, frozenset(settings.admins))
    responses = Responses(
        runner=runner,
        database=database,
        keyring=keyring,
        limits=RequestLimits(settings.max_body, settings.max_items, settings.strict, _forwarded(settings)),
        stream=StreamOptions(settings.accept_wait, settings.keepalive_interval, settings.sse_done),
    )
    return Web(responses, Models(runner, keyring), Health(database, metrics), upstreams)
