"""The life of a response in the database, as units of work: begin, journal, end. What comes before and
between processes (waiting, claiming, asking) is in store/queue.

What must stay true (laws 2 to 4 of the pump): `begin` decides alone who has the thread; every later
write carries the lease's epoch and is refused when another worker has taken over; the ending writes the
status, the items, the branch's head and the release of the thread in one transaction, once. Only a turn
that completed or is incomplete moves the branch; any other keeps its input and output on its own row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import bindparam, delete, null, text, update

from responses_ingress.core.request import Retry
from responses_ingress.errors import AlreadyBegun, KeyReused, PlacementOutdated, StaleWriter, ThreadBusy
from responses_ingress.ids import is_named
from responses_ingress.store.responses import StoredResponse
from responses_ingress.store.tables import items, journal, responses, threads
from responses_ingress.store.values import DEFAULT_KEEP, Ending, Entry, Keep, NewResponse, Owner, Placement
from responses_ingress.store.wake import said
from responses_ingress.store.writer import RUNNING, Batch, Branch, Lease, Repeat, Thread, Unit, insert_of

_INSERT_THREAD = insert_of(threads)
_NEW = (
    "id",
    "tenant",
    "thread_id",
    "first",
    "own",
    "base",
    "previous_response_id",
    "status",
    "model",
    "backend",
    "background",
    "store",
    "request",
    "envelope",
    "preamble",
    "input",
    "owner",
    "lease_until",
    "epoch",
    "followed_until",
    "retry_key",
    "retry_body",
    "created_at",
)
_INSERT_RESPONSE = insert_of(responses, *_NEW)
_INSERT_ITEM = insert_of(items)
# A batch whose commit nobody heard of is written again, and one without events again with what comes after it; the
# lease's epoch has seen to it that both are this run's.
_INSERT_JOURNAL = text(
    "INSERT INTO journal (response_id, first, tenant, count, payload)"
    " VALUES (:response_id, :first, :tenant, :count, :payload)"
    " ON CONFLICT (response_id, first) DO UPDATE SET count = excluded.count, payload = excluded.payload"
    " WHERE journal.count = 0"
)
_INSERT_PREAMBLE = text(  # another worker may just have inserted it
    "INSERT INTO preambles (tenant, digest, payload) VALUES (:tenant, :digest, :payload) ON CONFLICT DO NOTHING"
)
_DELETE_RESPONSE = delete(responses).where(responses.c.id == bindparam("response"))
DELETE_JOURNAL = delete(journal).where(journal.c.response_id == bindparam("response"))
_ENDING = (
    "branch_id",
    "output_at",
    "stop",
    "status",
    "echo",
    "input",
    "output",
    "error",
    "usage",
    "incomplete",
    "memory",
    "completed_at",
    "journal_until",
    "expires_at",
)
_END_RESPONSE = (
    update(responses)
    .where(responses.c.id == bindparam("response"))
    .values(
        owner=null(),
        lease_until=null(),
        request=null(),
        asked=null(),
        **{column: bindparam(f"end_{column}") for column in _ENDING},
    )
)
_REMEMBER = update(threads).where(threads.c.id == bindparam("thread")).values(memory=bindparam("new_memory"))
_USED = (
    update(responses)
    .where(responses.c.id == bindparam("response"), responses.c.expires_at < bindparam("new_expires"))
    .values(expires_at=bindparam("new_expires"))
)
_BEGUN = (
    update(responses)
    .where(responses.c.id == bindparam("response"))
    .values(
        {
            name: bindparam(f"begun_{name}")
            for name in ("thread_id", "first", "own", "base", "status", "input", "owner", "lease_until", "epoch")
        }
    )
)


def begin(new: NewResponse, placement: Placement, owner: Owner, keep: Keep = DEFAULT_KEEP) -> Unit[None]:
    """Write the response's row and, where the turn is exclusive, take the thread.

    Raises `AlreadyBegun` for a request that was begun before, `KeyReused` where that one asked something else,
    `ThreadBusy` while another turn has the thread, `PlacementOutdated` when it has moved since it was read.
    """

    def apply(batch: Batch) -> None:
        check_repeat(batch, new.retry)
        check_previous(batch, new.previous_response_id)
        _take_place(batch, new.id, new.created_at, new.lineage, placement, owner)
        _use_previous(batch, new.previous_response_id, keep)
        add_response(batch, new, placement, owner)

    return Unit(
        apply,
        responses=(new.previous_response_id,) if new.previous_response_id else (),
        threads=(placement.thread_id,) if placement.exclusive else (),
        branches=_relied_on(placement),
        preambles=told_in(new, placement),
        repeats=(new.retry,) if new.retry is not None else (),
    )


def begin_claimed(
    row: StoredResponse,
    lineage: bytes | None,
    placement: Placement,
    owner: Owner,
    input: bytes,
    keep: Keep = DEFAULT_KEEP,
) -> Unit[None]:
    """Let a response that this worker has claimed begin, from the start. Raises as `begin` does, and
    `StaleWriter` where it is not this worker's any more."""
    previous = row.previous_response_id

    def apply(batch: Batch) -> None:
        check_lease(batch, row.id, owner)
        check_previous(batch, previous)
        _take_place(batch, row.id, row.created_at, lineage, placement, owner)
        _use_previous(batch, previous, keep)
        batch.add(DELETE_JOURNAL, response=row.id)
        batch.add(
            _BEGUN,
            response=row.id,
            begun_thread_id=placement.thread_id,
            begun_first=placement.first,
            begun_own=placement.position,
            begun_base=placement.branch_id,
            begun_status="in_progress",
            begun_input=input,
            begun_owner=owner.name,
            begun_lease_until=batch.now + owner.lease,
            begun_epoch=owner.epoch,
        )
        batch.ring(row.id)

    return Unit(
        apply,
        responses=(row.id, previous) if previous else (row.id,),
        threads=(placement.thread_id,) if placement.exclusive else (),
        branches=_relied_on(placement) or (placement.branch_id,),  # which an earlier beginning may have made
    )


def go_on(response_id: str, placement: Placement, owner: Owner) -> Unit[None]:
    """Let a response that this worker has taken over go on as it is. Raises `ThreadBusy` where its thread's turn
    is another's by now."""

    def apply(batch: Batch) -> None:
        check_lease(batch, response_id, owner)
        thread = batch.threads.get(placement.thread_id)
        if thread is None:
            return
        if thread.running not in (None, response_id) and thread.lease_until > batch.now:
            raise ThreadBusy(thread.running or "")
        thread.running, thread.lease_until = response_id, batch.now + owner.lease
        batch.set_thread(thread)

    threads = (placement.thread_id,) if placement.exclusive else ()
    return Unit(apply, responses=(response_id,), threads=threads)


def check_previous(batch: Batch, previous: str | None) -> None:
    """Raise `PlacementOutdated` where what a response builds on is gone."""
    if previous is not None and previous not in batch.leases:
        raise PlacementOutdated  # deleted since it was read, and maybe its items with it


def _use_previous(batch: Batch, previous: str | None, keep: Keep) -> None:
    if previous is not None:
        batch.add(_USED, response=previous, new_expires=batch.now + keep.response)


def _relied_on(placement: Placement) -> tuple[str, ...]:
    """The branches that may have changed since they were read: the session's active one, and the one that a
    forked thread begins on."""
    if placement.seen is not None:
        return placement.seen[:1]
    return (placement.branch_id,) if placement.exclusive and placement.branch_id != placement.root else ()


def check_repeat(batch: Batch, retry: Retry | None) -> None:
    """Raise `AlreadyBegun` where `retry` means a response that runs, or has just ended well. One that failed is
    no answer to a request that is made again."""
    if retry is None or not retry.attaches:
        return
    made = batch.repeats[retry.name]
    for known in made:
        if known.created_at < made[0].created_at:
            return  # the last time, it failed
        ended_well = known.status in ("completed", "incomplete")
        if known.status in RUNNING or (ended_well and (known.journal_until or 0) > batch.now):
            if retry.body is not None and known.body not in (None, retry.body):
                raise KeyReused("This Idempotency-Key was used for another request.")
            raise AlreadyBegun(known.id)


def _take_place(
    batch: Batch, response_id: str, created_at: int, lineage: bytes | None, placement: Placement, owner: Owner
) -> None:
    if placement.exclusive:
        _take_thread(batch, _Taker(response_id, created_at, lineage), placement, owner)
    elif placement.root is not None and placement.root not in batch.branches:
        batch.add_branch(Branch(placement.root, placement.thread_id, 0), placement.tenant)


@dataclass(frozen=True, slots=True)
class _Taker:
    """The response that takes a thread's turn, as far as the thread notes it."""

    id: str
    created_at: int
    lineage: bytes | None


def _take_thread(batch: Batch, new: _Taker, placement: Placement, owner: Owner) -> None:
    """Give the thread's one running turn to this response."""
    thread = batch.threads.get(placement.thread_id)
    if thread is None:
        if placement.root is None or not all(_reaches(batch, id, placement) for id in _relied_on(placement)):
            raise PlacementOutdated
        _add_thread(batch, new, placement, placement.root, owner)
        return
    if thread.running not in (None, new.id) and thread.lease_until > batch.now:
        raise ThreadBusy(thread.running)
    branch = batch.branches.get(thread.active_branch)
    if branch is None or placement.seen != (branch.id, branch.head):
        raise PlacementOutdated
    thread.running, thread.lease_until = new.id, batch.now + owner.lease
    thread.lineage = _merged(thread.lineage, new.lineage)
    batch.set_thread(thread)


def _reaches(batch: Batch, branch_id: str, placement: Placement) -> bool:
    branch = batch.branches.get(branch_id)
    return branch is not None and branch.head >= placement.position


def _merged(known: bytes | None, told: bytes | None) -> bytes | None:
    """What is known of a thread's lineage: a later turn adds to it and says nothing of most of it."""
    if known is None or told is None or known == told:
        return told or known
    return orjson.dumps({**orjson.loads(known), **orjson.loads(told)})


def _add_thread(batch: Batch, new: _Taker, placement: Placement, root: str, owner: Owner) -> None:
    """A thread begins with an empty branch, whatever its first turn continues: should that turn fail, it was
    nothing."""
    lease_until = batch.now + owner.lease
    thread = Thread(placement.thread_id, placement.tenant, root, new.id, lease_until, new.lineage)
    batch.add(
        _INSERT_THREAD,
        id=thread.id,
        tenant=thread.tenant,
        key=placement.thread_key,
        active_branch=thread.active_branch,
        running=thread.running,
        lease_until=lease_until,
        lineage=thread.lineage,
        memory=None,
        created_at=new.created_at,
        updated_at=new.created_at,
    )
    batch.threads[thread.id] = thread
    batch.add_branch(Branch(root, thread.id, 0), placement.tenant)


def add_response(batch: Batch, new: NewResponse, placement: Placement, owner: Owner | None) -> None:
    """Write the row, and what repeats of it. Without an owner it waits for one from now on."""
    if new.preamble is not None and not batch.preambles.issuperset(told_in(new, placement)):
        digest, payload = new.preamble
        batch.preambles.add((placement.tenant, digest))
        batch.add(_INSERT_PREAMBLE, tenant=placement.tenant, digest=digest, payload=payload)
    epoch = owner.epoch if owner is not None else 0
    batch.leases[new.id] = Lease(epoch, new.status, owner.name if owner is not None else None)
    if new.retry is not None:
        made = Repeat(new.id, new.retry.body, new.status, None, new.created_at)
        batch.repeats[new.retry.name].insert(0, made)
    batch.add(
        _INSERT_RESPONSE,
        id=new.id,
        tenant=placement.tenant,
        thread_id=placement.thread_id,
        first=placement.first,
        own=placement.position,
        base=placement.branch_id if owner is not None else None,
        previous_response_id=new.previous_response_id,
        status=new.status,
        model=new.model,
        backend=new.backend,
        background=new.background,
        store=new.store,
        request=new.request,
        envelope=new.envelope,
        preamble=new.preamble[0] if new.preamble else None,
        input=new.input,
        owner=owner.name if owner is not None else None,
        lease_until=batch.now + (owner.lease if owner is not None else 0),
        epoch=epoch,
        followed_until=batch.now if new.followed else None,
        retry_key=new.retry.name if new.retry is not None else None,
        retry_body=new.retry.body if new.retry is not None else None,
        created_at=new.created_at,
    )


def told_in(new: NewResponse, placement: Placement) -> tuple[tuple[str, bytes], ...]:
    """The key of the preamble that the response has, if it has one."""
    return ((placement.tenant, new.preamble[0]),) if new.preamble is not None else ()


def append_journal(response_id: str, owner: Owner, tenant: str, entry: Entry) -> Unit[None]:
    """Write a batch of a run's deltas."""

    def apply(batch: Batch) -> None:
        check_lease(batch, response_id, owner)
        _add_entry(batch, response_id, tenant, entry)
        batch.ring(said(response_id))

    return Unit(apply, responses=(response_id,), patient=True)


def _add_entry(batch: Batch, response_id: str, tenant: str, entry: Entry) -> None:
    first, events, payload = entry
    batch.add(_INSERT_JOURNAL, response_id=response_id, first=first, tenant=tenant, count=events, payload=payload)


def end(response_id: str, owner: Owner, placement: Placement, ending: Ending) -> Unit[None]:
    """Write everything the end of a response changes."""
    applied: list[bool] = []

    def apply(batch: Batch) -> None:
        if applied and _is_written(batch.leases.get(response_id), owner, ending):
            return  # it was committed, and the connection lost before anybody heard of it
        applied.append(True)
        check_lease(batch, response_id, owner)
        branch_id = _append_items(batch, placement, ending) if ending.moves_branch else None
        batch.leases[response_id].status = ending.status
        if placement.exclusive:
            _release_thread(batch, response_id, placement, branch_id, ending.memory)
        if ending.store or ending.lingers:
            write_end(batch, response_id, placement, ending, branch_id)
        else:
            batch.add(DELETE_JOURNAL, response=response_id)
            batch.add(_DELETE_RESPONSE, response=response_id)
        batch.ring(response_id)

    return Unit(
        apply,
        responses=(response_id,),
        threads=(placement.thread_id,) if is_named(placement.thread_id) else (),
        branches=(placement.branch_id, placement.holder or placement.branch_id) if ending.moves_branch else (),
        patient=True,
    )


def _is_written(lease: Lease | None, owner: Owner, ending: Ending) -> bool:
    """Whether the row tells that it ended so; one that nobody can come back for is gone then."""
    if lease is None:
        return not (ending.store or ending.lingers)
    return (lease.epoch, lease.status) == (owner.epoch, ending.status)


def use(response_id: str, keep: Keep) -> Unit[None]:
    """Somebody has read the response: it is kept for longer."""

    def apply(batch: Batch) -> None:
        batch.add(_USED, response=response_id, new_expires=batch.now + keep.response)

    return Unit(apply, responses=(response_id,))


def write_end(
    batch: Batch, response_id: str, placement: Placement, ending: Ending, branch_id: str | None = None
) -> None:
    """Write the row of a response that has ended, and the end of its journal; where nobody can come back for
    that, it goes."""
    if ending.journal is not None and ending.lingers:
        _add_entry(batch, response_id, placement.tenant, ending.journal)
    elif ending.journal is not None:
        batch.add(DELETE_JOURNAL, response=response_id)
    batch.add(_END_RESPONSE, response=response_id, **_end_row(placement, ending, branch_id, batch.now))


def check_lease(batch: Batch, response_id: str, owner: Owner) -> None:
    """Raise `StaleWriter` where the response is not the owner's to write any more."""
    lease = batch.leases.get(response_id)
    if lease is None or lease.epoch != owner.epoch or lease.status not in RUNNING:
        raise StaleWriter("Another worker has taken over this response.")


def _append_items(batch: Batch, placement: Placement, ending: Ending) -> str:
    """Put the turn's items on its branch, or on a new one where that branch has gone on without it.

    A new one grows out of the branch that holds what comes before it. Were it the one that the turn continues,
    also where that begins later, a session rewritten at its end again and again would have an ever longer line.
    """
    new = [*ending.input, *ending.output]
    stop = placement.position + len(new)
    branch = batch.branches.get(placement.branch_id)
    if branch is None or branch.head < placement.position:
        raise StaleWriter("The branch of this response has been deleted.")
    if branch.head == placement.position and _is_its_own(batch, placement, branch):
        batch.move_head(branch, stop)
    else:
        parent = batch.branches.get(placement.holder or branch.id, branch)
        branch = Branch(placement.new_branch, placement.thread_id, placement.position)
        batch.add_branch(branch, placement.tenant, parent.id if placement.position else None)
        batch.move_head(branch, stop)
    for offset, item in enumerate(new):
        batch.add(
            _INSERT_ITEM,
            branch_id=branch.id,
            position=placement.position + offset,
            tenant=placement.tenant,
            item_id=item.item_id,
            type=item.type,
            digest=item.digest,
            payload=item.payload,
        )
    return branch.id


def _is_its_own(batch: Batch, placement: Placement, branch: Branch) -> bool:
    """Whether the turn may go on with the branch itself: one of its thread, and of a session the active one
    only as the session's own turn."""
    thread = batch.threads.get(placement.thread_id)
    active = thread is not None and thread.active_branch == branch.id
    return branch.thread_id == placement.thread_id and (placement.exclusive or not active)


def _release_thread(
    batch: Batch, response_id: str, placement: Placement, branch_id: str | None, memory: bytes | None
) -> None:
    """Give the thread back with what the turn has made of it, unless it is another's by now."""
    thread = batch.threads.get(placement.thread_id)
    if thread is None or thread.running != response_id:
        return
    if memory is not None:
        batch.add(_REMEMBER, thread=thread.id, new_memory=memory)
    thread.running, thread.lease_until = None, 0.0
    thread.active_branch = branch_id or thread.active_branch
    batch.set_thread(thread)


def _end_row(placement: Placement, ending: Ending, branch_id: str | None, now: float) -> dict[str, Any]:
    output_at = placement.position + len(ending.input)
    on_branch = branch_id is not None
    row = {
        "branch_id": branch_id,
        "output_at": output_at if on_branch else None,
        "stop": output_at + len(ending.output) if on_branch else None,
        "status": ending.status,
        "echo": ending.echo,
        "input": None if on_branch else join(item.payload for item in ending.input),
        "output": None if on_branch else join(item.payload for item in ending.output),
        "error": ending.error,
        "usage": ending.usage,
        "incomplete": ending.incomplete,
        "memory": ending.memory,
        "completed_at": ending.completed_at,
        "journal_until": now + ending.keep.journal if ending.lingers else None,
        "expires_at": now + (ending.keep.response if ending.store else ending.keep.journal),
    }
    return {f"end_{column}": value for column, value in row.items()}


def join(payloads: Iterable[bytes]) -> bytes:
    """A JSON array of payloads that are JSON already."""
    return b"[" + b",".join(payloads) + b"]"
