"""Fakes for the two true edges of the project, for its own tests and for those of whoever embeds it.

`ScriptedBackend` stands for a model, `ManualClock` for the time. Everything between them is quick enough
to be used as it is.

    backend = ScriptedBackend(spoken("Hello"), [[Accepted()], UpstreamTimeout("Too slow.")])
    ...                              # let something ask for two turns
    assert backend.calls[0].turn.model == "some-model"

What must stay true: a turn plays the script that is next when it begins; nothing here waits for time to
pass; a call that was made stays in `calls`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Item, Open, Part, Text
from responses_ingress.core.turn import Turn
from responses_ingress.errors import IngressError, UpstreamError

Step = Sequence[Delta] | asyncio.Event | Exception
"""What a turn does next: yield a batch of deltas, hold until the event is set, or raise."""

USAGE: Mapping[str, Any] = {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
MESSAGE: Item = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}


@dataclass(slots=True, eq=False)
class Call:
    """A turn that the backend was asked for.

    over: set when its iteration has ended, in whatever way.
    cut:  it was cancelled, or left with steps still to come.
    """

    turn: Turn
    over: asyncio.Event = field(default_factory=asyncio.Event)
    cut: bool = False


class ScriptedBackend:
    """A backend that plays one script after another, one for each turn."""

    def __init__(
        self,
        *scripts: Sequence[Step],
        name: str = "scripted",
        models: Sequence[str] | IngressError = ("scripted-model",),
        resumable: bool = False,
        goes_on: bool = False,
    ) -> None:
        self.name = name
        self.resumable = resumable
        self.goes_on = goes_on
        self.cancelled: list[Mapping[str, Any]] = []
        self.calls: list[Call] = []
        self.closed = False
        self._models = models
        self._scripts = deque(scripts)
        self._arrived = asyncio.Condition()

    def script(self, *scripts: Sequence[Step]) -> None:
        """Add scripts for later turns."""
        self._scripts.extend(scripts)

    async def called(self, count: int) -> Call:
        """Wait until `count` turns have begun; gives the last of them."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.calls) >= count)
        return self.calls[count - 1]

    async def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        """The next script. A turn that no script foresees fails with a message that says so."""
        call = Call(turn)
        steps = self._scripts.popleft() if self._scripts else [UpstreamError("No script foresees this turn.")]
        self.calls.append(call)
        try:
            async with self._arrived:
                self._arrived.notify_all()
            for at, step in enumerate(steps, 1):
                call.cut = at < len(steps)
                if isinstance(step, asyncio.Event):
                    call.cut = True
                    await step.wait()
                elif isinstance(step, Exception):
                    call.cut = False
                    raise step
                else:
                    yield step
            call.cut = False
        finally:
            call.over.set()

    async def models(self) -> Sequence[str]:
        if isinstance(self._models, IngressError):
            raise self._models
        return self._models

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        self.cancelled.append(state)

    async def close(self) -> None:
        self.closed = True


class ManualClock:
    """A clock that stands still until it is told to go on. Give it where a `Clock` is wanted."""

    def __init__(self, now: float = 1_760_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def spoken(*texts: str) -> list[Sequence[Delta]]:
    """The script of a turn that completes with one message, each of `texts` in a batch of its own."""
    return [opened(), *([Text(0, text)] for text in texts), ended()]


def opened() -> list[Delta]:
    """The batch with which a message begins."""
    return [Accepted(), Open(0, MESSAGE), Part(0, "output_text")]


def ended() -> list[Delta]:
    """The batch with which that message and its turn complete."""
    return [Close(0), Finish("completed", usage=USAGE)]
