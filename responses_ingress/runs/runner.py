"""The runner: begins runs, knows those of this process, and finds those a dead process left behind.

What must stay true: a turn of a session has its thread before its backend is called; a run nobody
follows ends after the grace period, unless it works in the background; every unfinished response whose
lease has run out is closed; only this room starts a task for a response.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from responses_ingress.backends.base import Route, find_route
from responses_ingress.core.deltas import Finish
from responses_ingress.core.envelope import Envelope, open_envelope, reduce, split_repeated
from responses_ingress.core.replay import fold
from responses_ingress.core.request import Caller, Request
from responses_ingress.core.turn import Turn
from responses_ingress.errors import (
    Busy,
    Cancelled,
    IngressError,
    PlacementOutdated,
    ResponseRunning,
    ServerRestarted,
    StoreUnavailable,
    ThreadBusy,
)
from responses_ingress.ids import Ids, partition_of
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.resolve import Resolved, resolve
from responses_ingress.runs.run import Kit, Record, Run, new_item
from responses_ingress.store.database import Database, renew_leases
from responses_ingress.store.responses import (
    StoredResponse,
    delete_response,
    envelope_of,
    find_expired,
    read_journal,
)
from responses_ingress.store.turns import Ending, NewResponse, Owner, Placement, begin, end, take_over

logger = logging.getLogger(__name__)

_POLL = 0.25

Gone = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; see docs/configuration.md for each."""

    flush_interval: float = 0.1
    disconnect_grace: float = 10.0
    thread_wait: float = 30.0
    lease: float = 30.0
    max_runs: int = 1000


class Runner:
    """The runs of one process. Open it in the running loop."""

    def __init__(self, database: Database, routes: Sequence[Route], limits: Limits, metrics: Metrics, ids: Ids) -> None:
        self._database = database
        self._routes = routes
        self._limits = limits
        self._metrics = metrics
        self._clock = ids.clock
        self._ids = ids
        self._owner = Owner(ids.request(), 1, limits.lease)
        self._kit = Kit(ids, limits.flush_interval, self._on_deserted)
        self._runs: dict[str, Run] = {}
        self._recorded: set[str] = set()
        self._lines: dict[tuple[str, str], deque[object]] = {}
        self._waiting = 0
        self._creating = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}  # what ends a run that nobody follows
        self._stopping = asyncio.Event()
        self._closing = False
        metrics.running.set_function(lambda: len(self._runs))
        self._upkeep = asyncio.create_task(self._keep_up(), name="runs-upkeep")

    def get(self, response_id: str) -> Run | None:
        """The run of this process that is producing the response, if one is."""
        return self._runs.get(response_id)

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

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete an ended response. False where there is none."""
        async with self._database.transaction() as connection:
            return await delete_response(connection, tenant, response_id)

    async def create(self, request: Request, caller: Caller, gone: Gone | None = None) -> Run:
        """Begin a response. What is wrong with the request itself is raised before anything is written.

        gone: returns when the client has left; a request that waits for its turn is dropped then.
        """
        if self._closing or len(self._runs) + self._waiting >= self._limits.max_runs:
            raise Busy("The server is at its limit of running responses. Try again soon.", retry_after=1)
        if caller.thread_key is None and request.previous_response_id is None:
            return await self._create(request, caller)
        self._waiting += 1
        try:
            return await self._create_in_line(request, caller, gone)
        finally:
            self._waiting -= 1

    async def _create_in_line(self, request: Request, caller: Caller, gone: Gone | None) -> Run:
        """Begin a response that builds on others, when those have ended: the first that came first."""
        deadline = asyncio.get_running_loop().time() + self._limits.thread_wait
        key = (caller.tenant, caller.thread_key or "")
        line = self._lines.setdefault(key, deque()) if caller.thread_key else deque[object]()
        ticket, in_the_way = object(), None
        line.append(ticket)
        try:
            while True:
                if line[0] is ticket:
                    try:
                        return await self._create(request, caller)
                    except PlacementOutdated:
                        continue
                    except ResponseRunning as busy:
                        in_the_way = busy
                await self._wait_for(in_the_way, deadline, gone)
        finally:
            line.remove(ticket)
            if not line:
                self._lines.pop(key, None)

    async def _create(self, request: Request, caller: Caller) -> Run:
        if self._closing:
            raise Busy("The server is shutting down.", retry_after=1)
        self._creating += 1
        try:
            run = await self._make(request, caller)
        finally:
            self._creating -= 1
        if self._closing:
            run.cancel(_stopped())
        return run

    async def _make(self, request: Request, caller: Caller) -> Run:
        backend, model = find_route(self._routes, request.model)
        resolved = await resolve(self._database, self._ids, request, caller)
        envelope = self._envelope(request, resolved)
        turn = _turn(request, caller, resolved, envelope["id"], model)
        deltas = backend.stream(turn)  # refuses here what it cannot ask for, so that nothing is left behind
        record = await self._begin(request, caller, resolved, envelope, backend.name)
        return self._started(Run(turn, deltas, envelope, record, self._kit), backend.name)

    def _envelope(self, request: Request, resolved: Resolved) -> Envelope:
        id = self._ids.make("resp", partition_of(resolved.thread_id))
        return open_envelope(request, id, int(self._clock()))

    async def _begin(
        self, request: Request, caller: Caller, resolved: Resolved, envelope: Envelope, backend: str
    ) -> Record | None:
        """Write the response's row. A turn of a session waits here until it has its thread."""
        if resolved.placement is None:
            return None
        new = _new_response(request, caller, resolved, envelope, backend)
        begun = self._database.submit(begin(new, resolved.placement, self._owner))
        if resolved.placement.exclusive or request.previous_response_id is not None:
            await begun
        return Record(
            self._database,
            resolved.placement,
            self._owner,
            request.store,
            resolved.stored,
            resolved.is_turn,
            begun,
        )

    def _started(self, run: Run, backend: str) -> Run:
        self._runs[run.id] = run
        if run.recorded:
            self._recorded.add(run.id)
        began = self._clock()
        run.ended.add_done_callback(lambda _: self._on_ended(run, backend, began))
        return run

    def _on_ended(self, run: Run, backend: str, began: float) -> None:
        del self._runs[run.id]
        self._take_back_timer(run)
        self._recorded.discard(run.id)
        self._metrics.count(backend, run.status, self._clock() - began)
        if run.usage_missing:
            self._metrics.usage_missing.labels(backend).inc()

    async def _wait_for(self, busy: ResponseRunning | None, deadline: float, gone: Gone | None) -> None:
        """Wait until it is worth looking again: until the run in the way has ended, where it is one of ours."""
        run = self._runs.get(busy.running) if busy is not None else None
        leaving = asyncio.ensure_future(gone()) if gone is not None else None
        try:
            while True:
                if isinstance(busy, ThreadBusy) and run is not None and not run.background and not run.feed.followed:
                    run.cancel(Cancelled("The next turn of the thread has taken its place."))
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    why = busy.message if busy is not None else "Other requests wait for this thread."
                    raise Busy(f"{why} Try again soon.", retry_after=2)
                await _first_of(run.ended if run is not None else None, leaving, min(_POLL, left))
                if leaving is not None and leaving.done():
                    raise Cancelled("The client left.")
                if run is None or run.ended.done():
                    return
        finally:
            if leaving is not None:
                leaving.cancel()

    def _on_deserted(self, run: Run) -> None:
        if not run.background:
            self._take_back_timer(run)
            loop = asyncio.get_running_loop()
            self._timers[run.id] = loop.call_later(self._limits.disconnect_grace, self._cancel_if_deserted, run)

    def _take_back_timer(self, run: Run) -> None:
        timer = self._timers.pop(run.id, None)
        if timer is not None:
            timer.cancel()

    def _cancel_if_deserted(self, run: Run) -> None:
        if not run.feed.followed:
            run.cancel(Cancelled("The client left."))

    async def close(self, grace: float) -> None:
        """Begin nothing more; give running turns `grace` seconds, then close what is left. Once is enough."""
        self._closing = True
        await self._wait_ended(grace)
        while self._runs or self._creating:
            for run in list(self._runs.values()):
                run.cancel(_stopped())
            await self._wait_ended(_POLL)
        self._stopping.set()
        await self._upkeep

    async def _wait_ended(self, patience: float) -> None:
        running = [run.ended for run in self._runs.values()]
        if running:
            await asyncio.wait(running, timeout=patience)
        elif self._creating:
            await asyncio.sleep(min(patience, _POLL))

    async def _keep_up(self) -> None:
        """Renew our leases and close what others left behind, three times per lease."""
        while not self._stopping.is_set():
            try:
                await self._renew()
                await self._recover()
            except StoreUnavailable as error:
                logger.warning("upkeep is put off: %s", error.message)
            except Exception:  # without upkeep, leases lapse and threads are given away while they are busy
                logger.exception("upkeep failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.lease / 3):
                    await self._stopping.wait()

    async def _renew(self) -> None:
        if self._recorded:
            async with self._database.transaction() as connection:
                until = self._clock() + self._limits.lease
                await renew_leases(connection, self._owner.name, list(self._recorded), until)

    async def _recover(self) -> None:
        async with self._database.reading() as connection:
            expired = await find_expired(connection, self._clock())
        for row in expired:
            try:
                await self._close_left_behind(row)
            except IngressError as error:
                logger.info("response %s is another worker's to close: %s", row.id, error.message)
            except Exception:  # one row that cannot be read must not keep the others open
                logger.exception("response %s was left behind and cannot be closed", row.id)

    async def _close_left_behind(self, row: StoredResponse) -> None:
        """Law 7: fold what the journal holds, and end the response as failed with a code that says why."""
        owner = Owner(self._owner.name, row.epoch + 1, self._limits.lease)
        await self._database.submit(take_over(row.id, row.epoch, owner))
        async with self._database.reading() as connection:
            batches = await read_journal(connection, row.id)
        builder = fold(envelope_of(row), batches, silent=True)
        error = ServerRestarted("The server was restarted while it was producing this response.")
        builder.feed(Finish("failed", error=error.detail(), at=int(self._clock())))
        ending = Ending(
            status="failed",
            envelope=row.envelope,
            input=[new_item(item) for item in orjson.loads(row.input or b"[]")],
            output=[new_item(item) for item in builder.output],
            error=orjson.dumps(error.detail()),
        )
        placement = Placement(row.tenant, row.thread_id, None, "", row.own, row.first, "", exclusive=True)
        await self._database.submit(end(row.id, owner, placement, ending, row.store))
        logger.warning("response %s was left behind by another process and is closed as failed", row.id)


def _stopped() -> ServerRestarted:
    return ServerRestarted("The server was stopped while it was producing this response.")


async def _first_of(ended: Awaitable[None] | None, leaving: Awaitable[None] | None, patience: float) -> None:
    news = [asyncio.ensure_future(one) for one in (ended, leaving) if one is not None]
    if news:
        await asyncio.wait(news, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(patience)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _turn(request: Request, caller: Caller, resolved: Resolved, response_id: str, model: str) -> Turn:
    return Turn(
        response_id=response_id,
        thread_id=resolved.thread_id,
        model=model,
        instructions=request.instructions,
        context=resolved.context,
        new=resolved.new,
        tools=request.tools,
        tool_choice=request.body.get("tool_choice") or "auto",
        parameters=request.body,
        stream=request.stream,
        memory=orjson.loads(resolved.memory) if resolved.memory else None,
        bearer=caller.bearer,
    )


def _new_response(
    request: Request, caller: Caller, resolved: Resolved, envelope: Envelope, backend: str
) -> NewResponse:
    rest, repeated = split_repeated(reduce(envelope))
    preamble = None
    if repeated and request.store:
        payload = orjson.dumps(repeated)
        preamble = (blake2b(payload, digest_size=16).digest(), payload)
    return NewResponse(
        id=envelope["id"],
        previous_response_id=request.previous_response_id,
        status=envelope["status"],
        model=request.model,
        backend=backend,
        background=request.background,
        store=request.store,
        envelope=orjson.dumps(rest),
        preamble=preamble,
        input=b"[" + b",".join(item.payload for item in resolved.stored) + b"]",
        created_at=envelope["created_at"],
        lineage=orjson.dumps(caller.lineage) if caller.lineage else None,
    )
