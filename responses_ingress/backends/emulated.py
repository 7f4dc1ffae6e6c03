"""Tools for a backend whose upstream may have none.

What must stay true: a turn without tools reaches the backend unchanged; a request is made again only where it
was refused before anything of its answer came, and once; what a client sees of a turn whose tools are emulated
is what it would see of native ones. Knows nothing of what the backend is.
"""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from time import time
from typing import Any, Literal

from responses_ingress.backends.base import Backend
from responses_ingress.backends.exchange import LeftOut
from responses_ingress.core.deltas import Delta, Remember
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.emulation import Emulated, emulate, refuses_tools
from responses_ingress.dialects.text_calls import TextCalls
from responses_ingress.dialects.tools import Tool
from responses_ingress.errors import InvalidRequest, UpstreamError
from responses_ingress.ids import Clock

logger = logging.getLogger(__name__)

ToolMode = Literal["auto", "native", "emulated"]
"""How a model gets its tools: natively until its upstream refuses them, always natively, never."""

_KEPT = 3600.0
"""Seconds for which a refusal is remembered: the upstream may be started anew with another model or flag."""

_MOST = 256
"""Models remembered: where a route passes on any name, a client could name ever new ones."""

_MARK = "emulated_tools"
"""In what is remembered of a turn: its answer holds calls as text, of these tools."""


class EmulatedTools:
    """`inner`, with tools for the models it has none for."""

    def __init__(self, inner: Backend, mode: ToolMode = "auto", clock: Clock = time) -> None:
        self._inner = inner
        self._mode = mode
        self._clock = clock
        self._left_out = LeftOut(inner.name)
        self._until: dict[str, float] = {}
        """Until when a model's tools are emulated, the model that was remembered last at the end."""

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def resumable(self) -> bool:
        return self._inner.resumable

    @property
    def goes_on(self) -> bool:
        return self._inner.goes_on

    def tool_mode(self, model: str) -> Literal["native", "emulated"]:
        """How the next turn of `model` will get its tools."""
        if self._mode != "auto":
            return self._mode
        return "emulated" if self._until.get(model, 0.0) > self._clock() else "native"

    @property
    def without_tools(self) -> list[str]:
        """The models whose upstream has said that it has no tools for them."""
        now = self._clock()
        return [model for model, until in self._until.items() if until > now]

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        mark = (turn.resume or {}).get(_MARK)
        turn = replace(turn, memory=_unmarked(turn.memory), resume=_unmarked(turn.resume))
        if mark is not None:
            return _told(self._inner.stream(_as_asked(turn)), TextCalls(_unpacked(mark)), mark)
        if turn.resume is None and self.tool_mode(turn.model) == "emulated":
            emulated = emulate(turn)
            return self._inner.stream(turn) if emulated is None else self._emulated(emulated)
        native = self._inner.stream(turn)
        return native if self._mode == "native" or turn.resume is not None else self._tried(turn, native)

    async def _tried(
        self, turn: Turn, native: AsyncGenerator[Sequence[Delta], None]
    ) -> AsyncGenerator[Sequence[Delta], None]:
        batches = 0
        begun = False
        try:
            async with aclosing(native):
                async for batch in native:
                    begun = batches > 0 or not _only_remembers(batch)
                    batches += 1
                    yield batch
                return
        except UpstreamError as error:
            emulated = emulate(turn) if _refuses_tools(error) and not begun else None
            if emulated is None:
                raise
        batches = 0
        async with aclosing(self._emulated(emulated)) as told:
            async for batch in told:
                if not begun and (batches > 0 or not _only_remembers(batch)):
                    # Only now: other errors may show words of the request that look like a refusal.
                    begun = True
                    self._remember(turn.model)
                batches += 1
                yield batch

    def _emulated(self, emulated: Emulated) -> AsyncGenerator[Sequence[Delta], None]:
        self._left_out.tell(emulated.dropped)
        return _told(self._inner.stream(emulated.turn), TextCalls(emulated.tools), _packed(emulated.tools))

    def _remember(self, model: str) -> None:
        logger.info("upstream %s has no tools for a model; they are emulated for an hour", self.name)
        self._until.pop(model, None)
        self._until[model] = self._clock() + _KEPT
        if len(self._until) > _MOST:
            del self._until[next(iter(self._until))]

    async def models(self) -> Sequence[str]:
        return await self._inner.models()

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        await self._inner.cancel(_unmarked(state) or {}, bearer)

    async def close(self) -> None:
        await self._inner.close()


async def _told(
    batches: AsyncGenerator[Sequence[Delta], None], calls: TextCalls, mark: Mapping[str, Any]
) -> AsyncGenerator[Sequence[Delta], None]:
    async with aclosing(batches):
        async for batch in batches:
            deltas = [_marked(told, mark) for delta in batch for told in calls.feed(delta)]
            if deltas:
                yield deltas


def _refuses_tools(error: UpstreamError) -> bool:
    """What may have begun is not asked for again, whatever its message shows."""
    return error.code != "upstream_create_unknown" and refuses_tools(error)


def _only_remembers(batch: Sequence[Delta]) -> bool:
    """Whether a first batch says only that the backend is about to ask."""
    return all(isinstance(delta, Remember) for delta in batch)


def _as_asked(turn: Turn) -> Turn:
    """A turn that is gone on with, as it was asked for. What it has been resumed with may lack what came before it,
    so that its choice of tools cannot be kept: it is not asked for then."""
    try:
        emulated = emulate(turn)
    except InvalidRequest:
        emulated = emulate(replace(turn, tool_choice="auto"))
    return turn if emulated is None else emulated.turn


def _packed(tools: Mapping[str, Tool]) -> dict[str, Any]:
    return {name: list(tool) for name, tool in tools.items()}


def _unpacked(mark: Any) -> dict[str, Tool]:
    return {name: Tool(*tool) for name, tool in mark.items()} if isinstance(mark, dict) else {}


def _marked(delta: Delta, mark: Mapping[str, Any]) -> Delta:
    return Remember({**delta.state, _MARK: mark}) if isinstance(delta, Remember) else delta


def _unmarked(state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return state and {name: value for name, value in state.items() if name != _MARK}
