"""An HTTP client that can do what no good client does: send anything, in any pieces, and leave at any moment."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httptools
import orjson


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which always has these four keys and a sentence."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"].endswith((".", "!", "?")), error
        return dict(error)

    @property
    def events(self) -> list[dict[str, Any]]:
        assert self.headers["content-type"].startswith("text/event-stream"), (self.headers, self.body)
        return parse_events(self.body)


class _Parser:
    """Puts an answer together for `Wire`."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""
        self.headers_seen = self.over = False
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.headers_seen = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.over = True


class Wire:
    """One connection; an async context manager."""

    def __init__(self, url: str, *, receive_buffer: int | None = None) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._receive_buffer = receive_buffer
        self._parser = _Parser()

    async def __aenter__(self) -> Self:
        sock = socket.socket()
        sock.setblocking(False)
        if self._receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._address)
        except OSError:
            sock.close()
            raise
        limit = self._receive_buffer or 2**16
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Leave without a word: a reset."""
        sock = self._writer.get_extra_info("socket")
        if not self._writer.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request with a content-length and read its answer."""
        await self.start(method, path, body, headers)
        return await self.answer()

    async def post(self, fields: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """Create a response."""
        return await self.request("POST", "/v1/responses", orjson.dumps(fields), headers)

    async def start(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send a request and do not wait for an answer."""
        given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        await self.send(head(method, path, given) + body)

    async def answer(self) -> Answer:
        """Read the answer to its end."""
        while not self._parser.over:
            await self._read()
        done, self._parser = self._parser, _Parser()
        return Answer(done.parser.get_status_code(), done.headers, done.body)

    async def read_headers(self) -> dict[str, str]:
        """Read on until the answer's headers are there."""
        while not self._parser.headers_seen:
            await self._read()
        return self._parser.headers

    @property
    def status(self) -> int:
        """The answer's status, when its headers are there."""
        return int(self._parser.parser.get_status_code())

    async def read_until(self, text: bytes) -> bytes:
        """Read on until the answer's body holds `text`; gives the body so far."""
        while text not in self._parser.body:
            await self._read()
        return self._parser.body

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body so far, each time that more of it has come, until it is whole. Raises
        `ConnectionError` where the connection ends before."""
        yield self._parser.body
        while not self._parser.over:
            await self._read()
            yield self._parser.body

    async def closed(self) -> None:
        """Wait until the server closes the connection."""
        while await self._reader.read(2**16):
            pass

    async def _read(self) -> None:
        data = await self._reader.read(2**16)
        if not data:
            raise ConnectionError(f"The server closed the connection after {self._parser.body!r}")
        self._parser.parser.feed_data(data)


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """A request's first line and headers."""
    lines = [f"{method} {path} HTTP/1.1", "host: test", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def parse_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a whole event stream; each must be one `event:` line and one `data:` line that agree."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "", "the stream ends inside an event"
    return [event for event in map(_parse_event, blocks) if event is not None]


def _parse_event(block: str) -> dict[str, Any] | None:
    if block.startswith(":"):
        return None
    name, data = block.split("\n")
    event: dict[str, Any] = orjson.loads(data.removeprefix("data: "))
    assert name == f"event: {event['type']}"
    return event
