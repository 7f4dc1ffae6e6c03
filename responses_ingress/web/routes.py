"""The web application: which path leads to which handler.

What must stay true: every answer, also for a path or method that does not exist, is ours; a WebSocket
upgrade is answered with 426, on which codex falls back to HTTP at once and in silence.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from responses_ingress.errors import IngressError, NotAllowed, NotFound, UpgradeRequired
from responses_ingress.ids import Ids
from responses_ingress.runs.metrics import Metrics
from responses_ingress.store.database import Database
from responses_ingress.web.exchange import Exchange, Handler, answer, decode_headers
from responses_ingress.web.models import Models
from responses_ingress.web.responses import Responses
from responses_ingress.web.upstreams import Upstreams


@dataclass(frozen=True, slots=True)
class Health:
    """Liveness, readiness and metrics: for probes and scrapers, so without a key."""

    database: Database
    metrics: Metrics

    async def alive(self, exchange: Exchange) -> None:
        await exchange.reply({"status": "ok"})

    async def ready(self, exchange: Exchange) -> None:
        """Ready when the database answers and its writer is at work; whether it can be written to is not tried."""
        await self.database.check()
        await exchange.reply({"status": "ready"})

    async def scrape(self, exchange: Exchange) -> None:
        await exchange.reply_bytes(self.metrics.expose(), b"text/plain; version=0.0.4; charset=utf-8")


@dataclass(frozen=True, slots=True)
class Web:
    """All handlers of an open application."""

    responses: Responses
    models: Models
    health: Health
    upstreams: Upstreams


_ROUTES: tuple[tuple[str, str, Callable[[Web], Handler]], ...] = (
    ("POST", "/v1/responses", lambda web: web.responses.create),
    ("GET", "/v1/responses/{response_id}", lambda web: web.responses.retrieve),
    ("DELETE", "/v1/responses/{response_id}", lambda web: web.responses.delete),
    ("POST", "/v1/responses/{response_id}/cancel", lambda web: web.responses.cancel),
    ("GET", "/v1/responses/{response_id}/input_items", lambda web: web.responses.input_items),
    ("GET", "/v1/models", lambda web: web.models.list),
    ("GET", "/v1/models/{model:path}", lambda web: web.models.retrieve),
    ("GET", "/v1/upstreams", lambda web: web.upstreams.list),
    ("GET", "/healthz", lambda web: web.health.alive),
    ("GET", "/readyz", lambda web: web.health.ready),
    ("GET", "/metrics", lambda web: web.health.scrape),
)

# The one route that every turn takes passes by Starlette's middleware and router, which answer nothing
# here that an endpoint does not answer itself: a sixth of a small turn, and 3 kB of an open stream.
_HOT = ("POST", "/v1/responses")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A handler as the ASGI app that Starlette routes to. The open `Web` comes with the lifespan's state."""

    find: Callable[[Web], Handler]
    ids: Ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.ids.request(), decode_headers(scope["headers"]))
        await answer(exchange, self.find(scope["state"]["web"]))


@dataclass(frozen=True, slots=True)
class Path:
    """The endpoints of one path, by method."""

    endpoints: Mapping[str, Endpoint]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.endpoints[method](scope, receive, send)


def build(open_web: Callable[[], AbstractAsyncContextManager[Web]], ids: Ids) -> ASGIApp:
    """The application. `open_web` is entered when the server starts and left when it stops."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with open_web() as web:
            yield {"web": web}

    def no_route(request: Request, error: Exception) -> Response:
        return _no_route(request, error, ids.request())

    endpoints: dict[str, dict[str, Endpoint]] = {}
    for method, path, find in _ROUTES:
        endpoints.setdefault(path, {})[method] = Endpoint(find, ids)
    routes = [Route(path, Path(methods), methods=list(methods)) for path, methods in endpoints.items()]
    starlette = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: no_route})
    starlette.router.redirect_slashes = False
    hot_method, hot_path = _HOT
    hot = endpoints[hot_path][hot_method]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_upgrade(send, ids.request())
        elif scope["type"] == "http" and scope["path"] == hot_path and scope["method"] == hot_method:
            await hot(scope, receive, send)
        else:
            await starlette(scope, receive, send)

    return app


def _no_route(request: Request, error: Exception, request_id: str) -> Response:
    """Starlette's 404 and 405, in our words."""
    refusal: IngressError = NotFound(f"There is nothing at {request.url.path[:200]}.")
    headers = {"x-request-id": request_id}
    if isinstance(error, HTTPException) and error.status_code == 405:
        refusal = NotAllowed(f"{request.method} is not allowed here.")
        headers |= error.headers or {}
    return JSONResponse(refusal.body(), refusal.status, headers)


async def _refuse_upgrade(send: Send, request_id: str) -> None:
    refusal = UpgradeRequired("This server speaks Responses over HTTP only.")
    headers = [
        (b"content-type", b"application/json"),
        (b"upgrade", b"HTTP/1.1"),
        (b"x-request-id", request_id.encode()),
    ]
    await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": orjson.dumps(refusal.body())})
