"""The HTTP client that every backend with an upstream shares.

What must stay true: nothing of one tenant's exchange is kept for another (no cookies); no time limit
cuts a live stream; a request is sent again only where the server cannot have begun it, once, or, as often as
the operator wants, where it says that it has not; cancelling closes the upstream's connection at once; no
error shows where the upstream is, since a URL may hold a password. It must not know what is sent.
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
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

logger = logging.getLogger(__name__)

_MOST_ERROR = 64 * 1024
_MOST = 256 * 1024 * 1024
"""Bytes of one answer, streamed or not."""

_STALE = 1.0
"""Seconds in which a connection that was stale breaks; later the server may have begun to work."""

_REST = 0.05
"""Seconds that an answer which is over is given to end on the wire too, so that its connection is kept."""

_LONGEST_WAIT = 999_999

_REFUSES_FOR_NOW = frozenset((429, 503, 529))
"""Statuses that say that nothing was begun. A gateway's 502 may come after work that is paid for."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, to the first byte of an answer, and between bytes."""

    connect: float = 10.0
    first_byte: float = 600.0
    read: float = 300.0


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is made again of which nothing was begun. The first wait is `first` seconds, each is twice
    the one before; where the server wants more than `longest`, its refusal stands."""

    most: int = 0
    first: float = 0.5
    longest: float = 10.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a backend's requests go. `url` is the API's base, such as `http://127.0.0.1:11434/v1`.

    key is sent as bearer, or as `x-api-key` (Anthropic); with `pass_bearer` the client's own bearer is sent
    instead where there is one. `ca_file` adds to the certificates that Python trusts by itself (OpenSSL's, or those
    that `SSL_CERT_FILE` and `SSL_CERT_DIR` name).
    """

    name: str
    url: str = field(repr=False)
    key: str | None = field(default=None, repr=False)
    pass_bearer: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeouts: Timeouts = field(default_factory=Timeouts)
    authorization: Literal["bearer", "x-api-key"] = "bearer"
    ca_file: Path | None = None
    retries: Retries = Retries()

    def request_headers(self, bearer: str | None) -> dict[str, str]:
        key = (bearer if self.pass_bearer else None) or self.key
        if key and self.authorization == "bearer":
            sent = {"authorization": f"Bearer {key}"}
        else:
            sent = {"x-api-key": key} if key else {}
        return {"content-type": "application/json", **sent, **self.headers}


_reused: ContextVar[float | None] = ContextVar("reused")
"""When the current task's request was given a connection that had been used before; None for a new one."""


class _Connector(aiohttp.TCPConnector):
    """Tells by `_reused` which connection a request gets. A trace would too, at a fifth of the request's cost."""

    def __init__(self, keep: bool, ca_file: Path | None) -> None:
        super().__init__(limit=0, force_close=not keep, ssl=_trusting(ca_file))
        self._seen: WeakSet[object] = WeakSet()

    async def connect(self, *request: Any, **options: Any) -> Connection:
        connection = await super().connect(*request, **options)
        _reused.set(time.monotonic() if connection.protocol in self._seen else None)
        self._seen.add(connection.protocol)
        return connection


class Client:
    """The connections to one upstream. Make it inside the running loop. With `keep` off no connection serves a
    second request, so none can be stale, and no request is ever sent again."""

    def __init__(self, upstream: Upstream, keep: bool = True) -> None:
        self.upstream = upstream
        self._retries = upstream.retries.most if keep else 0
        self._leaving: set[aiohttp.ClientResponse] = set()
        times = upstream.timeouts
        self._session = aiohttp.ClientSession(
            connector=_Connector(keep, upstream.ca_file),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=times.connect, sock_read=times.first_byte),
            proxy=_proxy(upstream),
        )

    async def close(self) -> None:
        for response in self._leaving:
            response.close()
        await self._session.close()

    async def post(
        self, path: str, body: bytes, bearer: str | None = None, headers: Mapping[str, str] | None = None
    ) -> "Answer":
        """Send `body`, give its answer, whatever its status; the caller closes it. Raises `UpstreamError`
        and its kin."""
        sent = {**self.upstream.request_headers(bearer), **(headers or {})}
        for retry in range(self._retries):
            try:
                answer = Answer(self.upstream, await self._send("POST", path, sent, body), self._leaving)
            except UpstreamUnreachable as error:
                if may_have_begun(error) or isinstance(error.__cause__, ValueError):
                    raise  # a URL or a certificate that is wrong stays wrong
                wanted = 0.0
            else:
                wanted = answer.retry_after or 0.0
                if answer.status not in _REFUSES_FOR_NOW or wanted > self.upstream.retries.longest:
                    return answer
                answer.close()
            await self._pause(retry, wanted)
        return Answer(self.upstream, await self._send("POST", path, sent, body), self._leaving)

    async def _pause(self, retry: int, wanted: float) -> None:
        """Wait before the retry number `retry` (from 0): as long as the server wants, a little more for each, and
        never exactly as long as others do."""
        times = self.upstream.retries
        wait = min(times.first * 2**retry, times.longest) * (0.5 + random.random() / 2)
        logger.info("upstream %s is asked again in %.1f s", self.upstream.name, wanted + wait)
        await asyncio.sleep(wanted + wait)

    async def get(self, path: str, bearer: str | None = None) -> "Answer":
        """The same for a GET."""
        response = await self._send("GET", path, self.upstream.request_headers(bearer), None)
        return Answer(self.upstream, response, self._leaving)

    async def get_json(self, path: str) -> Any:
        """The parsed answer to a GET."""
        upstream = self.upstream
        answer = await self.get(path)
        try:
            if answer.status != 200:
                raise UpstreamError(f"The upstream '{upstream.name}' answered {path} with status {answer.status}.")
            return parse_json(upstream, await answer.read())
        finally:
            answer.close()

    async def _send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> aiohttp.ClientResponse:
        """The head of the answer. A keep-alive connection that the server closed just as it was used
        again is no answer: the request is then sent once more (RFC 9112, 9.3.1)."""
        upstream = self.upstream
        for last_try in (False, True):
            _reused.set(None)
            try:
                response = await self._session.request(
                    method, upstream.url + path, data=body, headers=headers, allow_redirects=False
                )
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
                if last_try or not _was_stale(error):
                    raise _translated(upstream, error) from error
            else:
                return self._begun(response)
        raise AssertionError("the last try returns or raises")

    def _begun(self, response: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        if 300 <= response.status < 400:
            response.close()
            raise UpstreamError(
                f"The upstream '{self.upstream.name}' answered with a redirect (status {response.status}),"
                " which is not followed; its configured url must be the one it leads to."
            )
        if response.connection is not None and response.connection.protocol is not None:
            # The setter alone leaves the timer of the first byte running.
            response.connection.protocol.read_timeout = self.upstream.timeouts.read
            response.connection.protocol.start_timeout()
        return response


def _trusting(ca_file: Path | None) -> ssl.SSLContext | bool:
    """What a server's certificate is checked with."""
    if ca_file is None:
        return True
    context = ssl.create_default_context()
    context.load_verify_locations(ca_file)
    return context


def may_have_begun(error: UpstreamError) -> bool:
    """Whether the upstream may have got the request that failed so: not where no connection was made."""
    cause = error.__cause__
    return not isinstance(cause, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, ValueError))


def _was_stale(error: Exception) -> bool:
    """Whether a request failed because the server had closed a kept connection before it came."""
    if not isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        return False
    if isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str):
        return False  # the message is what had come of an answer's head
    given = _reused.get()
    return given is not None and time.monotonic() - given < _STALE


def _proxy(upstream: Upstream) -> str | None:
    """The proxy that the environment names for the upstream. Read once: aiohttp's own `trust_env` reads the
    netrc file, in a thread, at every request."""
    parts = urlsplit(upstream.url)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        scheme = urlsplit(proxy).scheme
        logger.warning("upstream %s is asked directly: proxies of type %s are not supported", upstream.name, scheme)
        return None
    return proxy


@dataclass(slots=True)
class Answer:
    """What an upstream answered; its body is still to come."""

    upstream: Upstream
    response: aiohttp.ClientResponse
    _leaving: set[aiohttp.ClientResponse]
    _timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Close the connection, unless the whole answer was read."""
        self._drop_timer()
        self.response.close()

    def leave(self) -> None:
        """Nothing more is wanted. The connection is kept if the end of the body comes at once, else closed."""
        self._drop_timer()
        if self.response.connection is not None:
            self._leaving.add(self.response)
            asyncio.get_running_loop().call_later(_REST, self._left)

    def _left(self) -> None:
        self._leaving.discard(self.response)
        self.response.close()

    def hurry(self, seconds: float) -> None:
        """From the first call on, the body may take only so long; then it ends in `UpstreamTimeout`."""
        if self._timer is None:
            give_up = self.response.content.set_exception
            self._timer = asyncio.get_running_loop().call_later(seconds, give_up, aiohttp.SocketTimeoutError())

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def is_stream(self) -> bool:
        return self.response.content_type == "text/event-stream"

    @property
    def retry_after(self) -> float | None:
        value = self.response.headers.get("retry-after", "")
        if value.isdecimal():
            return float(value) if len(value) <= len(str(_LONGEST_WAIT)) else None
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        wait = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
        return wait if 0 < wait <= _LONGEST_WAIT else None

    async def chunks(self, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """The body as it comes, one chunk for what one read brought, of at most `limit` bytes."""
        content = self.response.content
        left = _MOST if limit is None else limit
        try:
            async for chunk in content.iter_any():
                left -= len(chunk)
                if left < 0:
                    raise UpstreamInvalid(f"The upstream '{self.upstream.name}' sent more than {limit or _MOST} bytes.")
                yield chunk
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            # What arrived together with the break is still in aiohttp's buffer, behind its exception.
            content.set_exception(None)  # type: ignore[arg-type]
            if rest := content.read_nowait():
                yield rest
            raise _translated(self.upstream, error, begun=True) from error

    async def read(self, limit: int | None = None) -> bytes:
        """The whole body, of at most `limit` bytes."""
        async with aclosing(self.chunks(limit)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def read_refusal(self) -> bytes:
        """The beginning of an error's body. Nothing more is wanted then."""
        body = bytearray()
        try:
            with suppress(UpstreamError):
                async with aclosing(self.chunks()) as chunks:
                    async for chunk in chunks:
                        body += chunk
                        if len(body) > _MOST_ERROR:
                            break
        finally:
            self.close()
        return bytes(body[:_MOST_ERROR])


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
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return UpstreamUnreachable(f"The upstream '{upstream.name}' has a certificate that is not trusted.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamUnreachable(f"The upstream '{upstream.name}' cannot be reached.")
    if isinstance(error, (ValueError, aiohttp.NonHttpUrlClientError)):
        return UpstreamUnreachable(f"The upstream '{upstream.name}' cannot be asked: its url or a header is not valid.")
    return UpstreamUnreachable(f"The upstream '{upstream.name}' closed the connection without an answer.")
