"""What every backend does with an answer of its upstream: read it as it comes, tell of it, leave it.

What one read brings becomes one batch of deltas, in portions, so that the first token of a burst need not
wait for the last. What must stay true: however the iteration ends, the answer's connection is kept or
closed; how a connection ends does not matter once all has been said. It must not know any dialect.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import orjson

from responses_ingress.backends.upstream import Answer, Client, parse_json
from responses_ingress.core.deltas import Accepted, Delta
from responses_ingress.dialects.sse import Parser, ServerEvent
from responses_ingress.errors import UpstreamError, UpstreamInvalid, UpstreamTimeout, UpstreamTruncated

logger = logging.getLogger(__name__)

_PORTION = 64  # events
_DONE = b"[DONE]"

_AFTERMATH = 5.0
"""Seconds that a server may take, after its finish reason, to tell the usage and to end."""

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


class Reader(Protocol):
    """A dialect's reader of one answer."""

    @property
    def finished(self) -> bool:
        """Whether all has been said that is to be said, but for the usage."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the `Finish` was given."""
        ...

    def end(self) -> list[Delta]:
        """The stream is over. Raises `UpstreamTruncated` where the answer is not."""
        ...

    def read_json(self, body: Any) -> list[Delta]:
        """A whole answer."""
        ...


Step = Callable[[str | None, Any], list[Delta]]
"""The deltas of one event of a stream: its name, where it has one, and its data, which was JSON."""


async def deltas_of(answer: Answer, reader: Reader, step: Step) -> AsyncGenerator[Sequence[Delta], None]:
    """The deltas of an answer that is no refusal, streamed or whole. It is closed in the end."""
    try:
        if not answer.is_stream:
            yield [Accepted(), *reader.read_json(parse_json(answer.upstream, await answer.read()))]
            return
        yield [Accepted()]
        async with aclosing(_streamed(answer, reader, step)) as batches:
            async for deltas in batches:
                yield deltas
    finally:
        if reader.ended:
            answer.leave()
        else:
            answer.close()


async def _streamed(answer: Answer, reader: Reader, step: Step) -> AsyncGenerator[Sequence[Delta], None]:
    parser = Parser()
    try:
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                events = parser.feed(chunk)
                for start in range(0, len(events), _PORTION):
                    deltas, fault = _read(events[start : start + _PORTION], reader, step)
                    if deltas:
                        yield deltas
                    if fault is not None:
                        raise fault
                    if reader.ended:
                        return
                    if start + _PORTION < len(events):
                        await asyncio.sleep(0)
                if reader.finished:
                    answer.hurry(_AFTERMATH)
    except (UpstreamTruncated, UpstreamTimeout):
        if not reader.finished:
            raise
    yield reader.end()


def _read(events: Sequence[ServerEvent], reader: Reader, step: Step) -> tuple[list[Delta], UpstreamError | None]:
    """The deltas of some events, and what is wrong with the one behind them: what was said before it stays said."""
    deltas: list[Delta] = []
    for name, data in events:
        try:
            deltas += reader.end() if data == _DONE else step(name, orjson.loads(data))
        except orjson.JSONDecodeError:
            return deltas, UpstreamInvalid("The upstream sent an event that is not JSON.")
        except UpstreamError as fault:
            return deltas, fault
        if reader.ended:
            break
    return deltas, None


async def model_names(client: Client, path: str = "/models") -> Sequence[str]:
    """The models that the upstream lists."""
    name = client.upstream.name
    try:
        async with asyncio.timeout(_LISTING):
            listed = await client.get_json(path)
    except TimeoutError:
        raise UpstreamTimeout(f"The upstream '{name}' took too long to list its models.") from None
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list):
        raise UpstreamInvalid(f"The upstream '{name}' does not list its models.")
    return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


class LeftOut:
    """Tells in the log what an upstream cannot take, each kind once: codex sends `web_search` with every request."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._told: set[str] = set()

    def tell(self, tools: Iterable[str], *more: str) -> None:
        """`tools` are types of hosted tools."""
        kinds = {f"hosted tool {type}" if type in _HOSTED else "other tools" for type in tools}
        new = (kinds | set(more)) - self._told
        if new:
            self._told |= new
            logger.info("upstream %s cannot take, so that it is left out: %s", self._upstream, ", ".join(sorted(new)))
