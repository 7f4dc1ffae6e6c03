"""A scripted chat-completions server for tests: real sockets, scripted answers, a record of every request.

What must stay true: an answer is taken from the script in the order requests arrive, so a run is
deterministic; a request the script does not foresee gets a 500 that says so; nothing here waits for a
time to pass unless the script asks for a pace.

    async with Upstream(Say("hello")) as upstream:
        ...                       # let something call upstream.url + "/chat/completions"
        assert upstream.calls[0].json["messages"] == [...]
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

import httptools
import orjson

Close = Literal["done", "end", "eof", "reset", "silent"]
"""How a stream ends: `done` with `[DONE]`; `end` cleanly without it; `eof` and `reset` by closing the
socket in the middle of the body; `silent` never, until the client leaves."""

_ASKED = frozenset(("/v1/chat/completions", "/v1/messages"))
"""Paths that the script answers."""

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole answer. `hold` keeps it back, headers and all, until the event is set."""

    json: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hold: asyncio.Event | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """An event stream. A chunk is a JSON value (sent as one `data:` event), raw bytes (sent as they are)
    or an `asyncio.Event` (a hold point: what follows waits for it). All that stands between two hold
    points leaves in one write, unless there is a `pace`: seconds after each chunk."""

    chunks: Sequence[Mapping[str, Any] | bytes | asyncio.Event]
    close: Close = "done"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    pace: float = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """The request is read and the connection closed with no byte of an answer: what a client meets that
    writes on a keep-alive connection the server is just closing. `hold` is silence before that."""

    hold: asyncio.Event | None = None


@dataclass(frozen=True, slots=True)
class Say:
    """What a model says, sent as a stream or as one JSON answer, whichever the request asks for."""

    text: str = ""
    calls: Sequence[tuple[str, Any]] = ()
    reasoning: str = ""
    usage: Mapping[str, Any] | None = None
    finish: str | None = None


Answer = Reply | Stream | Drop | Say


@dataclass(slots=True)
class Received:
    """A request as it arrived. `reused`: it is not the first one on its connection; `number`: its place
    among all requests, from 0."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    reused: bool
    number: int = -1
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class Upstream:
    """The server; an async context manager. `requests` holds all requests, `calls` those for an answer of the model."""

    def __init__(self, *answers: Answer, models: Sequence[str] = ("test-model",)) -> None:
        self.models = models
        self.requests: list[Received] = []
        self.connections = 0
        self.answer: Callable[[Received], Answer] | None = None
        self.failures: list[BaseException] = []
        self._script = deque(answers)
        self._arrived = asyncio.Condition()
        self._open: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if error is None and self.failures:
            raise self.failures[0]

    async def stop(self) -> None:
        """Stop listening and drop every connection; `async with` again listens on the same port."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._open):
            connection.abort()
        await asyncio.gather(*(connection.closed.wait() for connection in list(self._open)))
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """The base URL that a client is given."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def calls(self) -> list[Received]:
        return [request for request in self.requests if request.path in _ASKED]

    def script(self, *answers: Answer) -> None:
        """Add answers to the script. `answer`, a function, answers what the script does not."""
        self._script.extend(answers)

    @property
    def unused(self) -> int:
        """How many scripted answers nobody has asked for."""
        return len(self._script)

    async def called(self, count: int) -> Received:
        """Wait until `count` completions were asked for; gives the last of them."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.calls) >= count)
        return self.calls[count - 1]

    async def closed(self, call: int) -> None:
        """Wait until the client of the completion number `call` (from 0) left before its answer was over."""
        await self.calls[call].gone.wait()

    def close_idle(self) -> None:
        """Close every connection that is between two requests, as a server's keep-alive timeout does."""
        for connection in list(self._open):
            connection.close_if_idle()

    # What a connection calls.

    def opened(self, connection: "_Connection") -> int:
        self._open.add(connection)
        self.connections += 1
        return self.connections

    def lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)

    async def take(self, received: Received) -> Answer:
        """Record the request and choose its answer."""
        received.number = len(self.requests)
        self.requests.append(received)
        async with self._arrived:
            self._arrived.notify_all()
        if received.path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        if received.path not in _ASKED:
            return Reply({"error": {"message": f"No such path: {received.path}"}}, status=404)
        if self._script:
            return self._script.popleft()
        if self.answer is not None:
            return self.answer(received)
        return Reply({"error": {"message": "The test's script foresees no such call."}}, status=500)


class _Connection(asyncio.Protocol):
    """One client connection: parses requests, answers them one after another."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._current: Received | None = None
        self._served = 0
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        self._number = self._upstream.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._upstream.failures.append(error)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.lost(self)
        if self._current is not None:
            self._current.gone.set()
        if self._task is not None:
            self._task.cancel()
        self.closed.set()

    def abort(self) -> None:
        self._transport.abort()

    def close_if_idle(self) -> None:
        if self._current is None:
            self._transport.close()

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._path, self._headers, self._body = b"", dict[str, str](), bytearray()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._current = Received(
            method=self._parser.get_method().decode(),
            path=urlsplit(self._path.decode()).path,
            headers=self._headers,
            body=bytes(self._body),
            connection=self._number,
            reused=self._served > 0,
        )
        self._served += 1
        self._task = asyncio.get_running_loop().create_task(self._serve(self._current))

    async def _serve(self, received: Received) -> None:
        try:
            await self._send(render(await self._upstream.take(received), received))
        except Exception as error:  # a mistake of the test's own script must fail the test
            self._upstream.failures.append(error)
            self._transport.abort()
        self._current = None

    async def _send(self, answer: Reply | Stream | Drop) -> None:
        if answer.hold is not None:
            await answer.hold.wait()
        if isinstance(answer, Drop):
            self._current = None
            self._transport.close()
        elif isinstance(answer, Reply):
            self._transport.write(_whole(answer))
        else:
            await self._stream(answer)

    async def _stream(self, answer: Stream) -> None:
        headers = {"content-type": "text/event-stream", **answer.headers, "transfer-encoding": "chunked"}
        pending = [_head(answer.status, headers)]
        for chunk in answer.chunks:
            if not isinstance(chunk, asyncio.Event):
                pending.append(_frame(chunk))
            if isinstance(chunk, asyncio.Event) or answer.pace:
                self._transport.write(b"".join(pending))
                pending.clear()
                await (chunk.wait() if isinstance(chunk, asyncio.Event) else asyncio.sleep(answer.pace))
        if answer.close == "done":
            pending.append(_frame(b"data: [DONE]\n\n"))
        if answer.close in ("done", "end"):
            pending.append(b"0\r\n\r\n")
        self._transport.write(b"".join(pending))
        await self._end(answer.close)

    async def _end(self, close: Close) -> None:
        if close == "silent":
            await self.closed.wait()
        elif close in ("eof", "reset"):
            self._current = None  # it is not the client that leaves
            if close == "reset":
                self._linger_zero()
            self._transport.close()

    def _linger_zero(self) -> None:
        """Make the close that follows send a RST instead of a FIN."""
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _whole(answer: Reply) -> bytes:
    body = orjson.dumps(answer.json) if answer.body is None else answer.body
    headers = {"content-type": "application/json", "content-length": str(len(body)), **answer.headers}
    return _head(answer.status, headers) + body


def _frame(chunk: Mapping[str, Any] | bytes) -> bytes:
    data = chunk if isinstance(chunk, bytes) else b"data: " + orjson.dumps(chunk) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


# What a model says, as chat-completions JSON.


def render(answer: Answer, received: Received) -> Reply | Stream | Drop:
    """A `Say` in the form its request asks for; any other answer as it is."""
    if not isinstance(answer, Say):
        return answer
    body = received.json
    if not body.get("stream"):
        return Reply(completion(answer, body["model"], turn=received.number))
    said = answer.usage or usage(10, 5)
    if not (body.get("stream_options") or {}).get("include_usage"):
        return Stream(chunks(answer, received.number))
    return Stream([*chunks(answer, received.number), {**chunk(), "choices": [], "usage": said}])


def completion(say: Say, model: str = "test-model", *, turn: int = 0) -> dict[str, Any]:
    """A whole chat completion. `turn` makes its call ids unlike those of other turns."""
    message: dict[str, Any] = {"role": "assistant", "content": say.text or None}
    if say.reasoning:
        message["reasoning_content"] = say.reasoning
    if say.calls:
        message["tool_calls"] = [_call(turn, at, name, arguments) for at, (name, arguments) in enumerate(say.calls)]
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": _finish(say)}],
        "usage": say.usage or usage(10, 5),
    }


def chunks(say: Say, turn: int = 0) -> list[dict[str, Any]]:
    """The same as stream chunks, one word or piece of a call in each; no usage chunk."""
    said = [chunk({"role": "assistant", "content": ""})]
    said += [chunk({"reasoning_content": word}) for word in words(say.reasoning)]
    said += [chunk({"content": word}) for word in words(say.text)]
    for at, (name, arguments) in enumerate(say.calls):
        said += call_chunks(name, arguments, turn=turn, index=at)
    return [*said, chunk(finish=_finish(say))]


def chunk(delta: Mapping[str, Any] | None = None, *, finish: str | None = None) -> dict[str, Any]:
    """One stream chunk."""
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "test-model",
        "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}],
    }


def call_chunks(name: str, arguments: Any, *, turn: int = 0, index: int = 0, size: int = 7) -> list[dict[str, Any]]:
    """A tool call in pieces: its name first, then its arguments `size` characters at a time."""
    call = _call(turn, index, name, arguments)
    text = call["function"]["arguments"]
    head = {**call, "index": index, "function": {"name": name, "arguments": ""}}
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    tail = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [chunk({"tool_calls": [part]}) for part in (head, *tail)]


def usage(prompt: int, completion: int, *, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    """A usage object of the chat form."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def words(text: str) -> list[str]:
    """`text` in words, each with the space that follows it; joined they are `text` again."""
    return [word + " " for word in text.split(" ")[:-1]] + [word for word in text.split(" ")[-1:] if word]


def _call(turn: int, index: int, name: str, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return {"id": f"call_{turn}_{index}", "type": "function", "function": {"name": name, "arguments": text}}


def _finish(say: Say) -> str:
    return say.finish or ("tool_calls" if say.calls else "stop")
