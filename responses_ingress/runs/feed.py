"""The feed: a run's events, to whoever follows it.

What must stay true: a follower reads at its own pace and never slows the run or another follower; the
events a follower gets are whole and in order from the one it asked for; a follower that leaves leaves
nothing behind; a crowd of followers takes no more than a tenth of the process's time. The feed decides
nothing: the run publishes only what may be seen.
"""

import asyncio
from collections.abc import Callable, Sequence

from responses_ingress.core.builder import Event

_FEW = 20
"""Followers that are all woken with every event."""

_PAUSE = 0.0002
"""Seconds between two rounds for each follower of a crowd: ten times what one takes to write to."""


class Feed:
    """All events published so far, and who reads them."""

    def __init__(self, on_deserted: Callable[[], None]) -> None:
        self.events: list[Event] = []
        self.ended = False
        self._followers: set[Follower] = set()
        self._round: asyncio.TimerHandle | None = None  # the next one of a crowd
        self._on_deserted: Callable[[], None] | None = on_deserted

    @property
    def followed(self) -> bool:
        return bool(self._followers)

    def publish(self, events: Sequence[Event]) -> None:
        self.events.extend(events)
        if len(self._followers) <= _FEW:
            self._wake_all()
        elif self._round is None:
            loop = asyncio.get_running_loop()
            self._round = loop.call_later(_PAUSE * len(self._followers), self._wake_all)

    def end(self) -> None:
        """No event will follow."""
        self.ended = True
        self._on_deserted = None
        self._wake_all()

    def follow(self, first: int = 0) -> "Follower":
        """Follow from the event number `first` on, which need not be there yet."""
        follower = Follower(self, first)
        self._followers.add(follower)
        return follower

    def leave(self, follower: "Follower") -> None:
        self._followers.discard(follower)
        if not self._followers and self._on_deserted is not None:
            self._on_deserted()

    def _wake_all(self) -> None:
        if self._round is not None:
            self._round.cancel()
            self._round = None
        for follower in self._followers:
            follower.wake()


class Follower:
    """A place in a feed. Use as a context manager: leaving it leaves the feed."""

    def __init__(self, feed: Feed, first: int) -> None:
        self._feed = feed
        self._first = self._position = first
        self._waiting: asyncio.Future[None] | None = None
        self.left = False

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop following; whoever waits in `next` is given nothing more."""
        if not self.left:
            self.left = True
            self._feed.leave(self)
            self.wake()

    @property
    def done(self) -> bool:
        """Whether `next` has nothing more to give, ever."""
        return self.left or (self._feed.ended and self._position >= len(self._feed.events))

    @property
    def lost(self) -> Event | None:
        """The event that ended the feed, where it ended below the number this follower began at: it has seen
        others with the last numbers, which are no more."""
        events = self._feed.events
        return events[-1] if self._feed.ended and events and self._first >= len(events) else None

    def wake(self) -> None:
        """Let `next` return, with nothing if there is nothing."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def end(self) -> None:
        """Wait until the feed has ended or this follower left, and read nothing."""
        while not (self.left or self._feed.ended):
            await self._wait()

    async def _wait(self) -> None:
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting

    async def next(self, most: int) -> Sequence[Event]:
        """Up to `most` events, as soon as there are any; none when woken without, or when `done`."""
        if self._position >= len(self._feed.events) and not self.done:
            await self._wait()
        if self.left:
            return ()
        events = self._feed.events[self._position : self._position + most]
        self._position += len(events)
        return events
