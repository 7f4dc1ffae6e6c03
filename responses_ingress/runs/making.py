"""Making runs: of a new request, of a response that waited in the queue, of one that another process began.

What must stay true: a turn of a session has its thread before its backend is called; what is wrong with a
request is raised before anything is written; a response that was claimed is run, put back or ended, whatever
is wrong with it. Nothing here waits for anything but the database.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from responses_ingress.backends.base import Backend, Route, find_backend, find_route
from responses_ingress.core.builder import Builder
from responses_ingress.core.deltas import Finish, Status
from responses_ingress.core.deltas import encode as encode_deltas
from responses_ingress.core.envelope import Envelope, changed, open_envelope, reduce, split_repeated
from responses_ingress.core.request import Caller, Request, parse_request
from responses_ingress.core.turn import Turn
from responses_ingress.errors import (
    Cancelled,
    IngressError,
    InternalError,
    ModelNotFound,
    PlacementOutdated,
    ResponseRunning,
    ServerRestarted,
    StaleWriter,
    StoreUnavailable,
    ThreadBusy,
    UpstreamError,
)
from responses_ingress.ids import Ids, named_thread, partition_of
from responses_ingress.runs.resolve import Resolved, resolve, thread_of
from responses_ingress.runs.run import Run
from responses_ingress.runs.work import Kit, Record, Work, cancel_upstream, new_item
from responses_ingress.store.database import Database
from responses_ingress.store.history import read_payloads
from responses_ingress.store.queue import enqueue, nowhere, put_back
from responses_ingress.store.responses import StoredResponse, envelope_at_creation, fold_journal, read_journal
from responses_ingress.store.turns import begin, begin_claimed, end, go_on
from responses_ingress.store.values import Ending, Entry, NewItem, NewResponse, Owner, Placement

logger = logging.getLogger(__name__)

_MOST_ATTEMPTS = 5
"""How often a response may be begun: one that takes its process down with it must not take them all."""

_MOST_RESUMPTIONS = 100
"""How often a response may be gone on with: what an upstream works on for a day outlives many a restart."""

_ANY = 10**9
_DELAY = 1.0
"""Seconds until a response that could not begin is looked at again."""


class Told(NamedTuple):
    """What a response had said: its journal, and what that makes."""

    entries: Sequence[Entry]
    builder: Builder


@dataclass(frozen=True, slots=True)
class Maker:
    """What it takes to make runs. `owner` is this process, and how long its leases are."""

    database: Database
    routes: Sequence[Route]
    ids: Ids
    kit: Kit
    owner: Owner

    async def make(self, request: Request, caller: Caller) -> Run:
        """Begin a response. Raises `AlreadyBegun`, `ResponseRunning`, `PlacementOutdated`, and what is wrong with
        the request."""
        backend, model = find_route(self.routes, request.model)
        thread_id = None
        if request.background:
            request, thread_id = self._named(request, caller)
        resolved = await resolve(self.database, self.ids, request, caller, thread_id)
        envelope = self._envelope(request, resolved.thread_id)
        turn = _turn(request, caller, resolved, envelope["id"], model)
        deltas = backend.stream(turn)  # refuses here what it cannot ask for, so that nothing is left behind
        record = await self._begin(request, caller, resolved, envelope, backend)
        return Run(turn, _work(backend, turn, deltas), envelope, record, self.kit)

    async def queue(self, request: Request, caller: Caller, most: int) -> str:
        """Let a response wait for a worker; its id. Raises `QueueFull` where `most` wait already."""
        backend, _ = find_route(self.routes, request.model)
        request, fresh = self._named(request, caller)
        thread_id = await self._checked(request, caller, fresh)
        envelope = self._envelope(request, thread_id)
        given = [new_item(item) for item in request.input]
        new = _new_response(request, caller, envelope, backend, Resolved(thread_id, None, (), (), given))
        placement = Placement(caller.tenant, thread_id, None, "", 0, 0, "")
        try:
            await self.database.submit(enqueue(replace(new, retry=caller.retry), placement, most))
        except PlacementOutdated:  # what it builds on was deleted a moment ago
            await thread_of(self.database, request, caller, fresh)
            raise
        return new.id

    async def _checked(self, request: Request, caller: Caller, fresh: str) -> str:
        """The thread of a request that is to wait, when all has been refused that can be known to be wrong."""
        try:
            resolved = await resolve(self.database, self.ids, request, caller, fresh)
        except ResponseRunning:
            return await thread_of(self.database, request, caller, fresh)
        backend, model = find_route(self.routes, request.model)
        backend.stream(_turn(request, caller, resolved, "", model))
        return resolved.thread_id

    async def take_up(self, row: StoredResponse) -> Run | None:
        """Run a response that was claimed from the queue. None where it was put back, or has ended instead."""
        owner = replace(self.owner, epoch=row.epoch)
        try:
            return await self._take_up(row, owner)
        except (ResponseRunning, PlacementOutdated):
            await self.database.submit(put_back(row, owner, _DELAY))
        except (StaleWriter, StoreUnavailable) as error:
            logger.info("response %s is left to its lease: %s", row.id, error.message)
        except IngressError as error:
            await self.close(row, error)
        except Exception as error:  # one row that cannot be read must not keep the others waiting
            logger.exception("response %s cannot be taken up", row.id)
            await self.close(row, InternalError(f"The server failed to run this request ({type(error).__name__})."))
        return None

    async def _take_up(self, row: StoredResponse, owner: Owner) -> Run:
        if row.asked == "cancel":
            raise Cancelled("The response was cancelled.")
        if row.attempts >= _MOST_ATTEMPTS:
            raise ServerRestarted("The server was restarted each time that it began to produce this response.")
        request, caller = _unpack(row)
        backend, model = find_route(self.routes, request.model)
        resolved = await resolve(self.database, self.ids, request, caller, row.thread_id)
        assert resolved.placement is not None, "what waits in the queue has a row"
        turn = _turn(request, caller, resolved, row.id, model)
        deltas = backend.stream(turn)
        lineage = orjson.dumps(caller.lineage) if caller.lineage else None
        input = _array(resolved.stored)
        begun = self.database.submit(begin_claimed(row, lineage, resolved.placement, owner, input, self.kit.keep))
        await begun
        record = Record(
            self.database, resolved.placement, owner, row.store, resolved.stored, resolved.is_turn, begun, lingers=True
        )
        return Run(turn, _work(backend, turn, deltas), envelope_at_creation(row), record, self.kit)

    async def recover(self, row: StoredResponse, *, has_room: bool) -> Run | None:
        """Law 7, for a response that was begun by another process and is this one's now: go on with it where its
        backend remembers, begin it again where nobody has seen what it said (here or, without room, whoever has
        some), else end it."""
        told = await self._told(row)
        builder = told.builder
        if row.asked == "cancel":
            await self._tell_upstream(row, builder)
            await self.close(row, Cancelled("The response was cancelled."), told)
            return None
        if builder.memory is not None and row.request is not None and not builder.has_said:
            backend = find_backend(self.routes, row.backend)
            if backend is None or backend.resumable:  # its work goes on upstream: it must not be begun a second time
                return await self._go_on(row, backend, told)
        lives = row.request is not None and row.attempts < _MOST_ATTEMPTS
        if lives and row.background and (row.followed_until is None or not builder.has_said):
            if has_room:
                return await self.take_up(row)
            await self.database.submit(put_back(row, replace(self.owner, epoch=row.epoch), 0))
            return None
        await self.close(row, ServerRestarted("The server was restarted while it was producing this response."), told)
        logger.warning("response %s was left behind by another process and is closed as failed", row.id)
        return None

    async def _go_on(self, row: StoredResponse, backend: Backend | None, told: Told) -> Run | None:
        """Let the backend go on from what it remembers; end the response where it cannot."""
        if backend is None:
            gone = UpstreamError(f"The upstream '{row.backend}' of this response is not there any more.")
            await self.close(row, gone, told)
            return None
        if row.attempts > _MOST_RESUMPTIONS:
            await self._tell_upstream(row, told.builder)
            again = ServerRestarted("The server was restarted each time that it went on with this response.")
            await self.close(row, again, told)
            return None
        try:
            return await self._resumed(row, backend, told)
        except (StaleWriter, StoreUnavailable):
            raise
        except IngressError as error:
            await self._tell_upstream(row, told.builder)
            await self.close(row, error, told)
            return None

    async def _resumed(self, row: StoredResponse, backend: Backend, told: Told) -> Run:
        request, caller = _unpack(row)
        model = next((model for found, model in self._led_to(request.model) if found is backend), request.model)
        placement, input = _place(row, caller, self.ids), _items(row)
        async with self.database.reading() as connection:
            before = await read_payloads(connection, placement.branch_id, 0, placement.position)
        context, new = [orjson.loads(item) for item in before], [orjson.loads(item.payload) for item in input]
        turn = _turn(request, caller, Resolved(row.thread_id, placement, context, new), row.id, model)
        turn = replace(turn, resume=told.builder.memory)
        deltas = backend.stream(turn)
        owner = replace(self.owner, epoch=row.epoch)
        begun = self.database.submit(go_on(row.id, placement, owner))
        try:
            await begun
        except ThreadBusy:  # another turn of its thread has begun since: this one goes on beside the thread
            placement = replace(placement, exclusive=False)
            begun = self.database.submit(go_on(row.id, placement, owner))
            await begun
        record = Record(self.database, placement, owner, row.store, input, caller.kind == "turn", begun, lingers=True)
        work = replace(_work(backend, turn, deltas), journal=told.entries)
        return Run(turn, work, envelope_at_creation(row), record, self.kit)

    def _led_to(self, model: str) -> list[tuple[Backend, str]]:
        """Where the model's name leads now, if anywhere."""
        try:
            return [find_route(self.routes, model)]
        except ModelNotFound:
            return []

    async def _tell_upstream(self, row: StoredResponse, builder: Builder) -> None:
        """Cancel what the backend remembers: nobody will ask for it any more."""
        backend = find_backend(self.routes, row.backend)
        if backend is not None and backend.resumable and builder.memory is not None:
            await cancel_upstream(row.id, backend.cancel(builder.memory, None))

    async def close(self, row: StoredResponse, error: IngressError, told: Told | None = None) -> None:
        """End a response of another process with all that it had said. `row` is this process's."""
        if told is None:
            told = await self._told(row)
        ending = closed(row, told, error, int(self.ids.clock()))
        owner = replace(self.owner, epoch=row.epoch)
        await self.database.submit(end(row.id, owner, nowhere(row), replace(ending, keep=self.kit.keep)))

    async def _told(self, row: StoredResponse) -> Told:
        async with self.database.reading() as connection:
            entries = await read_journal(connection, row.id)
        return Told(entries, await fold_journal(row, entries))

    def _named(self, request: Request, caller: Caller) -> tuple[Request, str]:
        """The request with an id for every item, so that these stay when it is run by another process, and the
        thread it makes should it make one."""
        fresh = self.ids.make("thread", self.ids.partition())
        if caller.thread_key is not None:
            partition = partition_of(named_thread(caller.tenant, caller.thread_key))
        else:
            partition = partition_of(request.previous_response_id or fresh) or partition_of(fresh)
        given = [
            item if isinstance(item.get("id"), str) else {**item, "id": self.ids.item(item["type"], partition)}
            for item in request.input
        ]
        return replace(request, input=given), fresh

    def _envelope(self, request: Request, thread_id: str) -> Envelope:
        id = self.ids.make("resp", partition_of(thread_id))
        return open_envelope(request, id, int(self.ids.clock()))

    async def _begin(
        self, request: Request, caller: Caller, resolved: Resolved, envelope: Envelope, backend: Backend
    ) -> Record | None:
        """Write the response's row. A turn that must not begin twice, or not yet, waits here until it is written."""
        placement, retry = resolved.placement, resolved.retry
        if placement is None:
            return None
        new = _new_response(request, caller, envelope, backend, resolved)
        self.kit.at("begin.before")
        begun = self.database.submit(begin(new, placement, self.owner, self.kit.keep))
        repeats = retry is not None and retry.attaches
        if placement.exclusive or request.previous_response_id is not None or repeats or request.background:
            await begun
        return Record(
            self.database,
            placement,
            self.owner,
            request.store,
            resolved.stored,
            resolved.is_turn,
            begun,
            lingers=retry is not None or request.background,
        )


def closed(row: StoredResponse, told: Told, error: IngressError, now: int) -> Ending:
    """How a response ends that its process did not end: with all it had said, and the last row of its journal."""
    entries, builder = told
    status: Status = "cancelled" if isinstance(error, Cancelled) else "failed"
    detail = None if status == "cancelled" else error.detail()
    first = sum(entry.events for entry in entries)
    finish = Finish(status, error=detail, at=now)
    builder.feed(finish)
    echo = changed(envelope_at_creation(row), builder.response())
    return Ending(
        status=status,
        input=_items(row),
        output=[new_item(item) for item in builder.output],
        echo=orjson.dumps(echo) if echo else None,
        error=orjson.dumps(detail) if detail is not None else None,
        journal=Entry(first, builder.number - first, encode_deltas([finish])),
        store=row.store,
    )


def _items(row: StoredResponse) -> list[NewItem]:
    return [new_item(item) for item in orjson.loads(row.input or b"[]")]


def _array(items: Sequence[NewItem]) -> bytes:
    return b"[" + b",".join(item.payload for item in items) + b"]"


def _place(row: StoredResponse, caller: Caller, ids: Ids) -> Placement:
    """Where a response goes on that has begun: its row tells."""
    base = row.base or ""
    return Placement(
        row.tenant,
        row.thread_id,
        caller.thread_key,
        base,
        row.own,
        row.first,
        ids.branch(partition_of(row.thread_id)),
        exclusive=caller.thread_key is not None and caller.kind == "turn",
    )


def _work(backend: Backend, turn: Turn, deltas: Any) -> Work:
    if not backend.resumable:
        return Work(deltas, backend.name, goes_on=backend.goes_on)

    async def cancel(state: Mapping[str, Any]) -> None:
        await backend.cancel(state, turn.bearer)

    return Work(deltas, backend.name, cancel, resumable=True, goes_on=backend.goes_on)


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
        stream=request.stream or request.background,
        memory=orjson.loads(resolved.memory) if resolved.memory else None,
        bearer=caller.bearer,
    )


def _new_response(
    request: Request, caller: Caller, envelope: Envelope, backend: Backend, resolved: Resolved
) -> NewResponse:
    rest, repeated = split_repeated(reduce(envelope))
    preamble = None
    if repeated:
        payload = orjson.dumps(repeated)
        preamble = (blake2b(payload, digest_size=16).digest(), payload)
    return NewResponse(
        id=envelope["id"],
        previous_response_id=request.previous_response_id,
        status="queued" if resolved.placement is None else "in_progress",
        model=request.model,
        backend=backend.name,
        background=request.background,
        store=request.store,
        envelope=orjson.dumps(rest),
        preamble=preamble,
        input=_array(resolved.stored),
        created_at=envelope["created_at"],
        lineage=orjson.dumps(caller.lineage) if caller.lineage else None,
        request=_pack(request, caller) if request.background or backend.resumable else None,
        retry=resolved.retry,
        followed=request.background and request.stream,
    )


def _pack(request: Request, caller: Caller) -> bytes:
    """What another process needs to make the same run. The client's own credential is no part of it."""
    told = asdict(replace(caller, bearer=None, retry=None))
    return orjson.dumps({"body": {**request.body, "input": request.input}, "caller": told})


def _unpack(row: StoredResponse) -> tuple[Request, Caller]:
    packed = orjson.loads(row.request or b"{}")
    return parse_request(packed["body"], max_items=_ANY), Caller(**packed["caller"])
