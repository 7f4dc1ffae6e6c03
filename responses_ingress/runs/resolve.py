"""What a request means: which thread it belongs to, and which items its turn is about.

The rules, in order (docs/architecture.md, "What a request means"):
1. `previous_response_id`: the stored history up to there, then the input.
2. a session whose client carries its own history: the input as sent, laid along the thread's branch so
   that only what is new is stored.
3. a session otherwise: the thread's active branch, then the input.
4. neither: the input alone.
Requests that are no turns (codex's prewarm, memory, compaction) are answered beside the thread.

What must stay true: this only reads. What it found may have changed when the response begins; the store
checks that then (`Placement.seen`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import orjson
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.context import align
from responses_ingress.core.deltas import Item
from responses_ingress.core.items import OUTPUTS, digest, is_model_made, packed
from responses_ingress.core.request import Caller, Request, Retry, digest16
from responses_ingress.errors import (
    NotFound,
    PreviousNotCompleted,
    PreviousNotFound,
    ResponseRunning,
)
from responses_ingress.ids import Ids, named_thread, partition_of, root_branch
from responses_ingress.store.database import Database
from responses_ingress.store.history import (
    ThreadHead,
    find_holder,
    find_items,
    find_thread,
    read_digests,
    read_payloads,
)
from responses_ingress.store.responses import StoredResponse, find_response
from responses_ingress.store.values import NewItem, Placement


@dataclass(frozen=True, slots=True)
class Resolved:
    """A request's place and its items. `placement` is None where nothing is to be written.

    stored:  what of `new` becomes part of the thread, as the branch takes it.
    is_turn: the answer becomes part of the thread too.
    retry:   by what the request is known when it comes again.
    """

    thread_id: str
    placement: Placement | None
    context: Sequence[Item]
    new: Sequence[Item]
    stored: Sequence[NewItem] = ()
    is_turn: bool = True
    memory: bytes | None = None
    retry: Retry | None = None


async def resolve(
    database: Database, ids: Ids, request: Request, caller: Caller, thread_id: str | None = None
) -> Resolved:
    """`thread_id`: the thread that was made for the request when it was queued. Raises `PreviousNotFound`,
    `PreviousNotCompleted`, `NotFound` (a conversation, a referenced item), `ResponseRunning`."""
    if request.conversation is not None:
        raise NotFound(f"Conversation with id '{request.conversation[:100]}' not found.")
    resolved = await _resolve(database, ids, request, caller, thread_id or ids.make("thread", ids.partition()))
    return resolved if caller.retry is None else replace(resolved, retry=caller.retry)


async def thread_of(database: Database, request: Request, caller: Caller, fresh: str) -> str:
    """The thread of a request that cannot be resolved yet, because what it builds on still runs; `fresh` where it
    makes one. Raises `PreviousNotFound`."""
    if caller.thread_key is not None and caller.kind == "turn":
        return named_thread(caller.tenant, caller.thread_key)
    previous = request.previous_response_id
    if previous is None:
        return fresh
    async with database.reading() as connection:
        return (await _previous(connection, caller.tenant, previous, database.clock())).thread_id


async def _resolve(database: Database, ids: Ids, request: Request, caller: Caller, fresh: str) -> Resolved:
    given = await _dereference(database, caller.tenant, request.input)
    is_turn = caller.kind == "turn"
    if request.previous_response_id is not None:
        caller = caller if is_turn else replace(caller, thread_key=None)
        return await _after_previous(database, ids, request, caller, given)
    if not is_turn:
        return await _beside_the_thread(database, ids, request, caller, given, fresh)
    if caller.thread_key is not None:
        return await _in_session(database, ids, request, caller, given)
    return _alone(ids, request, caller, given, fresh)


async def _beside_the_thread(
    database: Database, ids: Ids, request: Request, caller: Caller, given: Sequence[Item], fresh: str
) -> Resolved:
    """Codex's prewarm, memory and compaction requests are no turns of the thread. But a compaction in the
    middle of a turn is the first and last to bring the outputs of the tools that ran before it."""
    alone = _alone(ids, request, replace(caller, thread_key=None), given, fresh)
    if caller.kind != "compaction" or caller.thread_key is None or request.store:
        return alone
    async with database.reading() as connection:
        placement, _ = await _session(connection, ids, caller)
        carried = await _carried(connection, ids, placement, caller, given, [digest(item) for item in given])
    outputs = list(takewhile(lambda item: item.type in OUTPUTS, carried.stored))
    return replace(carried, stored=outputs, is_turn=False) if outputs else alone


def _alone(ids: Ids, request: Request, caller: Caller, given: Sequence[Item], thread_id: str) -> Resolved:
    if not (request.store or request.background):
        return Resolved(thread_id, None, (), given)
    root = root_branch(thread_id)
    placement = Placement(caller.tenant, thread_id, None, root, 0, 0, ids.branch(partition_of(thread_id)), root)
    return _resolved(ids, placement, (), given)


async def _after_previous(
    database: Database, ids: Ids, request: Request, caller: Caller, given: Sequence[Item]
) -> Resolved:
    previous = request.previous_response_id or ""
    async with database.reading() as connection:
        row = await _previous(connection, caller.tenant, previous, database.clock())
        if row.running:
            raise ResponseRunning(row.id)
        if row.branch_id is None or row.stop is None:
            raise PreviousNotCompleted(
                f"Previous response with id '{previous}' has status '{row.status}' and cannot be built on.",
                param="previous_response_id",
            )
        context = _parsed(await read_payloads(connection, row.branch_id, 0, row.stop))
        if caller.thread_key is not None:
            placement, _ = await _session(connection, ids, caller)
            placement = replace(placement, branch_id=row.branch_id, position=row.stop, first=row.stop)
        elif request.store or request.background:
            branch = ids.branch(partition_of(row.thread_id))
            placement = Placement(caller.tenant, row.thread_id, None, row.branch_id, row.stop, row.stop, branch)
        else:
            if await find_response(connection, caller.tenant, previous, database.clock()) is None:
                raise PreviousNotFound(_gone(previous), param="previous_response_id")  # deleted while it was read
            return Resolved(row.thread_id, None, context, given, memory=row.memory)
    return replace(_resolved(ids, placement, context, given), memory=row.memory)


async def _previous(connection: AsyncConnection, tenant: str, previous: str, now: float) -> StoredResponse:
    row = await find_response(connection, tenant, previous, now)
    if row is None or not row.store:
        raise PreviousNotFound(_gone(previous), param="previous_response_id")
    return row


def _gone(response_id: str) -> str:
    return f"Previous response with id '{response_id[:100]}' not found."


async def _session(connection: AsyncConnection, ids: Ids, caller: Caller) -> tuple[Placement, ThreadHead | None]:
    """The place behind all that is on the session's active branch."""
    key = caller.thread_key or ""
    thread_id = named_thread(caller.tenant, key)
    branch = ids.branch(partition_of(thread_id))
    head = await find_thread(connection, caller.tenant, thread_id)
    if head is None:
        root = ids.branch(partition_of(thread_id))
        return Placement(caller.tenant, thread_id, key, root, 0, 0, branch, root, exclusive=True), None
    placement = Placement(
        caller.tenant,
        thread_id,
        key,
        head.active_branch,
        head.head,
        head.head,
        branch,
        exclusive=True,
        seen=(head.active_branch, head.head),
    )
    return placement, head


async def _in_session(
    database: Database, ids: Ids, request: Request, caller: Caller, given: Sequence[Item]
) -> Resolved:
    digests = [digest(item) for item in given]
    async with database.reading() as connection:
        placement, head = await _session(connection, ids, caller)
        memory = head.memory if head else None
        if not request.store or any(is_model_made(item) for item in given):
            resolved = await _carried(connection, ids, placement, caller, given, digests)
        else:
            context = _parsed(await read_payloads(connection, placement.branch_id, 0, placement.position))
            resolved = _resolved(ids, placement, context, given)
    return replace(resolved, memory=memory, retry=_codex_retry(caller, digests))


def _codex_retry(caller: Caller, digests: Sequence[bytes]) -> Retry | None:
    """Codex sends the same thread, turn and input twice only when it did not get the answer."""
    if caller.turn_id is None:
        return None
    names = (caller.tenant, caller.thread_key or "", caller.turn_id)
    return Retry(digest16(b"codex", *(name.encode() for name in names), *digests), attaches=True)


async def _carried(
    connection: AsyncConnection,
    ids: Ids,
    placement: Placement,
    caller: Caller,
    given: Sequence[Item],
    digests: Sequence[bytes],
) -> Resolved:
    """The client sent its history: store only what the branch does not have.

    A thread that codex forked from another one begins on that one's branch.
    """
    if placement.root is not None and caller.forked_from is not None:
        parent = await find_thread(connection, caller.tenant, named_thread(caller.tenant, caller.forked_from))
        if parent is not None:
            placement = replace(placement, branch_id=parent.active_branch, position=parent.head)
    stored = await read_digests(connection, placement.branch_id, placement.position)
    position, tail = align(stored, digests)
    if position == 0 and placement.root is not None:
        placement = replace(placement, branch_id=placement.root)
    elif 0 < position < placement.position:
        placement = replace(placement, holder=await find_holder(connection, placement.branch_id, position))
    placement = replace(placement, position=position, first=0)
    return _resolved(ids, placement, given[:tail], given[tail:], digests[tail:])


def _resolved(
    ids: Ids, placement: Placement, context: Sequence[Item], new: Sequence[Item], digests: Sequence[bytes] | None = None
) -> Resolved:
    partition = partition_of(placement.thread_id)
    named = [item if isinstance(item.get("id"), str) else _named(item, ids, partition) for item in new]
    stored = [
        NewItem(item["id"], item["type"], digests[at] if digests else digest(item), packed(item))
        for at, item in enumerate(named)
    ]
    return Resolved(placement.thread_id, placement, context, named, stored)


def _named(item: Item, ids: Ids, partition: str) -> Item:
    return {**item, "id": ids.item(item["type"], partition)}


def _parsed(payloads: Sequence[bytes]) -> list[Item]:
    items: list[Item] = orjson.loads(b"[" + b",".join(payloads) + b"]")
    return items


async def _dereference(database: Database, tenant: str, given: Sequence[Item]) -> Sequence[Item]:
    """The input with every `item_reference` replaced by the stored item."""
    wanted = [item["id"] for item in given if item["type"] == "item_reference"]
    if not wanted:
        return given
    async with database.reading() as connection:
        found = await find_items(connection, tenant, wanted)
    missing = next((id for id in wanted if id not in found), None)
    if missing is not None:
        raise NotFound(f"Item with id '{missing[:100]}' not found.", param="input")
    return [orjson.loads(found[item["id"]]) if item["type"] == "item_reference" else item for item in given]
