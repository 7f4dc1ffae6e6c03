"""The web application driven without a socket, over a real runner, a scripted backend and a real database.

`Visit` is one exchange, seen from outside: each write of the server stands by itself, and the client can
leave at any moment.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.types import ASGIApp, Message

from responses_ingress.runs.runner import Limits
from responses_ingress.testing import Step
from responses_ingress.web.callers import Keyring
from responses_ingress.web.models import Models
from responses_ingress.web.replies import StreamOptions
from responses_ingress.web.responses import RequestLimits, Responses
from responses_ingress.web.routes import Health, Web, build
from tests.runs.stage import Json, Stage, staged
from tests.wire import Answer

HASTY = StreamOptions(accept_wait=0)
"""Headers that wait for nothing."""
PATIENT = StreamOptions(accept_wait=3600)
"""Headers that wait for the backend, however long it takes."""


class Visit:
    """A request under way. `writes` are the pieces of the body as the server sent them."""

    def __init__(self, app: ASGIApp, scope: Json, body: Sequence[bytes]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.writes: list[bytes] = []
        self.left = asyncio.Event()
        self._incoming: list[Message] = [
            {"type": "http.request", "body": piece, "more_body": at < len(body)} for at, piece in enumerate(body, 1)
        ]
        self._sent = asyncio.Condition()
        self._over = False
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._incoming:
            return self._incoming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        assert not self._over, "the server sent something after its answer"
        if message["type"] == "http.response.start":
            assert not self.status, "the server answered twice"
            self.status = message["status"]
            pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            self.headers = dict(pairs)
            assert len(self.headers) == len(pairs), f"a header came twice: {pairs}"
        else:
            assert self.status, "the server sent a body before its headers"
            self.writes.append(message.get("body", b""))
            self._over = not message.get("more_body", False)
        async with self._sent:
            self._sent.notify_all()

    @property
    def unread(self) -> int:
        """How many pieces of the request the server has not asked for."""
        return len(self._incoming)

    def break_off(self) -> None:
        """Leave in the middle of the request."""
        self._incoming[-1]["more_body"] = True
        self.left.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until what the server has sent is as `condition` says."""
        async with self._sent:
            await self._sent.wait_for(condition)

    async def read_until(self, text: bytes) -> bytes:
        """Read on until the body holds `text`; gives the body so far."""
        await self.until(lambda: text in b"".join(self.writes))
        return b"".join(self.writes)

    async def answer(self) -> Answer:
        """The whole answer."""
        await self.task
        assert self._over, "the server did not end its answer"
        return Answer(self.status, self.headers, b"".join(self.writes))


@dataclass(slots=True)
class Site:
    """An open application and what stands behind it."""

    app: ASGIApp
    stage: Stage
    state: Json
    visits: list[Visit] = field(default_factory=list)

    def visit(
        self,
        method: str,
        target: str,
        body: bytes | Sequence[bytes] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Visit:
        """Begin a request; a body in several pieces arrives in these."""
        url = urlsplit(target)
        scope: Json = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": url.path,
            "raw_path": url.path.encode(),
            "root_path": "",
            "query_string": url.query.encode(),
            "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()],
            "state": self.state.copy(),
        }
        visit = Visit(self.app, scope, [body] if isinstance(body, bytes) else body)
        self.visits.append(visit)
        return visit

    async def get(self, target: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.visit("GET", target, headers=headers).answer()

    async def post(self, target: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.visit("POST", target, headers=headers).answer()

    async def delete(self, target: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.visit("DELETE", target, headers=headers).answer()

    def ask(self, *steps: Step, headers: Mapping[str, str] | None = None, **fields: Any) -> Visit:
        """Begin to create a response whose turn plays `steps`."""
        if steps:
            self.stage.backend.script(steps)
        body = orjson.dumps({"model": "scripted-model", "input": "hi", **fields})
        return self.visit("POST", "/v1/responses", body, headers)

    async def create(self, *steps: Step, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        return await self.ask(*steps, headers=headers, **fields).answer()


@asynccontextmanager
async def opened_site(
    url: str,
    stream: StreamOptions = PATIENT,
    *,
    limits: Limits | None = None,
    requests: RequestLimits | None = None,
    keys: Keyring | None = None,
    seed: int = 1,
) -> AsyncIterator[Site]:
    """The application over the database at `url`, started and stopped as a server would. Two at a time need
    different seeds."""
    async with staged(url, limits, seed=seed) as stage:
        keyring = keys or Keyring()
        responses = Responses(stage.runner, stage.database, keyring, requests or RequestLimits(), stream)
        web = Web(responses, Models(stage.runner, keyring), Health(stage.database, stage.metrics))

        @asynccontextmanager
        async def open_web() -> AsyncIterator[Web]:
            yield web

        app = build(open_web, stage.ids)
        async with _lifespan(app) as state:
            site = Site(app, stage, state)
            try:
                yield site
            finally:
                for visit in site.visits:
                    visit.left.set()
                await stage.runner.close(0)
                await asyncio.gather(*(visit.task for visit in site.visits))


@asynccontextmanager
async def _lifespan(app: ASGIApp) -> AsyncIterator[Json]:
    """Start the application and stop it; gives the state it wants to find in every request."""
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message] = asyncio.Queue()
    state: Json = {}
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
    running = asyncio.ensure_future(app(scope, incoming.get, sent.put))
    await incoming.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    try:
        yield state
    finally:
        await incoming.put({"type": "lifespan.shutdown"})
        assert (await sent.get())["type"] == "lifespan.shutdown.complete"
        await running
