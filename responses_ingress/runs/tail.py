"""The tail: a response followed from outside its run, which may be another process's, or over.

What must stay true: its events are those of the run, number by number: they are made from the journal by the
same builder, or taken from the run's own feed while it is of this process; many followers share one tail; the
journal is read again only when the bell rings, and now and then without; a response whose journal is gone is
told by its output. It writes nothing but that somebody follows.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.builder import Builder, Event
from responses_ingress.core.deltas import Delta, decode
from responses_ingress.core.envelope import Envelope
from responses_ingress.core.replay import PORTION, deltas_of_response, ending
from responses_ingress.errors import HandedOver, IllegalDelta, IngressError, NotFound, StoreUnavailable
from responses_ingress.runs.feed import Feed, Follower
from responses_ingress.runs.run import Run
from responses_ingress.runs.work import told_failure
from responses_ingress.store.database import Database
from responses_ingress.store.queue import sign
from responses_ingress.store.responses import (
    StoredResponse,
    envelope_at_creation,
    envelope_of,
    load,
    read_journal,
    read_output,
)
from responses_ingress.store.wake import said

logger = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks at what nobody rang for."""

_MOST_EVENTS = 256


@dataclass(frozen=True, slots=True)
class View:
    """What every tail of a process shares. grace: seconds a run goes on after its last follower left."""

    database: Database
    find_run: Callable[[str], Run | None]
    on_followed: Callable[["Tail"], None]
    on_deserted: Callable[["Tail"], None]
    grace: float


class Tail:
    """One response, seen from outside. Its task begins with the first follower."""

    error: IngressError | None = None

    def __init__(self, row: StoredResponse, view: View) -> None:
        self.id = row.id
        self.thread_id = row.thread_id
        self.row = row
        self.feed = Feed(lambda: view.on_deserted(self))
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.accepted.set_result(None)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._view = view
        self._builder = _builder(row)
        self._next = 0  # number of the first event that no row of the journal read so far makes
        self._signed = 0.0
        self._final: Envelope | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, first: int = 0) -> Follower:
        """Follow its events from the number `first` on."""
        if self._task is None:
            self._task = asyncio.create_task(self._drive(), name=f"tail-{self.id}")
            self._view.on_followed(self)
        return self.feed.follow(first)

    @property
    def cut(self) -> bool:
        """Whether its events stop here without an end."""
        return self.feed.ended and self._final is None

    def response(self) -> Envelope:
        """The response object: its last state when it has ended."""
        return self._final if self._final is not None else self._builder.response()

    def failure(self) -> IngressError | None:
        """Why the response failed, as an HTTP error; None where it did not."""
        response = self.response()
        return self.error or (told_failure(response) if response["status"] == "failed" else None)

    def refusal(self) -> None:
        """Its backend was asked by another request."""

    def close(self) -> None:
        """Follow no further, and end its followers' feed."""
        if self._final is None:
            self.error = HandedOver(
                "The server is shutting down; another one goes on with this response.", retry_after=1
            )
        if self._task is not None:
            self._task.cancel()
        self._end()

    def _end(self) -> None:
        self.feed.end()
        if not self.ended.done():
            self.ended.set_result(None)

    async def _drive(self) -> None:
        try:
            with self._view.database.bell.listen(self.id, said(self.id)) as ear:
                while not await self._look():
                    await ear.heard(POLL)
        except Exception as error:
            logger.exception("the tail of %s failed", self.id)
            self.error = StoreUnavailable(f"This response cannot be followed ({type(error).__name__}).", retry_after=2)
        finally:
            self._end()

    async def _look(self) -> bool:
        """Publish what is new; whether nothing more will come."""
        run = self._view.find_run(self.id)
        if run is not None and not run.silent:
            return await self._relay(run)
        try:
            return await self._read()
        except StoreUnavailable:  # the run waits for the database too
            return False

    async def _relay(self, run: Run) -> bool:
        """Follow a run of this process as anybody would."""
        with run.follow(len(self.feed.events)) as follower:
            while not follower.done:
                self.feed.publish(await follower.next(_MOST_EVENTS))
        if run.handed_over:
            return False
        self._final = run.response()
        return True

    async def _read(self) -> bool:
        """Read on in the journal. The row is read first: when it has ended, its journal is whole."""
        async with self._view.database.reading() as connection:
            found = await load(connection, [self.id])
            if not found:
                self.error = NotFound(f"Response with id '{self.id}' not found.")  # deleted meanwhile
                return True
            row, before = found[0], self.row
            if row.epoch != before.epoch:
                self._builder, self._next = _builder(row), 0
            self.row = row
            entries = await read_journal(connection, self.id, self._next)
            if entries and row.running and await self._has_moved(connection, row.epoch):
                return False  # it may have begun again while it was read: look again
            output = [] if row.running or row.status == "cancelled" else await read_output(connection, row)
        await self._feed(delta for entry in entries for delta in decode(entry.payload))
        if entries:
            self._next = entries[-1].first + entries[-1].events
        if row.running:
            await self._sign()
            return False
        self._final = {**envelope_of(row), "output": output}
        if not self._builder.ended:
            await self._tell(self._final)
        return True

    async def _tell(self, response: Envelope) -> None:
        """Tell the end of a response that has no journal, or not all of one."""
        try:
            if self._next == 0:
                await self._feed(deltas_of_response(response))
            else:
                await self._feed([replace(ending(response), items=dict(enumerate(response["output"])) or None)])
        except IllegalDelta:
            logger.error("the journal of %s and its output tell different things", self.id)
            self._publish()

    async def _feed(self, deltas: Iterable[Delta]) -> None:
        """Publish what the deltas make, in portions: a long journal must not hold up everybody else."""
        for number, delta in enumerate(deltas, 1):
            self._builder.feed(delta)
            if number % PORTION == 0:
                self._publish()
                await asyncio.sleep(0)
        self._publish()

    def _publish(self) -> None:
        known = len(self.feed.events)
        new: list[Event] = [event for event in self._builder.take() if event.number >= known]
        if new:
            self.feed.publish(new)

    async def _has_moved(self, connection: AsyncConnection, epoch: int) -> bool:
        return [row.epoch for row in await load(connection, [self.id])] != [epoch]

    async def _sign(self) -> None:
        """Say in its row that somebody follows it, so that its process lets it go on."""
        now = self._view.database.clock()
        if self.row.background or now < self._signed + self._view.grace / 2:
            return
        self._signed = now
        await self._view.database.submit(sign(self.id, self._view.grace + POLL))


def _builder(row: StoredResponse) -> Builder:
    builder = Builder(envelope_at_creation(row))
    builder.start()
    return builder
