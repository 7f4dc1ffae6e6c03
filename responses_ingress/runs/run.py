"""The run: the act of producing one response, apart from any connection. This file is the pump.

Its laws, one test each in tests/runs/test_run.py:

1. No HTTP handler drives a run; it follows the feed. A disconnect is not by itself a cancel.
2. Commit before publish: `response.created`, every `output_item.done` and the terminal event leave only
   when everything up to them is committed. Text in between may run ahead by one flush interval.
3. One ending: status, items, branch, head and the thread's release are one transaction, and exactly one
   terminal event leaves on every path.
4. Every write carries the lease's epoch; a stale writer fails, and shows nothing more: whoever followed it follows
   the response elsewhere.
5. An illegal or truncated upstream is a failed or incomplete response, never a malformed stream and
   never `completed`.
6. Streaming and JSON replies are this same run with another follower.
7. Nothing stays stuck: whatever is raised here ends the response, or hands it over to another process; what a
   dead process left behind, the upkeep finds by its lease.

A broad `except` is in `_drive`; docs/architecture.md lists the few others.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from responses_ingress.core.builder import Event
from responses_ingress.core.deltas import Accepted, Delta, Finish, Item, Open, Remember, Text, decode
from responses_ingress.core.deltas import encode as encode_deltas
from responses_ingress.core.envelope import Envelope, changed
from responses_ingress.core.replay import fold
from responses_ingress.core.turn import Turn
from responses_ingress.errors import (
    Cancelled,
    HandedOver,
    IngressError,
    InternalError,
    NotHandedOver,
    ServerRestarted,
    StaleWriter,
    StoreUnavailable,
    UpstreamTruncated,
)
from responses_ingress.ids import partition_of
from responses_ingress.runs.feed import Feed, Follower
from responses_ingress.runs.work import Kit, Record, Work, cancel_upstream, new_item, told_failure
from responses_ingress.store.queue import hand_over
from responses_ingress.store.turns import append_journal, end
from responses_ingress.store.values import Ending, Entry

logger = logging.getLogger(__name__)


class Run:
    """One response in the making. Its own task drives it; everyone else follows the feed."""

    def __init__(self, turn: Turn, work: Work, envelope: Envelope, record: Record | None, kit: Kit) -> None:
        self.id = turn.response_id
        self.thread_id = turn.thread_id
        self.background = bool(envelope["background"])
        self.backend = work.backend
        self.silent = not turn.stream
        self.goes_on = self.background or work.goes_on
        self.error: IngressError | None = None
        self.was_accepted = False
        self.handed_over = False
        self.usage_missing = False
        self.feed = Feed(lambda: kit.on_deserted(self.id))
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._work = work
        self._record = record
        self._kit = kit
        self._envelope = envelope
        self._builder = fold(envelope, [entry.payload for entry in work.journal], silent=self.silent)
        self._created: list[Event] = []  # made first of all, to be published with the response's row
        self._held: list[Event] = []  # made, not yet published
        self._unwritten = _eventless(work.journal)  # fed to the builder, and not in the journal, or still to stay there
        self._written = sum(entry.events for entry in work.journal)  # number of the first event not journaled
        self._flush: asyncio.TimerHandle | None = None
        self._memory = _dumped(self._builder.memory)
        self._may_begin_anew = self.background or work.resumable  # while its journal has said nothing
        self._told = False  # its ending is committed and published
        self._must_write = False  # something waits for the journal before the backend may go on
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

    @property
    def cut(self) -> bool:
        """Whether its events stop here without an end: another process goes on with it."""
        return self.handed_over

    @property
    def followed(self) -> bool:
        """Whether anybody in this process follows it."""
        return self.feed.followed

    def follow(self, first: int = 0) -> Follower:
        """Follow its events from the number `first` on."""
        return self.feed.follow(first)

    def response(self) -> Envelope:
        """The response object as of now."""
        if self._lost and self.error is not None:
            return {**self._envelope, "status": "failed", "error": self.error.detail()}
        return self._builder.response()

    def failure(self) -> IngressError | None:
        """Why the response failed, as an HTTP error; None where it did not."""
        if self.error is not None or self.status != "failed":
            return self.error
        return told_failure(self._builder.response())

    def refusal(self) -> IngressError | None:
        """Why the backend refused the turn at once, where that can be the answer to the request that made it."""
        refused = self.accepted.done() and not self.was_accepted and not self.background
        return self.error if refused else None

    def cancel(self, reason: IngressError) -> None:
        """Stop the backend and end the response: cancelled where `reason` is `Cancelled`, else failed."""
        if self._stop is None and not self._builder.ended:
            self._stop = reason
            if self._started:  # a task cancelled before its first step would end nothing
                self._task.cancel()

    def hand_over(self) -> None:
        """Stop here and let another process go on, or begin again; where that cannot be, fail."""
        self.cancel(HandedOver("The server is shutting down; another one goes on with this response.", retry_after=1))

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
            await self._halt(self._stop)
        except IngressError as error:
            await self._halt(error)
        except Exception as error:
            logger.exception("run %s failed", self.id)
            await self._halt(InternalError(f"The server failed to run this request ({type(error).__name__})."))
        finally:
            self._close()

    def _open(self) -> None:
        """Publish `response.created` when its row is committed; the backend is called meanwhile."""
        self._created = self._builder.take()
        if self._record is None:
            self._publish()
        else:
            self._record.begun.add_done_callback(self._on_begun)

    def _on_begun(self, begun: "asyncio.Future[None]") -> None:
        error = begun.exception()
        if error is None:
            self._kit.at("begin.after")
            self.feed.publish(self._created)
            self._created = []
        elif isinstance(error, IngressError):
            self.cancel(error)

    async def _pump(self) -> None:
        async with aclosing(self._work.deltas) as batches:
            async for deltas in batches:
                await self._take(deltas)
                if self._builder.ended:
                    return
        raise UpstreamTruncated("The upstream ended its answer without finishing it.")

    async def _take(self, deltas: Sequence[Delta]) -> None:
        """Feed what one read brought, and show what may be shown."""
        if self._record is not None:
            await self._record.wait()
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
        must_wait = self._behind or self._must_write or self._kit.flush_interval == 0
        if self._may_begin_anew and self._builder.has_said:
            must_wait, self._may_begin_anew = True, False  # nobody may see what another process could say anew
        if must_wait or any(event.type == "response.output_item.done" for event in self._held):
            if self._unwritten:
                self._kit.at("journal.before")
                await self._written_now(record)
                self._kit.at("journal.after")
            self._behind = self._must_write = False
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
            self._must_write = True
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
        if self._held or self._created:
            self._kit.at("publish.before")
            self.feed.publish([*self._created, *self._held] if self._created else self._held)
            self._created, self._held = [], []
            self._kit.at("publish.after")

    def _entry(self) -> Entry:
        """What is not in the journal yet, as its next row. One that makes no event has the place of the next, which
        takes over what is in it."""
        first, self._written = self._written, self._builder.number
        payload = encode_deltas(self._unwritten)
        if self._written > first:
            self._unwritten = []
        return Entry(first, self._written - first, payload)

    def _write(self, record: Record) -> "asyncio.Future[None]":
        """Put into the journal what is not there yet."""
        self._drop_timer()
        batch = append_journal(self.id, record.owner, record.placement.tenant, self._entry())
        return record.database.submit(batch)

    async def _written_now(self, record: Record) -> None:
        try:
            await self._write(record)
        except IngressError:
            self._unkept = True
            raise

    def _write_aside(self, record: Record) -> None:
        """Write while text goes on; where the last batch is not even committed yet, let text wait for it."""
        self._flush = None
        if self._writing is not None and not self._writing.done():
            self._behind = True
        elif self._unwritten:
            self._kit.at("journal.before")
            self._writing = self._write(record)
            self._writing.add_done_callback(self._on_written)

    def _on_written(self, written: "asyncio.Future[None]") -> None:
        """A journal that cannot be written ends the run: what it tells could not be kept."""
        error = None if written.cancelled() else written.exception()
        if isinstance(error, IngressError):
            self._unkept = True
            self.cancel(error)
            return
        if error is None:
            self._kit.at("journal.after")
        if self._behind and self._record is not None and not self._builder.ended:
            self._behind = False
            self._write_aside(self._record)

    async def _finish(self) -> None:
        """Law 3: commit the ending, then publish it."""
        self._drop_timer()
        if self._record is not None:
            await self._aside_done()
            self._kit.at("end.before")
            ending = end(self.id, self._record.owner, self._record.placement, self._ending(self._record))
            await self._record.database.submit(ending)
            self._kit.at("end.after")
        self._publish()
        self._told = True

    async def _aside_done(self) -> None:
        """Wait for the journal's batch on its way: without it the journal would have a gap before its end."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,))
        if self._writing is not None and not self._writing.cancelled() and self._writing.exception() is not None:
            self._unkept = True
            raise StoreUnavailable("The journal of this response could not be written.", retry_after=2)

    def _ending(self, record: Record) -> Ending:
        response = self._builder.response()
        details, echo = response["incomplete_details"], changed(self._envelope, response)
        # Where nobody could read events and none were journaled, no cursor can point at one.
        journal = None if self.silent and not self._written else self._entry()
        return Ending(
            status=self._builder.status,
            input=record.input,
            output=[new_item(item) for item in self._builder.output] if record.is_turn else [],
            echo=orjson.dumps(echo) if echo else None,
            error=_dumped(response["error"]),
            usage=_dumped(response["usage"]),
            incomplete=details["reason"] if details else None,
            completed_at=response["completed_at"],
            memory=self._memory,
            journal=journal,
            keep=self._kit.keep,
            store=record.store,
            lingers=record.lingers or journal is not None,
        )

    async def _halt(self, reason: IngressError) -> None:
        """End early: handed over, cancelled or failed."""
        if self._told:
            logger.warning("the backend of %s failed after it had finished: %s", self.id, type(reason).__name__)
            return
        if isinstance(reason, HandedOver):
            self.handed_over = await self._hand_over()
            if self.handed_over:
                self.error = reason
                return
            reason = ServerRestarted("The server was stopped while it was producing this response.")
        if isinstance(reason, StaleWriter):
            self._give_way()
            return
        if isinstance(reason, Cancelled):
            self._kit.at("cancel")
            await self._cancel_upstream()
        await self._fail(reason)

    def _give_way(self) -> None:
        """Another process has the response. How it ends is not known here, so nothing of an end is told."""
        self.handed_over = True
        self.error = HandedOver("Another worker has taken over this response. Ask for it again.", retry_after=1)
        logger.warning("response %s was taken over by another process", self.id)

    async def _hand_over(self) -> bool:
        """Whether another process may have the response from now on."""
        record, builder = self._record, self._builder
        resumable = self._work.resumable and builder.memory is not None and not builder.has_said
        if record is None or builder.ended or self._unkept or not (self.background or resumable):
            return False
        given = hand_over(self.id, record.owner, self.thread_id, resumable=resumable, said=builder.has_said)
        try:
            await record.wait()
            await record.database.submit(given)
        except NotHandedOver:
            return False
        except IngressError as error:
            logger.warning("response %s could not be handed over: %s", self.id, error.message)
        return True

    async def _cancel_upstream(self) -> None:
        memory = self._builder.memory
        if self._work.cancel is None or memory is None:
            return
        await cancel_upstream(self.id, self._work.cancel(memory))

    async def _fail(self, error: IngressError) -> None:
        """End the response with `error`, in the database and for its followers."""
        self.error = self._stop = error
        try:
            if self._unkept or self._builder.ended:
                raise error
            if self._record is not None:
                await self._record.wait()
            self._feed_failure(error)
            await self._finish()
        except StaleWriter:
            self._give_way()
        except IngressError as reason:
            self._lose(reason)

    def _feed_failure(self, error: IngressError) -> None:
        status: Any = "cancelled" if isinstance(error, Cancelled) else "failed"
        detail = None if status == "cancelled" else error.detail()
        finish = Finish(status, error=detail, at=int(self._kit.ids.clock()))
        self._builder.feed(finish)
        self._unwritten.append(finish)
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


def _eventless(journal: Sequence[Entry]) -> list[Delta]:
    """The deltas of a last row without events, whose place the next row takes."""
    return list(decode(journal[-1].payload)) if journal and not journal[-1].events else []


def _dumped(value: Any) -> bytes | None:
    return None if value is None else orjson.dumps(value)
