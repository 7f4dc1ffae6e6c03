"""The backend for chat-completions servers: vLLM, Ollama, llama.cpp, vendors.

All that is chat is in dialects/chat; here is when things happen: what one read brings becomes one batch
of deltas, in portions, so that the first token of a burst need not wait for the last.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from responses_ingress.backends.upstream import Answer, Client, Upstream, parse_json
from responses_ingress.core.deltas import Accepted, Delta, Finish
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatCall, ChatOptions, encode
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.sse import Parser, ServerEvent
from responses_ingress.errors import UpstreamInvalid, UpstreamTimeout, UpstreamTruncated

logger = logging.getLogger(__name__)

_PORTION = 64  # chunks
_DONE = b"[DONE]"

_AFTERMATH = 5.0
"""Seconds that a server may take, after the finish reason, to tell the usage and to end."""

_LISTING = 5.0
"""Seconds that a server may take to list its models."""

_HOSTED = frozenset(
    (
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        *("file_search", "code_interpreter", "image_generation", "mcp", "tool_search"),
        *("computer", "computer_use_preview", "local_shell", "shell", "apply_patch"),
    )
)
"""The hosted tools that are named in the log. Any other type is a client's invention, of any length."""


class ChatBackend:
    """One chat-completions server. `goes_on`: its runs go on when nobody follows them."""

    resumable = False

    def __init__(self, upstream: Upstream, options: ChatOptions, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._upstream = upstream
        self._options = options
        self._client = Client(upstream)
        self._told: set[str] = set()

    @property
    def name(self) -> str:
        return self._upstream.name

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        call = encode(turn, self._options)
        self._tell(call.dropped)
        return self._stream(call, turn.bearer)

    async def _stream(self, call: ChatCall, bearer: str | None) -> AsyncGenerator[Sequence[Delta], None]:
        reader = ChatReader(call.tools)
        answer = await self._client.post("/chat/completions", orjson.dumps(call.body), bearer)
        try:
            if answer.status >= 400:
                raise read_error(answer.status, await answer.read_error(), answer.retry_after)
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

    def _tell(self, dropped: Sequence[str]) -> None:
        """Log each kind of tool that is left out, once: codex sends `web_search` with every request."""
        new = {kind if kind in _HOSTED else "other" for kind in dropped} - self._told
        if new:
            self._told.update(new)
            logger.info("upstream %s has no hosted tools; left out: %s", self.name, ", ".join(sorted(new)))

    async def _read_stream(self, answer: Answer, reader: ChatReader) -> AsyncGenerator[Sequence[Delta], None]:
        parser = Parser()
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    events = parser.feed(chunk)
                    for start in range(0, len(events), _PORTION):
                        deltas, ended = _read_events(events[start : start + _PORTION], reader)
                        if deltas:
                            yield deltas
                        if ended:
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
                listed = await self._client.get_json("/models")
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


def _read_events(events: Sequence[ServerEvent], reader: ChatReader) -> tuple[list[Delta], bool]:
    """The deltas of some chunks, and whether the answer has ended."""
    deltas: list[Delta] = []
    for name, data in events:
        if data == _DONE:
            return [*deltas, *reader.end()], True
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise UpstreamInvalid("The upstream sent a chunk that is not JSON.") from None
        deltas += reader.fail(chunk) if name == "error" else reader.feed(chunk)
        if deltas and isinstance(deltas[-1], Finish):
            return deltas, True
    return deltas, False
