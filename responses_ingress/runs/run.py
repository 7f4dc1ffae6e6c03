"""The run: the act of producing one response, apart from any connection. This file is the pump.

Its laws, one test each in tests/runs/test_run.py:

1. No HTTP handler drives a run; it follows the feed. A disconnect is not by itself a cancel.
2. Commit before publish: `response.created`, every `output_item.done` and the terminal event leave only
   when everything up to them is committed. Text in between may run ahead by one flush interval.
3. One ending: status, items, branch, head and the thread's release are one transaction, and exactly one
   terminal event leaves on every path.
4. Every write carries the lease's epoch; a stale writer fails, and shows nothing more than that it failed.
5. An illegal or truncated upstream is a failed or incomplete response, never a malformed stream and
   never `completed`.
6. Streaming and JSON replies are this same run with another follower.
7. Nothing stays stuck: whatever is raised here ends the response; what a dead process left behind, the
   runner finds by its lease.

Broad `except`s are here, at the web edge, and where one fault must not end what all rely on: around a unit
of the store's writer and around a chore of the runner's upkeep.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson

from responses_ingress.core.builder import Builder, Event
from responses_ingress.core.deltas import Accepted, Delta, Finish, Item, Open, Remember, Text
from responses_ingress.core.deltas import encode as encode_deltas
from responses_ingress.core.envelope import Envelope, reduce, split_repeated
from responses_ingress.core.items import digest
from responses_ingress.core.turn import Turn
from responses_ingress.errors import Cancelled, IngressError, InternalError, UpstreamError, UpstreamTruncated
from responses_ingress.ids import Ids, partition_of
from responses_ingress.runs.feed import Feed
from responses_ingress.store.database import Database
from responses_ingress.store.turns import Ending, NewItem, Owner, Placement, append_journal, end

logger = logging.getLogger(__name__)

_STATUSES = {"context_length_exceeded": 400, "rate_limit_exceeded": 429}


Deltas = AsyncGenerator[Sequence[Delta], None]


@dataclass(frozen=True, slots=True)
class Record:
    """Where a run writes. A run without one (no session, `store: false`) writes nothing.

    input:   the new input items, for the branch.
    is_turn: the output goes to the branch too.
    begun:   done when the response's row is committed.
    """

    database: Database
    placement: Placement
    owner: Owner
    store: bool
    input: Sequence[NewItem]
    is_turn: bool
    begun: "asyncio.Future[None]"


@dataclass(frozen=True, slots=True)
class Kit:
    """What every run of a process shares."""

    ids: Ids
    flush_interval: float
    on_deserted: Callable[["Run"], None]


class Run:
    """One response in the making. Its own task drives it; everyone else follows the feed."""

    def __init__(self, turn: Turn, deltas: Deltas, envelope: Envelope, record: Record | None, kit: Kit) -> None:
        self.id = turn.response_id
        self.thread_id = turn.thread_id
        self.background = bool(envelope["background"])
        self.error: IngressError | None = None
        self.was_accepted = False
        self.usage_missing = False
        self.feed = Feed(lambda: kit.on_deserted(self))
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._deltas = deltas
        self._record = record
        self._kit = kit
        self._envelope = envelope
        self._builder = Builder(envelope, silent=not (turn.stream or self.background))
        self._created: list[Event] = []  # made first of all, to be published with the response's row
        self._held: list[Event] = []  # made, not yet published
        self._unwritten: list[Delta] = []  # fed to the builder, not yet in the journal
        self._written = 0  # number of the first event the journal does not tell
        self._flush: asyncio.TimerHandle | None = None
        self._memory: bytes | None = None
        self._stop: IngressError | None = None  # why it ends early; nothing stops it twice
        self._started = False
        self._unkept = False  # the journal has refused something
        self._lost = False  # its ending cannot be kept, and it has told so
        self._writing: asyncio.Future[None] | None = None  # the journal's last batch on its way
        self._behind = False  # the journal does not keep up
        self._task = asyncio.create_task(self._drive(), name=self.id)

    @property
    def recorded(self) -> bool:
        """Whether it writes to the database, and so holds a lease there."""
        return self._record is not None

    @property
    def status(self) -> str:
        return "failed" if self._lost else self._builder.status

    def response(self) -> Envelope:
        """The response object as of now."""
        if self._lost and self.error is not None:
            return {**self._envelope, "status": "failed", "error": self.error.detail()}
        return self._builder.response()

    def failure(self) -> IngressError | None:
        """Why the response failed, as an HTTP error; None where it did not."""
        if self.error is not None or self.status != "failed":
            return self.error
        told = self._builder.response()["error"]
        return UpstreamError(told["message"], code=told["code"], status=_STATUSES.get(told["code"]))

    def cancel(self, reason: IngressError) -> None:
        """Stop the backend and end the response: cancelled where `reason` is `Cancelled`, else failed."""
        if self._stop is None and not self._builder.ended:
            self._stop = reason
            if self._started:  # a task cancelled before its first step would end nothing
                self._task.cancel()

    async def _drive(self) -> None:
        """Produce the response, whatever happens."""
        self._started = True
        try:
            self._open()
            if self._stop is not None:
                raise self._stop
            await self._pump()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
            self._task.uncancel()
            await self._fail(self._stop)
        except IngressError as error:
            await self._fail(error)
        except Exception as error:
            logger.exception("run %s failed", self.id)
            await self._fail(InternalError(f"The server failed to run this request ({type(error).__name__})."))
        finally:
            self._close()

    def _open(self) -> None:
        """Publish `response.created` when its row is committed; the backend is called meanwhile."""
        self._builder.start()
        self._created = self._builder.take()
        if self._record is None:
            self._publish()
        else:
            self._record.begun.add_done_callback(self._on_begun)

    def _on_begun(self, begun: "asyncio.Future[None]") -> None:
        error = begun.exception()
        if error is None:
            self.feed.publish(self._created)
            self._created = []
        elif isinstance(error, IngressError):
            self.cancel(error)

    async def _pump(self) -> None:
        async with aclosing(self._deltas) as batches:
            async for deltas in batches:
                await self._take(deltas)
                if self._builder.ended:
                    return
        raise UpstreamTruncated("The upstream ended its answer without finishing it.")

    async def _take(self, deltas: Sequence[Delta]) -> None:
        """Feed what one read brought, and show what may be shown."""
        if self._record is not None:
            await _begun(self._record)
        for delta in map(self._stamp, deltas):
            self._builder.feed(delta)
            self._unwritten.append(delta)
        self._held.extend(self._builder.take())
        if self._builder.ended:
            await self._finish()
        elif self._record is None:
            self._unwritten.clear()
            self._publish()
        else:
            await self._keep(self._record)

    async def _keep(self, record: Record) -> None:
        """Law 2: text leaves at once and is written soon; anything else waits until it is written."""
        must_wait = self._behind or self._kit.flush_interval == 0
        if must_wait or any(event.type == "response.output_item.done" for event in self._held):
            if self._builder.number > self._written:
                await self._write(record)
            self._behind = False
            self._publish()
        else:
            self._publish()
            if self._flush is None:
                loop = asyncio.get_running_loop()
                self._flush = loop.call_later(self._kit.flush_interval, self._write_aside, record)

    def _stamp(self, delta: Delta) -> Delta:
        """The delta with our ids and our time in it, so that feeding it again gives the same bytes."""
        if isinstance(delta, Text):
            return delta
        if isinstance(delta, Open):
            return Open(delta.index, self._named(delta.item))
        if isinstance(delta, Accepted):
            self.was_accepted = True
            self._settle()
        elif isinstance(delta, Remember):
            self._memory = orjson.dumps(delta.state)
        elif isinstance(delta, Finish):
            self.usage_missing = delta.usage is None
            return replace(delta, at=int(self._kit.ids.clock()))
        return delta

    def _named(self, item: Item) -> Item:
        ids = self._kit.ids
        named = {"id": None, **item} | {"id": ids.item(item["type"], partition_of(self.id))}
        if item.get("call_id") == "":
            named["call_id"] = ids.call()
        return named

    def _settle(self) -> None:
        """The backend has accepted or refused the turn, so the client can have its headers."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def _publish(self) -> None:
        self.feed.publish([*self._created, *self._held] if self._created else self._held)
        self._created, self._held = [], []

    def _write(self, record: Record) -> "asyncio.Future[None]":
        """Put into the journal what is not there yet."""
        self._drop_timer()
        payload = encode_deltas(self._unwritten)
        first, self._written, self._unwritten = self._written, self._builder.number, []
        count = self._written - first
        batch = append_journal(self.id, record.owner, record.placement.tenant, (first, count, payload))
        return record.database.submit(batch)

    def _write_aside(self, record: Record) -> None:
        """Write while text goes on; where the last batch is not even committed yet, let text wait for it."""
        self._flush = None
        if self._writing is not None and not self._writing.done():
            self._behind = True
        elif self._builder.number > self._written:
            self._writing = self._write(record)
            self._writing.add_done_callback(self._on_written)

    def _on_written(self, written: "asyncio.Future[None]") -> None:
        """A journal that cannot be written ends the run: what it tells could not be kept."""
        error = None if written.cancelled() else written.exception()
        if isinstance(error, IngressError):
            self._unkept = True
            self.cancel(error)
        elif self._behind and self._record is not None and not self._builder.ended:
            self._behind = False
            self._write_aside(self._record)

    async def _finish(self) -> None:
        """Law 3: commit the ending, then publish it."""
        self._drop_timer()
        if self._record is not None:
            await self._record.database.submit(
                end(self.id, self._record.owner, self._record.placement, self._ending(self._record), self._record.store)
            )
        self._publish()

    def _ending(self, record: Record) -> Ending:
        response = self._builder.response()
        details = response["incomplete_details"]
        return Ending(
            status=self._builder.status,
            envelope=orjson.dumps(split_repeated(reduce(response))[0]),
            input=record.input,
            output=[new_item(item) for item in self._builder.output] if record.is_turn else [],
            error=_dumped(response["error"]),
            usage=_dumped(response["usage"]),
            incomplete=details["reason"] if details else None,
            completed_at=response["completed_at"],
            memory=self._memory,
            journaled=self._written > 0,
        )

    async def _fail(self, error: IngressError) -> None:
        """End the response with `error`, in the database and for its followers."""
        self.error = self._stop = error
        try:
            if self._unkept or self._builder.ended:
                raise error
            if self._record is not None:
                await _begun(self._record)
            self._feed_failure(error)
            await self._finish()
        except IngressError as reason:
            self._lose(reason)

    def _feed_failure(self, error: IngressError) -> None:
        status: Any = "cancelled" if isinstance(error, Cancelled) else "failed"
        detail = None if status == "cancelled" else error.detail()
        self._builder.feed(Finish(status, error=detail, at=int(self._kit.ids.clock())))
        self._held.extend(self._builder.take())

    def _lose(self, error: IngressError) -> None:
        """The ending cannot be committed: tell that, instead of an ending nobody would find later."""
        self.error = error
        self._lost = True
        self._drop_timer()
        if not self.feed.events and not self._builder.ended:
            self._feed_failure(error)
            self._publish()
            return
        number = len(self.feed.events) + len(self._created)
        response = {**self._envelope, "status": "failed", "error": error.detail()}
        event = {"type": "response.failed", "sequence_number": number, "response": response}
        self._held = [Event(number, "response.failed", orjson.dumps(event))]
        self._publish()

    def _close(self) -> None:
        self._drop_timer()
        self._settle()
        self.feed.end()
        if not self.ended.done():
            self.ended.set_result(None)

    def _drop_timer(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None


async def _begun(record: Record) -> None:
    """Wait until the row is committed. Whoever is cancelled while waiting does not take that back."""
    if not record.begun.done():
        await asyncio.wait((record.begun,))
    record.begun.result()


def new_item(item: Item) -> NewItem:
    """The item as the store takes it."""
    return NewItem(item["id"], item["type"], digest(item), orjson.dumps(item))


def _dumped(value: Any) -> bytes | None:
    return None if value is None else orjson.dumps(value)
