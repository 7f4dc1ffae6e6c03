"""The backend for servers of the Anthropic Messages API.

All that is of that API is in dialects/messages; here is when things happen, as in backends/chat: what one
read brings becomes one batch of deltas, in portions. A request that is refused because of the earlier
thinking in it is asked once more without: a key, a model or the instructions may have changed since.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from responses_ingress.backends.chat import HOSTED
from responses_ingress.backends.upstream import Answer, Client, Upstream, parse_json
from responses_ingress.core.deltas import Accepted, Delta, Finish
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.messages import MessagesCall, MessagesOptions, encode, refuses_thinking
from responses_ingress.dialects.messages_reader import MessagesReader
from responses_ingress.dialects.sse import Parser, ServerEvent
from responses_ingress.errors import UpstreamInvalid, UpstreamTimeout, UpstreamTruncated

logger = logging.getLogger(__name__)

_VERSION = ("anthropic-version", "2023-06-01")

_PORTION = 64  # events

_AFTERMATH = 5.0
"""Seconds that a server may take to end after the stop reason."""

_LISTING = 5.0
"""Seconds that a server may take to list its models."""


class MessagesBackend:
    """One server of the Messages API. `goes_on`: its runs go on when nobody follows them."""

    resumable = False

    def __init__(self, upstream: Upstream, options: MessagesOptions, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._upstream = _versioned(upstream)
        self._options = options
        self._client = Client(self._upstream)
        self._told: set[str] = set()

    @property
    def name(self) -> str:
        return self._upstream.name

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        call = encode(turn, self._options, self.name)
        self._tell(call)
        return self._stream(turn, call)

    async def _stream(self, turn: Turn, call: MessagesCall) -> AsyncGenerator[Sequence[Delta], None]:
        reader = MessagesReader(call.tools, self.name, summarized=call.summarized)
        answer = await self._ask(turn, call)
        try:
            if not answer.is_stream:
                yield [Accepted(), *reader.read_json(parse_json(self._upstream, await answer.read()))]
                return
            yield [Accepted()]
            async with aclosing(self._read_stream(answer, reader)) as batches:
                async for deltas in batches:
                    yield deltas
        finally:
            if reader.ended:
                answer.leave()
            else:
                answer.close()

    async def _ask(self, turn: Turn, call: MessagesCall) -> Answer:
        """The answer to the call, or to the call without earlier thinking. Raises what the upstream refuses."""
        answer = await self._client.post("/messages", orjson.dumps(call.body), turn.bearer)
        if answer.status < 400:
            return answer
        try:
            body = await answer.read_error()
        finally:
            answer.close()
        if call.recalls and refuses_thinking(answer.status, body):
            logger.info("upstream %s refuses its earlier thinking and is asked again without", self.name)
            return await self._ask(turn, encode(turn, self._options, self.name, recall=False))
        raise read_error(answer.status, body, answer.retry_after)

    def _tell(self, call: MessagesCall) -> None:
        """Log each kind of thing that is left out, once: codex sends `web_search` with every request."""
        left_out = {f"hosted tool {kind}" if kind in HOSTED else "other tools" for kind in call.dropped}
        if call.foreign:
            left_out.add("reasoning of other backends")
        new = left_out - self._told
        if new:
            self._told.update(new)
            logger.info("upstream %s cannot take, so that it is left out: %s", self.name, ", ".join(sorted(new)))

    async def _read_stream(self, answer: Answer, reader: MessagesReader) -> AsyncGenerator[Sequence[Delta], None]:
        parser = Parser()
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    events = parser.feed(chunk)
                    for start in range(0, len(events), _PORTION):
                        deltas = _read_events(events[start : start + _PORTION], reader)
                        if deltas:
                            yield deltas
                        if reader.ended:
                            return
                        if start + _PORTION < len(events):
                            await asyncio.sleep(0)
                    if reader.finished:
                        answer.hurry(_AFTERMATH)
        except (UpstreamTruncated, UpstreamTimeout):
            # All that was to be said has been said: how the connection ends does not matter.
            if not reader.finished:
                raise
        yield reader.end()

    async def models(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(_LISTING):
                # Without a limit there are 20 on a page.
                listed = await self._client.get_json("/models?limit=1000")
        except TimeoutError:
            raise UpstreamTimeout(f"The upstream '{self.name}' took too long to list its models.") from None
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise UpstreamInvalid(f"The upstream '{self.name}' does not list its models.")
        return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        pass

    async def close(self) -> None:
        await self._client.close()


def _versioned(upstream: Upstream) -> Upstream:
    """The upstream with the header that the API demands, unless the operator has set it."""
    name, version = _VERSION
    if any(header.lower() == name for header in upstream.headers):
        return upstream
    return replace(upstream, headers={name: version, **upstream.headers})


def _read_events(events: Sequence[ServerEvent], reader: MessagesReader) -> list[Delta]:
    deltas: list[Delta] = []
    for name, data in events:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise UpstreamInvalid("The upstream sent an event that is not JSON.") from None
        deltas += reader.fail(event) if name == "error" else reader.feed(event)
        if deltas and isinstance(deltas[-1], Finish):
            break
    return deltas
