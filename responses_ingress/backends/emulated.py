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
from responses_ingress.errors import UpstreamError
from responses_ingress.ids import Clock

logger = logging.getLogger(__name__)

ToolMode = Literal["auto", "native", "emulated"]
"""How a model gets its tools: natively until its upstream refuses them, always natively, never."""

_KEPT = 3600.0
"""Seconds for which a refusal is remembered: the upstream may be started anew with another model or flag."""

_MOST = 256
"""Models remembered: where a route passes on any name, a client could name ever new ones."""

_MARK = "emulated_tools"
"""In what is remembered of a turn: its answer holds calls as text."""


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
        marked = turn.resume is not None and _MARK in turn.resume
        turn = replace(turn, memory=_unmarked(turn.memory), resume=_unmarked(turn.resume))
        if marked or (turn.resume is None and self.tool_mode(turn.model) == "emulated"):
            emulated = emulate(turn)
            return self._inner.stream(turn) if emulated is None else self._emulated(emulated)
        native = self._inner.stream(turn)
        return native if self._mode == "native" or turn.resume is not None else self._tried(turn, native)

    async def _tried(
        self, turn: Turn, native: AsyncGenerator[Sequence[Delta], None]
    ) -> AsyncGenerator[Sequence[Delta], None]:
        begun = False
        try:
            async with aclosing(native):
                async for batch in native:
                    begun = True
                    yield batch
                return
        except UpstreamError as error:
            emulated = emulate(turn) if refuses_tools(error) and not begun else None
            if emulated is None:
                raise
        async with aclosing(self._emulated(emulated)) as batches:
            async for batch in batches:
                if not begun:
                    # Only now: other errors may show words of the request that look like a refusal.
                    begun = True
                    self._remember(turn.model)
                yield batch

    def _emulated(self, emulated: Emulated) -> AsyncGenerator[Sequence[Delta], None]:
        self._left_out.tell(emulated.dropped)
        return _told(self._inner.stream(emulated.turn), TextCalls(emulated.tools))

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
    batches: AsyncGenerator[Sequence[Delta], None], calls: TextCalls
) -> AsyncGenerator[Sequence[Delta], None]:
    async with aclosing(batches):
        async for batch in batches:
            deltas = [_marked(told) for delta in batch for told in calls.feed(delta)]
            if deltas:
                yield deltas


def _marked(delta: Delta) -> Delta:
    return Remember({**delta.state, _MARK: True}) if isinstance(delta, Remember) else delta


def _unmarked(state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return state and {name: value for name, value in state.items() if name != _MARK}
