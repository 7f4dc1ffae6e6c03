"""The runner: begins runs, knows those of this process, and finds who makes the others.

What must stay true: of the requests that want a thread's turn, the one that came first gets it; a run nobody
follows ends after the grace period, unless it works in the background or its backend says that it goes on; a
request that comes again means the response it made the first time; only this room starts a task for a response.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from responses_ingress.backends.base import Route
from responses_ingress.core.request import Caller, Request, Retry
from responses_ingress.errors import (
    AlreadyBegun,
    Busy,
    Cancelled,
    CursorExpired,
    IngressError,
    InvalidRequest,
    KeyReused,
    PlacementOutdated,
    ResponseRunning,
    ServerRestarted,
    StaleWriter,
    StoreUnavailable,
    ThreadBusy,
)
from responses_ingress.ids import Ids
from responses_ingress.runs.making import Maker, Told, closed
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.run import Run
from responses_ingress.runs.tail import POLL, Tail, View
from responses_ingress.runs.work import Kit
from responses_ingress.store.database import Database
from responses_ingress.store.queue import ask_to_yield, cancel, followed_until, sign
from responses_ingress.store.responses import StoredResponse, find_response, fold_journal, has_journal, load
from responses_ingress.store.retention import delete_response
from responses_ingress.store.turns import use
from responses_ingress.store.values import Keep, Owner
from responses_ingress.store.wake import Ear

logger = logging.getLogger(__name__)

_USED_AGAIN = 60.0
"""Seconds within which a response that is read again and again counts as used once."""

_PAUSE = 0.25
_CANCEL_PATIENCE = 10.0
"""Seconds that a cancel waits for the process that runs the response."""

Gone = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; see docs/configuration.md for each."""

    flush_interval: float = 0.1
    disconnect_grace: float = 10.0
    thread_wait: float = 30.0
    lease: float = 15.0
    max_runs: int = 1000
    max_background: int = 100
    max_queued: int = 1000
    keep: Keep = Keep()


class Runner:
    """The runs of one process. Open it in the running loop."""

    def __init__(
        self,
        database: Database,
        routes: Sequence[Route],
        limits: Limits,
        metrics: Metrics,
        ids: Ids,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.database = database
        self.closing = False
        self._routes = routes
        self._limits = limits
        self._metrics = metrics
        self._clock = ids.clock
        self._ids = ids
        self._keep = limits.keep
        self.owner = Owner(ids.request(), 1, limits.lease)
        kit = Kit(ids, limits.flush_interval, self._on_left, self._keep, at)
        self._maker = Maker(database, routes, ids, kit, self.owner)
        self._view = View(database, self.get, self._on_followed, Tail.close, limits.disconnect_grace)
        self._runs: dict[str, Run] = {}
        self._tails: dict[str, Tail] = {}
        # What has no row to be found by when it is asked for again: by its name, with the digest of its body.
        self._repeatable: dict[bytes, tuple[Run, bytes | None]] = {}
        self._lines: dict[tuple[str, str], deque[Ear]] = {}
        self._coming = 0  # requests that are not runs yet
        self._creating = 0
        self._beginning = 0  # background responses that are about to run
        self._timers: dict[str, asyncio.TimerHandle] = {}  # what ends a run that nobody follows
        self._tasks: set[asyncio.Task[bool]] = set()
        metrics.running.set_function(lambda: len(self._runs))

    def get(self, response_id: str) -> Run | None:
        """The run of this process that is producing the response, if one is."""
        return self._runs.get(response_id)

    @property
    def leased(self) -> dict[str, str]:
        """What this process runs and has a lease for: response -> its thread."""
        return {run.id: run.thread_id for run in self._runs.values() if run.recorded}

    @property
    def free(self) -> int:
        """How many more background responses this process can run."""
        if self.closing:
            return 0
        background = sum(run.background for run in self._runs.values()) + self._beginning
        return min(self._limits.max_background - background, self._limits.max_runs - len(self._runs))

    async def models(self) -> list[str]:
        """The model names a client can ask for: those routed by their full name, and what the backends
        behind patterns know. A backend that cannot be asked adds nothing."""
        names = [route.pattern for route in self._routes if not _is_pattern(route.pattern)]
        asked = {route.backend.name: route.backend for route in self._routes if _is_pattern(route.pattern)}
        for backend in asked.values():
            try:
                names += await backend.models()
            except IngressError as error:
                logger.warning("backend %s does not tell its models: %s", backend.name, error.message)
        return list(dict.fromkeys(names))

    async def create(self, request: Request, caller: Caller, gone: Gone | None = None) -> Run | Tail:
        """Begin a response, or find the one that this request has begun before. What is wrong with the request
        itself is raised before anything is written.

        gone: returns when the client has left; a request that waits for its turn is dropped then.
        """
        is_full = len(self._runs) + self._coming >= self._limits.max_runs and not request.background
        if self.closing or is_full:
            raise Busy("The server is at its limit of running responses. Try again soon.", retry_after=1)
        if caller.retry is not None and (known := self._known(caller.retry)) is not None:
            return known
        self._coming += 1
        try:
            if request.background:
                return await self._create_in_background(request, caller)
            if caller.thread_key is None and request.previous_response_id is None:
                return await self._create(request, caller)
            return await self._create_in_line(request, caller, gone)
        except AlreadyBegun as known:
            return await self._attach(known.response_id, request.stream)
        finally:
            self._coming -= 1

    def _known(self, retry: Retry) -> Run | None:
        """The run of a repeated request that is written nowhere."""
        run, body = self._repeatable.get(retry.name, (None, None))
        if run is None or not retry.attaches:
            return None
        if retry.body is not None and body not in (None, retry.body):
            raise KeyReused("This Idempotency-Key was used for another request.")
        return run

    async def _attach(self, response_id: str, stream: bool) -> Run | Tail:
        """Follow the response that a repeated request has begun the first time."""
        run = self._runs.get(response_id)
        if run is not None and not stream and not run.background:
            return run
        async with self.database.reading() as connection:
            found = await load(connection, [response_id])
        if not found:
            raise Busy("The response that this request made is gone. Try again.", retry_after=1)
        return await self.follow(found[0], None)

    async def _create_in_background(self, request: Request, caller: Caller) -> Run | Tail:
        """Begin at once where that is possible, else wait in the queue."""
        if self.free > 0:
            with self._taken():
                try:
                    return await self._create(request, caller)
                except (ResponseRunning, PlacementOutdated):
                    pass
        id = await self._maker.queue(request, caller, self._limits.max_queued)
        async with self.database.reading() as connection:
            (row,) = await load(connection, [id])
        return self._tail(row)

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """Hold a place for a background response that is about to begin."""
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1

    async def _create_in_line(self, request: Request, caller: Caller, gone: Gone | None) -> Run:
        """Begin a response that builds on others, when those have ended: the first that came first."""
        deadline = asyncio.get_running_loop().time() + self._limits.thread_wait
        with self.database.bell.listen() as ear, self._in_line(caller, ear) as line:
            leaving = asyncio.ensure_future(gone()) if gone is not None else None
            if leaving is not None:
                leaving.add_done_callback(lambda _: ear.wake())
            try:
                while True:
                    busy = None
                    is_first = line[0] is ear
                    if is_first:
                        try:
                            return await self._create(request, caller)
                        except PlacementOutdated:
                            if asyncio.get_running_loop().time() < deadline:
                                continue
                        except ResponseRunning as running:
                            busy = running
                    await self._wait(busy, ear, deadline, is_first=is_first)
                    if leaving is not None and leaving.done():
                        raise Cancelled("The client left.")
            finally:
                if leaving is not None:
                    leaving.cancel()

    @contextlib.contextmanager
    def _in_line(self, caller: Caller, ear: Ear) -> Iterator[deque[Ear]]:
        """A place in the line of the caller's session, for who waits with `ear`, in the order they came; a request
        without a session is alone in one. Who is first is woken."""
        key = (caller.tenant, caller.thread_key or "")
        line = self._lines.setdefault(key, deque()) if caller.thread_key else deque()
        line.append(ear)
        try:
            yield line
        finally:
            line.remove(ear)
            if line:
                line[0].wake()
            else:
                self._lines.pop(key, None)

    async def _wait(self, busy: ResponseRunning | None, ear: Ear, deadline: float, *, is_first: bool) -> None:
        """Wait until it is worth looking again."""
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            why = busy.message if busy is not None else "Other requests wait for this thread."
            raise Busy(f"{why} Try again soon.", retry_after=2)
        if busy is not None:
            is_new = ear.add(busy.running)
            run = self.get(busy.running)
            if isinstance(busy, ThreadBusy):
                await self._make_way(run, busy.running)
            if is_new and run is None:
                return  # it may have ended before this one listened
        await ear.heard(min(POLL, left) if is_first else left)

    async def _make_way(self, run: Run | None, response_id: str) -> None:
        """End the run that has the thread's turn, if nobody follows it; or ask its process to. It is asked each time
        that this is looked at: it forgets the wish while somebody follows the run."""
        if run is not None:
            await self._end_if_deserted(run, "The next turn of the thread has taken its place.")
        else:
            await self.database.submit(ask_to_yield(response_id))

    async def _create(self, request: Request, caller: Caller) -> Run:
        if self.closing:
            raise Busy("The server is shutting down.", retry_after=1)
        self._creating += 1
        try:
            run = await self._maker.make(request, caller)
        finally:
            self._creating -= 1
        if not run.recorded and caller.retry is not None:
            self._repeatable[caller.retry.name] = run, caller.retry.body
        return self._started(run)

    async def take_up(self, row: StoredResponse) -> None:
        """Run a response that this process has claimed from the queue."""
        with self._taken():
            run = await self._maker.take_up(row)
            if run is not None:
                self._started(run)

    async def recover(self, row: StoredResponse) -> None:
        """See to a response that another process has left behind, and that is this one's now."""
        has_room = self.free > 0
        with self._taken():
            run = await self._maker.recover(row, has_room=has_room)
            if run is not None:
                self._started(run)
                self._on_deserted(run.id)

    def _started(self, run: Run) -> Run:
        self._runs[run.id] = run
        began = self._clock()
        run.ended.add_done_callback(lambda _: self._on_ended(run, began))
        if self.closing:
            self._stop(run)
        return run

    def _on_ended(self, run: Run, began: float) -> None:
        if self._runs.get(run.id) is run:
            del self._runs[run.id]
        self._take_back_timer(run)
        for name in [name for name, (one, _) in self._repeatable.items() if one is run]:
            del self._repeatable[name]
        if run.handed_over:
            return
        self._metrics.count(run.backend, run.status, self._clock() - began)
        if run.usage_missing:
            self._metrics.usage_missing.labels(run.backend).inc()

    # What others want of a run.

    async def follow(self, row: StoredResponse, after: int | None) -> Run | Tail:
        """Follow a response, wherever it runs; `after`: the number of the last event that was seen. Raises
        `CursorExpired` where numbers are not kept any more."""
        while not await self.seen(row):
            async with self.database.reading() as connection:
                row = (await load(connection, [row.id]) or [row])[0]
        run = self._runs.get(row.id)
        if run is not None and not run.silent:
            return run
        if after is not None and not row.running:
            async with self.database.reading() as connection:
                if not await has_journal(connection, row.id):
                    raise CursorExpired(
                        "The events of this response are not kept any more. Leave out 'starting_after' to get its"
                        " output as a new stream.",
                        param="starting_after",
                    )
        return self._tail(row)

    async def seen(self, row: StoredResponse) -> bool:
        """Somebody is about to be shown what was read of the response: what was shown must not be said anew, and
        what is used is kept for longer. False where it has moved since `row` was read, and must be read again."""
        if row.running:
            if row.background and row.followed_until is None:
                try:
                    await self.database.submit(sign(row.id, 0.0, of=(row.epoch, row.owner)))
                except StaleWriter:
                    return False
        elif row.store and (row.expires_at or 0) < self.database.clock() + self._keep.response - _USED_AGAIN:
            self.database.submit(use(row.id, self._keep)).add_done_callback(_forget)
        return True

    async def cancel(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Cancel a background response, wherever it runs, and wait for its end, but not for ever; its row then. None
        where there is none."""
        row = await self._find(tenant, response_id)
        if row is not None and not row.background:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        if row is None or not row.running:
            return row
        reason = Cancelled("The response was cancelled.")
        patience = asyncio.get_running_loop().time() + _CANCEL_PATIENCE
        with self.database.bell.listen(row.id) as ear:
            ending = closed(row, Told((), await fold_journal(row, ())), reason, int(self._clock()))
            ending = replace(ending, keep=self._keep)
            await self.database.submit(cancel(row, ending))
            run = self._runs.get(row.id)
            if run is not None:
                run.cancel(reason)
            while row is not None and row.running and asyncio.get_running_loop().time() < patience:
                await ear.heard(POLL)
                row = await self._find(tenant, response_id)
        return row

    async def _find(self, tenant: str, response_id: str) -> StoredResponse | None:
        async with self.database.reading() as connection:
            return await find_response(connection, tenant, response_id, self.database.clock())

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete an ended response. False where there is none."""
        async with self.database.transaction() as connection:
            return await delete_response(connection, tenant, response_id, self.database.clock())

    async def answer(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """Do what other processes ask of the runs of this one; the responses that go on all the same."""
        going_on = []
        for response_id, what in asked:
            run = self._runs.get(response_id)
            if run is None:
                continue
            if what == "cancel":
                run.cancel(Cancelled("The response was cancelled."))
            elif not await self._end_if_deserted(run, "The next turn of the thread has taken its place."):
                going_on.append(response_id)
        return going_on

    def _tail(self, row: StoredResponse) -> Tail:
        known = self._tails.get(row.id)
        return known if known is not None and not known.feed.ended else Tail(row, self._view)

    def _on_followed(self, tail: Tail) -> None:
        self._tails[tail.id] = tail
        tail.ended.add_done_callback(lambda _: self._forget(tail))

    def _forget(self, tail: Tail) -> None:
        if self._tails.get(tail.id) is tail:
            del self._tails[tail.id]

    # Runs that nobody follows.

    def _on_left(self, response_id: str) -> None:
        """The last follower of a run has left; who waits for its thread need not wait for the grace period."""
        self._on_deserted(response_id)
        self.database.bell.ring([response_id])

    def _on_deserted(self, response_id: str) -> None:
        run = self._runs.get(response_id)
        if run is not None and not (run.goes_on or run.followed or run.ended.done()):
            self._take_back_timer(run)
            loop = asyncio.get_running_loop()
            self._timers[run.id] = loop.call_later(self._limits.disconnect_grace, self._look_after, run)

    def _look_after(self, run: Run) -> None:
        ending = self._end_if_deserted(run, "The client left.")
        task = asyncio.create_task(ending, name=f"deserted-{run.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take_back_timer(self, run: Run) -> None:
        timer = self._timers.pop(run.id, None)
        if timer is not None:
            timer.cancel()

    async def _end_if_deserted(self, run: Run, why: str) -> bool:
        """Cancel a run that nobody follows, here or in another process; whether it was."""
        if run.goes_on or run.followed:
            return False
        if run.recorded and await self._is_followed_elsewhere(run):
            self._on_deserted(run.id)
            return False
        if not run.followed:
            run.cancel(Cancelled(why))
        return not run.followed

    async def _is_followed_elsewhere(self, run: Run) -> bool:
        try:
            async with self.database.reading() as connection:
                return await followed_until(connection, run.id) > self.database.clock()
        except StoreUnavailable:  # nobody can be told of its end either
            return True

    # The end of the process.

    async def close(self, grace: float) -> None:
        """Begin nothing more; give what runs and is followed `grace` seconds, then hand over or end the rest."""
        self.closing = True
        await self._wait_ended(grace)
        while self._runs or self._creating:
            for run in list(self._runs.values()):
                self._stop(run)
            await self._wait_ended(_PAUSE)
        for tail in list(self._tails.values()):
            tail.close()
        for task in list(self._tasks):
            await task

    @staticmethod
    def _stop(run: Run) -> None:
        if run.recorded:
            run.hand_over()
        else:
            run.cancel(ServerRestarted("The server was stopped while it was producing this response."))

    async def _wait_ended(self, patience: float) -> None:
        running = [run.ended for run in self._runs.values()] + [tail.ended for tail in self._tails.values()]
        if running:
            await asyncio.wait(running, timeout=patience)
        elif self._creating:
            await asyncio.sleep(min(patience, _PAUSE))


def _forget(done: "asyncio.Future[None]") -> None:
    """Nobody waits for this; what went wrong was logged."""
    if not done.cancelled():
        done.exception()


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")
