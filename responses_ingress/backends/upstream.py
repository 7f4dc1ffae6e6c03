"""The HTTP client that every backend with an upstream shares.

What must stay true: nothing of one tenant's exchange is kept for another (no cookies); no time limit
cuts a live stream; a request is sent again only where the server cannot have begun it, once; cancelling
closes the upstream's connection at once. It must not know what is sent.
"""

from collections.abc import AsyncGenerator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

import aiohttp
import orjson
from aiohttp.connector import Connection

from responses_ingress.errors import (
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)

_MOST_ERROR = 64 * 1024
_MOST_JSON = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first byte of an answer, and between bytes."""

    connect: float = 10.0
    first_byte: float = 600.0
    read: float = 300.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a backend's requests go. `url` is the API's base, such as `http://127.0.0.1:11434/v1`.

    key is sent as bearer; with `pass_bearer` the client's own bearer is sent where there is one.
    """

    name: str
    url: str
    key: str | None = field(default=None, repr=False)
    pass_bearer: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def request_headers(self, bearer: str | None) -> dict[str, str]:
        key = (bearer if self.pass_bearer else None) or self.key
        authorization = {"authorization": f"Bearer {key}"} if key else {}
        return {"content-type": "application/json", **authorization, **self.headers}


_reused: ContextVar[bool] = ContextVar("reused")
"""Whether the connection that the current task's request was given had been used before."""


class _Connector(aiohttp.TCPConnector):
    """Tells by `_reused` which connection a request gets. A trace would too, at a fifth of the request's cost."""

    def __init__(self) -> None:
        super().__init__(limit=0)
        self._seen: WeakSet[object] = WeakSet()

    async def connect(self, *request: Any, **options: Any) -> Connection:
        connection = await super().connect(*request, **options)
        _reused.set(connection.protocol in self._seen)
        self._seen.add(connection.protocol)
        return connection


class Client:
    """The connections to one upstream. Make it inside the running loop."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        times = upstream.timeouts
        self._session = aiohttp.ClientSession(
            connector=_Connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=times.connect, sock_read=times.first_byte),
            proxy=_proxy(upstream.url),
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(self, path: str, body: bytes, bearer: str | None = None) -> "Answer":
        """Send `body`, give its answer, whatever its status; the caller closes it. Raises `UpstreamError`
        and its kin."""
        response = await self._send("POST", path, self.upstream.request_headers(bearer), body)
        return Answer(self.upstream, response)

    async def get_json(self, path: str) -> Any:
        """The parsed answer to a GET."""
        upstream = self.upstream
        response = await self._send("GET", path, upstream.request_headers(None), None)
        try:
            if response.status != 200:
                raise UpstreamError(f"The upstream '{upstream.name}' answered {path} with status {response.status}.")
            return parse_json(upstream, await Answer(upstream, response).read())
        finally:
            response.close()

    async def _send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> aiohttp.ClientResponse:
        """The head of the answer. A keep-alive connection that the server closed just as it was used
        again is no answer: the request is then sent once more (RFC 9112, 9.3.1)."""
        upstream = self.upstream
        for last_try in (False, True):
            _reused.set(False)
            try:
                response = await self._session.request(method, upstream.url + path, data=body, headers=headers)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if last_try or not _reused.get() or isinstance(error, aiohttp.ClientConnectorError):
                    raise _translated(upstream, error) from error
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                raise _translated(upstream, error) from error
            else:
                if response.connection is not None and response.connection.protocol is not None:
                    response.connection.protocol.read_timeout = upstream.timeouts.read
                return response
        raise AssertionError("the last try returns or raises")


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for `url`. Read once: aiohttp's own `trust_env` reads the
    netrc file, in a thread, at every request."""
    parts = urlsplit(url)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


@dataclass(frozen=True, slots=True)
class Answer:
    """What an upstream answered; its body is still to come."""

    upstream: Upstream
    response: aiohttp.ClientResponse

    def close(self) -> None:
        """Close the connection, unless the whole answer was read."""
        self.response.close()

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == "text/event-stream"

    @property
    def retry_after(self) -> float | None:
        value = self.response.headers.get("retry-after", "")
        return float(value) if value.isdecimal() else None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, one chunk for what one read brought."""
        content = self.response.content
        try:
            async for chunk in content.iter_any():
                yield chunk
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # What arrived together with the break is still in aiohttp's buffer, behind its exception.
            content.set_exception(None)  # type: ignore[arg-type]
            if rest := content.read_nowait():
                yield rest
            raise _translated(self.upstream, error, begun=True) from error

    async def read(self, limit: int = _MOST_JSON) -> bytes:
        """The whole body, of at most `limit` bytes."""
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in self.response.content.iter_any():
                size += len(chunk)
                if size > limit:
                    raise UpstreamInvalid(f"The upstream '{self.upstream.name}' sent more than {limit} bytes.")
                chunks.append(chunk)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _translated(self.upstream, error, begun=True) from error
        return b"".join(chunks)

    async def read_error(self) -> bytes:
        """The beginning of an error's body."""
        try:
            return await self.read(_MOST_ERROR)
        except UpstreamError:
            return b""


def parse_json(upstream: Upstream, body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid(f"The upstream '{upstream.name}' answered with something that is not JSON.") from None


def _translated(upstream: Upstream, error: Exception, begun: bool = False) -> UpstreamError:
    """The client library's error as ours."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamUnreachable(f"The upstream '{upstream.name}' cannot be reached: connecting took too long.")
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(f"The upstream '{upstream.name}' has been silent for too long.")
    if begun:
        return UpstreamTruncated(f"The upstream '{upstream.name}' broke off in the middle of its answer.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(f"The upstream '{upstream.name}' cannot be reached at {upstream.url}.")
    return UpstreamUnreachable(f"The upstream '{upstream.name}' closed the connection without an answer.")
