"""One HTTP exchange: what a client sent, and the ways to answer it.

What must stay true: a body is read, unpacked and parsed under limits; every error leaves as the one
error object; every answer carries `x-request-id`. It must not know what the request is about.
"""

import gzip
import io
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import orjson
import zstandard
from starlette.types import Receive, Scope, Send

from responses_ingress.errors import BodyTooLarge, IngressError, InternalError, InvalidRequest, UnsupportedParameter

logger = logging.getLogger(__name__)

_CONTENT_TYPE, _JSON = b"content-type", b"application/json"
_MOST_VALUES = 1_000_000  # of a body's JSON: parsed, even an empty object takes 70 bytes
_FEW_BYTES = 1_000_000  # cannot hold so many values, or not at a price that matters
_MARGIN = 8  # levels of nesting that we put around a client's JSON when we store or forward it


@dataclass(slots=True)
class Exchange:
    """A request and its answer."""

    scope: Scope
    receive: Receive
    send: Send
    request_id: str
    headers: Mapping[str, str]
    extra_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    answered: bool = False

    @property
    def path_params(self) -> Mapping[str, str]:
        params: Mapping[str, str] = self.scope.get("path_params", {})
        return params

    def query(self) -> Mapping[str, list[str]]:
        return parse_qs(self.scope["query_string"].decode("latin-1"), keep_blank_values=True)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.answered = True
        headers = [(b"x-request-id", self.request_id.encode()), *self.extra_headers, *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, value: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """Answer with `value` as JSON."""
        await self.reply_bytes(orjson.dumps(value), _JSON, status, headers)

    async def reply_bytes(
        self, body: bytes, content_type: bytes, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [(_CONTENT_TYPE, content_type), length, *(headers or ())])
        await self.write(body, more=False)

    async def refuse(self, error: IngressError) -> None:
        """Answer with an error."""
        headers = []
        if error.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
        await self.reply(error.body(), error.status, headers)

    async def disconnected(self) -> None:
        """Return when the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


Handler = Callable[[Exchange], Awaitable[None]]


def decode_headers(raw: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header names in lower case; where one comes twice, the first counts. Values are UTF-8, or else Latin-1."""
    headers: dict[str, str] = {}
    for name, value in raw:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        headers.setdefault(name.decode("latin-1"), text)
    return headers


async def answer(exchange: Exchange, handler: Handler) -> None:
    """Let `handler` answer, and answer for it when it raises. The web edge's broad `except`."""
    try:
        await handler(exchange)
    except IngressError as error:
        await _refuse_if_possible(exchange, error)
    except Exception as error:
        logger.exception("request %s failed", exchange.request_id)
        await _refuse_if_possible(exchange, InternalError(f"The server failed ({type(error).__name__})."))


async def _refuse_if_possible(exchange: Exchange, error: IngressError) -> None:
    if not exchange.answered:
        await exchange.refuse(error)


async def read_json(exchange: Exchange, limit: int) -> tuple[Any, bytes]:
    """The parsed body, of at most `limit` bytes as sent and unpacked, and its bytes."""
    body = await _read_body(exchange, limit)
    encoding = exchange.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        body = _unpack(body, encoding, limit)
    if len(body) > _FEW_BYTES:
        _check_values(body)
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {_position(error)}.") from None
    _check_depth(parsed)
    return parsed, body


def _position(error: orjson.JSONDecodeError) -> str:
    return f"line {error.lineno}, column {error.colno}"


async def _read_body(exchange: Exchange, limit: int) -> bytes:
    declared = exchange.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The client left before its request was complete.")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the limit of {limit} bytes.")


def _unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """`body` decompressed, reading no further than the limit."""
    if encoding not in ("gzip", "zstd"):
        raise UnsupportedParameter(f"Unsupported content-encoding '{encoding[:40]}': use gzip, zstd or none.")
    try:
        with _reader(body, encoding) as reader:
            unpacked: bytes = reader.read(limit + 1)
    except (zstandard.ZstdError, OSError, EOFError, zlib.error):
        raise InvalidRequest(f"The request body is not valid {encoding}.") from None
    if len(unpacked) > limit:
        raise _too_large(limit)
    return unpacked


def _reader(body: bytes, encoding: str) -> Any:
    source = io.BytesIO(body)
    if encoding == "gzip":
        return gzip.GzipFile(fileobj=source)
    return zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)


def _check_values(body: bytes) -> None:
    """Refuse JSON of more values than a request needs: packed into 6 kB, they can take 2 GB and seconds of
    everybody's time. Signs inside of strings count too, which costs a tenth of what it would take to know."""
    if len(body) - len(body.translate(None, b",{[")) > _MOST_VALUES:  # faster than to count thrice
        raise BodyTooLarge(
            f"The request body holds too many values: at most {_MOST_VALUES} commas, braces and brackets are allowed."
        )


def _check_depth(parsed: Any) -> None:
    """Refuse JSON that could be parsed but not written again: orjson writes 254 levels. Encoding it is the
    cheapest way to know (65 µs for 91 kB)."""
    wrapped = parsed
    for _ in range(_MARGIN):
        wrapped = [wrapped]
    try:
        orjson.dumps(wrapped)
    except orjson.JSONEncodeError:
        raise InvalidRequest("The request body is nested too deeply, or holds text that is no Unicode.") from None
