"""The gate in front of a backend: how many turns it gets at a time, and how it fares.

What must stay true: turns pass in the order they came; one for which there is no room waits or is refused, before
anything of it has begun; one that leaves while it waits leaves no trace; what is told of a failure is its code and
its time, never what was said. Knows nothing of what the backend is.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import time
from typing import Any

from responses_ingress.backends.base import Backend
from responses_ingress.core.deltas import Delta, Finish
from responses_ingress.core.turn import Turn
from responses_ingress.errors import Busy, IngressError
from responses_ingress.ids import Clock

_RETRY_AFTER = 2.0
"""Seconds after which a turn that was refused may find room."""

_CODE = re.compile(r"[a-z0-9_]{1,64}")
"""Codes that are shown; anything else may be words of the upstream's."""

_OF_THE_REQUEST = frozenset({400, 404, 413})
"""Statuses of failures that say nothing about the upstream."""


@dataclass(slots=True)
class Fare:
    """How a backend fares: turns that it has and that wait for it, and in unix time when a turn ended well for the
    last time and when one failed, with what code."""

    in_flight: int = 0
    waiting: int = 0
    last_success: float | None = None
    last_error: tuple[str, float] | None = None


class Gate:
    """`inner`, for `most` turns at a time; of the others `patient` may wait, and all those that run in the background,
    since nobody is there to ask again. None is any number."""

    def __init__(self, inner: Backend, most: int | None = None, patient: int = 0, clock: Clock = time) -> None:
        self.fare = Fare()
        self.inner = inner
        self._patient = patient
        self._clock = clock
        self._room = None if most is None else asyncio.Semaphore(most)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def resumable(self) -> bool:
        return self.inner.resumable

    @property
    def goes_on(self) -> bool:
        return self.inner.goes_on

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        """As of any backend. Raises `Busy` where too many wait."""
        if self._room is None or turn.resume is not None:  # what goes on has its room upstream already
            return self._seen(self.inner.stream(turn))
        self._check(self._room, turn)
        return self._let_in(self._room, turn, self.inner.stream(turn))

    def _check(self, room: asyncio.Semaphore, turn: Turn) -> None:
        if turn.parameters.get("background") is True:
            return
        if room.locked() and self.fare.waiting >= self._patient:
            raise Busy(f"The upstream '{self.name}' is at its limit. Try again soon.", retry_after=_RETRY_AFTER)

    async def _let_in(
        self, room: asyncio.Semaphore, turn: Turn, batches: AsyncGenerator[Sequence[Delta], None]
    ) -> AsyncGenerator[Sequence[Delta], None]:
        self._check(room, turn)  # others may have come since it was looked the first time
        self.fare.waiting += 1
        try:
            await room.acquire()
        finally:
            self.fare.waiting -= 1
        try:
            async with aclosing(self._seen(batches)) as seen:
                async for batch in seen:
                    yield batch
        finally:
            room.release()

    async def _seen(self, batches: AsyncGenerator[Sequence[Delta], None]) -> AsyncGenerator[Sequence[Delta], None]:
        self.fare.in_flight += 1
        try:
            async with aclosing(batches):
                async for batch in batches:
                    if batch and isinstance(batch[-1], Finish):
                        self._ended(batch[-1])
                    yield batch
        except IngressError as error:
            if error.status not in _OF_THE_REQUEST:
                self._failed(error.code or error.type)
            raise
        finally:
            self.fare.in_flight -= 1

    def _ended(self, finish: Finish) -> None:
        if finish.status in ("completed", "incomplete"):
            self.fare.last_success = self._clock()
        elif finish.status == "failed":
            code = (finish.error or {}).get("code")
            if code != "context_length_exceeded":
                self._failed(str(code))

    def _failed(self, code: str) -> None:
        self.fare.last_error = (code if _CODE.fullmatch(code) else "upstream_error", self._clock())

    async def models(self) -> Sequence[str]:
        return await self.inner.models()

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        await self.inner.cancel(state, bearer)

    async def close(self) -> None:
        await self.inner.close()
