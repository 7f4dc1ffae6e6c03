"""The benchmark's model: a chat-completions server so cheap that it never is what is measured.

The model name chooses the answer; bodies are searched, never parsed, and every answer but `chain`'s is
made once, at start. Prints its port on standard output and runs until it is killed.

    small   a short answer, not streamed
    chain   not streamed; says how many messages the request held
    paced   200 text chunks, one each 5 ms; the first with the headers, the end with the last
    talk    400 text chunks, one each 10 ms
    burst   200 text chunks in one write
    burst50 50 text chunks in one write
    long    5,000 text chunks in one write
    silent  one text chunk, then nothing
    late…   the first request that names this model is never answered, every later one at once
"""

import asyncio
import sys
from typing import Any, cast

import httptools
import orjson
import uvloop

SMALL_TEXT = "The capital of France is Paris."
SILENT_TEXT = "tok0 "
PACED_CHUNKS = 200
TALK_CHUNKS = 400
LONG_CHUNKS = 5_000


def streamed_text(chunks: int) -> str:
    """What a stream of so many text chunks says."""
    return "".join(_words(chunks))


def _words(chunks: int) -> list[str]:
    return [f"tok{at} " for at in range(chunks)]


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "bench",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_END = _event(_chunk({}, "stop")) + _event({**_chunk({}), "choices": [], "usage": _USAGE}) + b"data: [DONE]\n\n"


def _stream_events(chunks: int) -> list[bytes]:
    first, *rest = [_event(_chunk({"content": word})) for word in _words(chunks)]
    return [_event(_chunk({"role": "assistant", "content": ""})) + first, *rest]


def _burst(chunks: int) -> bytes:
    return _STREAM_HEAD + _frame(b"".join(_stream_events(chunks)) + _END) + b"0\r\n\r\n"


def _paced(chunks: int) -> list[bytes]:
    *start, last = _stream_events(chunks)
    writes = [*map(_frame, start), _frame(last + _END) + b"0\r\n\r\n"]
    return [_STREAM_HEAD + writes[0], *writes[1:]]


def _whole(text: str) -> bytes:
    body = orjson.dumps(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "bench",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": _USAGE,
        }
    )
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


_PACED = {b"paced": (0.005, _paced(PACED_CHUNKS)), b"talk": (0.010, _paced(TALK_CHUNKS))}
_ANSWERS = {
    b"small": _whole(SMALL_TEXT),
    b"burst": _burst(200),
    b"burst50": _burst(50),
    b"long": _burst(LONG_CHUNKS),
    b"silent": _STREAM_HEAD + _frame(_stream_events(1)[0]),
}


_late: set[bytes] = set()  # models that one request has named


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        model = _model(body)
        if model in _PACED:
            self._pace(*_PACED[model], 0, self._loop.time())
        elif model.startswith(b"late") and model not in _late:
            _late.add(model)
        elif model == b"chain":
            messages = body.count(b'"role"')
            self._transport.write(_whole(f"{messages} messages"))
        else:
            self._transport.write(_ANSWERS.get(model, _ANSWERS[b"small"]))

    def _pace(self, pause: float, writes: list[bytes], at: int, start: float) -> None:
        self._transport.write(writes[at])
        if at + 1 < len(writes):
            self._timer = self._loop.call_at(start + (at + 1) * pause, self._pace, pause, writes, at + 1, start)


def _model(body: bytes) -> bytes:
    """The value of the first `"model"` key."""
    start = body.index(b'"', body.index(b":", body.index(b'"model"'))) + 1
    return body[start : body.index(b'"', start)]


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    sys.exit(uvloop.run(_serve()))
