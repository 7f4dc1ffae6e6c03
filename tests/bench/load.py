"""The benchmark's load generator: one job, read as JSON from standard input; its result, as JSON, on
standard output.

Every answer is checked, as cheaply as a check can be: status, one terminal event and it the last,
sequence numbers without a gap, the exact text. A job in which anything is wrong says so in `errors`.
"""

import asyncio
import re
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, cast

import httptools
import orjson
import uvloop

ANSWER_TIMEOUT = 60.0
_SEQUENCE = re.compile(rb'"sequence_number":(\d+)')
_DELTA = re.compile(rb'"delta":"([^"]*)"')
_CONTENT = re.compile(rb'"content":"([^"]*)"')
_RESPONSE_ID = re.compile(rb'"id":"(resp_[^"]+)"')
_TERMINAL = re.compile(rb"event: response\.(?:completed|failed|incomplete)\n")


@dataclass(frozen=True, slots=True)
class Job:
    """What to do.

    kind:        `load`: `turns` equal requests, `concurrency` at a time; `chain`: `turns` requests, each
                 naming the one before; `hold`: open `turns` streams and keep them until a line comes in;
                 `queue`: `load` of background responses; `follow`: one stream, and `turns` more who follow it
                 by its id, through the port `follow`.
    get:         the id, and the query, of a response to be got instead of made.
    after:       number of the last event that the one who gets it has seen.
    api:         `responses`, or `chat` to ask the upstream itself.
    text:        the text every answer must hold.
    new_threads: give each request a thread of its own by header.
    counts:      say which try it is, as the SDKs do.
    database:    for `chain`: the SQLite file to measure after every 50 turns.
    """

    kind: Literal["load", "chain", "hold", "queue", "follow"]
    port: int
    body: str
    turns: int
    text: str
    concurrency: int = 1
    stream: bool = False
    api: Literal["responses", "chat"] = "responses"
    new_threads: bool = False
    counts: bool = False
    database: str | None = None
    get: str = ""
    after: int = -1
    follow: int = 0


@dataclass(slots=True)
class Result:
    """What came of it. Times are milliseconds; `first` is the time to the first text of a stream, `ids` are
    those of the responses that `queue` and `follow` made."""

    turns: int = 0
    ids: list[str] = field(default_factory=list)
    seconds: float = 0
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    database_bytes: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    status: int
    body: bytes
    total: float
    first: float


class Connection(asyncio.Protocol):
    """A client connection; one request at a time."""

    def __init__(self, first_text: bytes) -> None:
        self._first_text = first_text
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._first = 0.0
        self._answer: asyncio.Future[Answer] | None = None
        self.opened: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self._answer = asyncio.get_running_loop().create_future()
        self._parts.clear()
        self._first = 0.0
        self._start = time.perf_counter()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        for waiter in (self._answer, self.opened):
            if waiter is not None and not waiter.done():
                waiter.set_exception(ConnectionError("the server closed the connection"))
                waiter.exception()  # whoever waits still gets it; nobody waiting is no news

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        if not self._first and self._first_text in body:
            self._first = time.perf_counter()
            if not self.opened.done():
                self.opened.set_result(self._first)

    @property
    def so_far(self) -> bytes:
        """What has come of the answer."""
        return b"".join(self._parts)

    def on_message_complete(self) -> None:
        if self._answer is None or self._answer.done():
            return
        end = time.perf_counter()
        self._answer.set_result(
            Answer(
                self._parser.get_status_code(),
                b"".join(self._parts),
                (end - self._start) * 1000,
                ((self._first or end) - self._start) * 1000,
            )
        )


class Load:
    """Runs one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._result = Result()
        self._text = job.text.encode()

    async def run(self) -> Result:
        start = time.perf_counter()
        if self._job.kind == "chain":
            await self._chain()
        elif self._job.kind == "hold":
            await self._hold()
        elif self._job.kind == "follow":
            await self._follow()
        else:
            await self._load()
        self._result.seconds = time.perf_counter() - start
        return self._result

    async def _load(self) -> None:
        todo = iter(range(self._job.turns))
        await asyncio.gather(*(self._work(todo) for _ in range(self._job.concurrency)))

    async def _work(self, todo: Iterator[int]) -> None:
        body = self._job.body.encode()
        request = _request(self._job, body)
        connection = await self._connect()
        for _ in todo:
            if self._job.new_threads:
                request = _request(self._job, body, {"thread-id": str(uuid.uuid4())})
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    answer = await connection.ask(request)
            except (ConnectionError, TimeoutError) as error:
                self._fail(repr(error))
                connection = await self._connect()
                continue
            self._record(answer, self._text)

    async def _chain(self) -> None:
        connection = await self._connect()
        base = orjson.loads(self._job.body)
        for turn in range(self._job.turns):
            answer = await connection.ask(_request(self._job, orjson.dumps(base)))
            # Every earlier turn put its question and its answer upstream, and this one its question.
            self._record(answer, b"%d messages" % (2 * turn + 1))
            made = _RESPONSE_ID.search(answer.body)
            if made is None:
                self._fail("no response id in the answer")
                return
            base["previous_response_id"] = made[1].decode()
            if self._job.database is not None and (turn + 1) % 50 == 0:
                self._result.database_bytes.append(database_size(self._job.database))

    async def _hold(self) -> None:
        """Open the streams, say how long it took, keep them until a line comes in."""
        request = _request(self._job, self._job.body.encode())
        start = time.perf_counter()
        connections = await asyncio.gather(*(self._open(request) for _ in range(self._job.turns)))
        for opened in await asyncio.gather(*(c.opened for c in connections), return_exceptions=True):
            if isinstance(opened, BaseException):
                self._fail(repr(opened))
        self._result.turns = len(connections)
        self._result.latency.append((time.perf_counter() - start) * 1000)
        print(orjson.dumps(asdict(self._result)).decode(), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        for connection in connections:
            connection.transport.abort()

    async def _open(self, request: bytes) -> Connection:
        connection = await self._connect()
        connection.ask(request)
        return connection

    async def _follow(self) -> None:
        """One stream from its beginning, and the others as soon as its id is known."""
        run = await self._connect()
        ended = run.ask(_request(self._job, self._job.body.encode()))
        await run.opened
        made = _RESPONSE_ID.search(run.so_far)
        assert made is not None, "the first event holds the id"
        self._result.ids.append(made[1].decode())
        request = _request(replace(self._job, get=f"{made[1].decode()}?stream=true"), b"")
        others = await asyncio.gather(*(self._connect(self._job.follow) for _ in range(self._job.turns)))
        for answer in await asyncio.gather(ended, *(one.ask(request) for one in others)):
            self._record(answer, self._text)

    async def _connect(self, port: int | None = None) -> Connection:
        first = b"response.output_text.delta" if self._job.api == "responses" else b'"content":"tok'
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(first), "127.0.0.1", port or self._job.port)
        return connection

    def _record(self, answer: Answer, text: bytes) -> None:
        self._result.turns += 1
        made = _RESPONSE_ID.search(answer.body) if self._job.kind == "queue" else None
        if made is not None:
            self._result.ids.append(made[1].decode())
        self._result.latency.append(answer.total)
        if self._job.stream:
            self._result.first.append(answer.first)
        wrong = _check(self._job, answer, text)
        if wrong:
            self._fail(wrong)

    def _fail(self, what: str) -> None:
        self._result.errors.append(what)


def _request(job: Job, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    path = "/v1/responses" if job.api == "responses" else "/v1/chat/completions"
    lines = [
        f"GET {path}/{job.get} HTTP/1.1" if job.get else f"POST {path} HTTP/1.1",
        f"host: 127.0.0.1:{job.port}",
        "content-type: application/json",
        "authorization: Bearer bench",
        f"content-length: {len(body)}",
        *(["x-stainless-retry-count: 0"] if job.counts else []),
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _check(job: Job, answer: Answer, text: bytes) -> str | None:
    """What is wrong with the answer, or None."""
    if answer.status != 200:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if job.api == "chat":
        return None if not job.stream or b"".join(_CONTENT.findall(answer.body)) == text else "wrong text"
    if job.kind == "queue":
        good = b'"background":true' in answer.body and _RESPONSE_ID.search(answer.body) is not None
        return None if good else f"wrong answer: {answer.body[:300]!r}"
    if not job.stream:
        good = b'"status":"completed"' in answer.body and b'"text":"%b"' % text in answer.body
        return None if good else f"wrong answer: {answer.body[:300]!r}"
    return _check_stream(answer.body, text, job.after + 1)


def _check_stream(body: bytes, text: bytes, first: int) -> str | None:
    terminals = list(_TERMINAL.finditer(body))
    if len(terminals) != 1:
        return f"{len(terminals)} terminal events"
    if body.find(b"\n\n", terminals[0].start()) != len(body) - 2:
        return "something follows the terminal event"
    if not body.startswith(b"completed", terminals[0].start() + len("event: response.")):
        return f"not completed: {body[terminals[0].start() :][:600]!r}"
    numbers = [int(number) for number in _SEQUENCE.findall(body)]
    if numbers != list(range(first, first + len(numbers))):
        return "sequence numbers have gaps"
    if b"".join(_DELTA.findall(body)) != text:
        return "the deltas are not the text"
    return None


def database_size(path: str) -> int:
    """Bytes of the SQLite file once its write-ahead log has been moved into it."""
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages) * int(size)


async def _main() -> None:
    job = Job(**orjson.loads(sys.stdin.readline()))
    result = await Load(job).run()
    if job.kind != "hold":
        print(orjson.dumps(asdict(result)).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
