"""A run's answer on the wire: an event stream or a JSON object.

What must stay true: nothing is decided here; a client that leaves only stops following; what one wake-up
brings goes out in one write, up to a cap; a failure is an HTTP status as long as it can be one.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from responses_ingress.dialects.sse import frame
from responses_ingress.errors import Cancelled
from responses_ingress.runs.feed import Follower
from responses_ingress.runs.run import Run
from responses_ingress.runs.tail import Tail
from responses_ingress.web.callers import is_codex
from responses_ingress.web.exchange import Exchange

_MOST_EVENTS = 64  # per write, so that the first token does not wait for the last
_WATCH_AFTER = 0.1  # seconds
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = b": keep-alive\n\n"
_KEEPALIVE = frame("keepalive", b'{"type":"keepalive"}')


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """accept_wait: seconds that headers wait for the backend. keepalive: seconds of silence at most.
    done: end streams with `[DONE]`."""

    accept_wait: float = 0.15
    keepalive: float = 15.0
    done: bool = False


@contextmanager
def following(exchange: Exchange, run: Run | Tail, first: int = 0) -> Iterator[Follower]:
    """Follow `run` from an event on, until the block ends or the client leaves.

    Only a task can watch for a client's leaving. A turn that is over before `_WATCH_AFTER` does without.
    """
    watches: list[asyncio.Task[None]] = []
    with run.follow(first) as follower:
        timer = asyncio.get_running_loop().call_later(
            _WATCH_AFTER, lambda: watches.append(asyncio.create_task(_leave_with(exchange, follower)))
        )
        try:
            yield follower
        finally:
            timer.cancel()
            for watch in watches:
                watch.cancel()


async def _leave_with(exchange: Exchange, follower: Follower) -> None:
    await exchange.disconnected()
    follower.leave()


async def reply_json(exchange: Exchange, run: Run | Tail) -> None:
    """The whole response when it has ended. A failed one is an HTTP error; one cancelled is a response."""
    with following(exchange, run) as follower:
        await follower.end()
    if not run.ended.done():
        return  # the client left
    failure = run.failure()
    if failure is not None and not isinstance(failure, Cancelled):
        raise failure
    await exchange.reply(run.response())


async def reply_stream(exchange: Exchange, run: Run | Tail, options: StreamOptions, first: int = 0) -> None:
    """The run's events from the number `first` on, as they come. What the backend refuses at once is an HTTP
    error."""
    with following(exchange, run, first) as follower:
        await asyncio.wait((run.accepted,), timeout=options.accept_wait)
        refused = run.refusal()
        if refused is not None:
            raise refused
        await exchange.start(200, _STREAM_HEADERS)
        await _stream(exchange, run, follower, options)


async def _stream(exchange: Exchange, run: Run | Tail, follower: Follower, options: StreamOptions) -> None:
    """A stream that is cut short, because another process goes on with the run, is not ended either: the client
    must not take it for whole."""
    loop = asyncio.get_running_loop()
    silence = _KEEPALIVE if is_codex(exchange.headers) else _COMMENT
    last = loop.time()
    tick = options.keepalive / 3
    with _ticking(follower, tick):
        while not follower.done:
            events = await follower.next(_MOST_EVENTS)
            if events:
                await exchange.write(b"".join([frame(event.type, event.data) for event in events]))
            elif not follower.done and loop.time() - last >= options.keepalive - tick:
                await exchange.write(silence)
            else:
                continue
            last = loop.time()
    lost = follower.lost
    if lost is not None and lost.type == "response.failed":
        # The client has seen events that a crash took away; the end that followed has a number below theirs.
        await exchange.write(frame(lost.type, lost.data))
    if not follower.left and not run.cut:
        await exchange.write(b"data: [DONE]\n\n" if options.done else b"", more=False)


@contextmanager
def _ticking(follower: Follower, interval: float) -> Iterator[None]:
    """Wake the follower every `interval` seconds: one timer a stream, none per event."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def tick() -> None:
        follower.wake()
        timers[:] = [loop.call_later(interval, tick)]

    timers.append(loop.call_later(interval, tick))
    try:
        yield
    finally:
        timers[0].cancel()
