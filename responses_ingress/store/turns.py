"""The life of a response in the database, as units of work: begin, journal, end, take over.

What must stay true (laws 2 to 4 of the pump): `begin` decides alone who has the thread; every later
write carries the lease's epoch and is refused when another worker has taken over; the ending writes the
status, the items, the branch's head and the release of the thread in one transaction, once. Only a turn
that completed or is incomplete moves the branch; any other keeps its input and output on its own row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import bindparam, delete, null, text, update

from responses_ingress.errors import PlacementOutdated, StaleWriter, ThreadBusy
from responses_ingress.ids import is_named
from responses_ingress.store.tables import items, journal, responses, threads
from responses_ingress.store.writer import RUNNING, Batch, Branch, Lease, Thread, Unit, insert_of


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a turn belongs.

    branch_id, position: what it continues: the branch (maybe another thread's) up to a position.
    root:        the id of the branch that a new thread begins with; None where the thread is not new.
    first:       the position of its first input item; below `position` where the client sent history.
    new_branch:  the id for a branch, should it need one of its own.
    exclusive:   the thread is a session, and this needs its one running turn. `seen` is then its active
                 branch and that branch's head as they were read, or None where it did not exist.
    """

    tenant: str
    thread_id: str
    thread_key: str | None
    branch_id: str
    position: int
    first: int
    new_branch: str
    root: str | None = None
    exclusive: bool = False
    seen: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item on its way to a branch."""

    item_id: str
    type: str
    digest: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Owner:
    """Who runs a response, and under which lease."""

    name: str
    epoch: int
    lease: float


@dataclass(frozen=True, slots=True)
class NewResponse:
    """The row of a response that begins."""

    id: str
    previous_response_id: str | None
    status: str
    model: str
    backend: str
    background: bool
    store: bool
    envelope: bytes
    preamble: tuple[bytes, bytes] | None
    input: bytes
    created_at: int
    lineage: bytes | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a response ended. `input` and `output` are its items, for the branch or for its own row;
    `journaled` says whether it has left anything in the journal."""

    status: str
    envelope: bytes
    input: Sequence[NewItem]
    output: Sequence[NewItem]
    error: bytes | None = None
    usage: bytes | None = None
    incomplete: str | None = None
    completed_at: int | None = None
    memory: bytes | None = None
    journaled: bool = True

    @property
    def moves_branch(self) -> bool:
        return self.status in ("completed", "incomplete")


_INSERT_THREAD = insert_of(threads)
_INSERT_RESPONSE = insert_of(
    responses,
    "id",
    "tenant",
    "thread_id",
    "first",
    "own",
    "previous_response_id",
    "status",
    "model",
    "backend",
    "background",
    "store",
    "envelope",
    "preamble",
    "input",
    "owner",
    "lease_until",
    "epoch",
    "created_at",
)
_INSERT_ITEM = insert_of(items)
_INSERT_JOURNAL = insert_of(journal)
_INSERT_PREAMBLE = text(
    "INSERT INTO preambles (tenant, digest, payload) VALUES (:tenant, :digest, :payload) ON CONFLICT DO NOTHING"
)
_DELETE_JOURNAL = delete(journal).where(journal.c.response_id == bindparam("response"))
_DELETE_RESPONSE = delete(responses).where(responses.c.id == bindparam("response"))
_TAKE_OVER = (
    update(responses)
    .where(responses.c.id == bindparam("response"))
    .values(owner=bindparam("new_owner"), epoch=bindparam("new_epoch"), lease_until=bindparam("new_lease"))
)
_ENDING = ("branch_id", "output_at", "stop", "status", "envelope", "input", "output", "error", "usage", "incomplete")
_END_RESPONSE = (
    update(responses)
    .where(responses.c.id == bindparam("response"))
    .values(
        owner=null(),
        lease_until=null(),
        completed_at=bindparam("end_completed_at"),
        **{column: bindparam(f"end_{column}") for column in _ENDING},
    )
)
_REMEMBER = update(threads).where(threads.c.id == bindparam("thread")).values(memory=bindparam("new_memory"))


def begin(new: NewResponse, placement: Placement, owner: Owner) -> Unit[None]:
    """Write the response's row and, where the turn is exclusive, take the thread.

    Raises `ThreadBusy` while another turn has it, `PlacementOutdated` when it has moved since it was read.
    """

    def apply(batch: Batch) -> None:
        if new.previous_response_id is not None and new.previous_response_id not in batch.leases:
            raise PlacementOutdated  # deleted since it was read, and maybe its items with it
        if placement.exclusive:
            _take_thread(batch, new, placement, owner)
        elif placement.root is not None:
            batch.add_branch(Branch(placement.root, placement.thread_id, 0), placement.tenant)
        if new.preamble is not None:
            digest, payload = new.preamble
            batch.add(_INSERT_PREAMBLE, tenant=placement.tenant, digest=digest, payload=payload)
        _add_response(batch, new, placement, owner)

    return Unit(
        apply,
        responses=(new.previous_response_id,) if new.previous_response_id else (),
        threads=(placement.thread_id,) if placement.exclusive else (),
        branches=placement.seen[:1] if placement.seen else (),
    )


def _take_thread(batch: Batch, new: NewResponse, placement: Placement, owner: Owner) -> None:
    """Give the thread's one running turn to this response."""
    thread = batch.threads.get(placement.thread_id)
    if thread is None:
        if placement.root is None:
            raise PlacementOutdated
        _add_thread(batch, new, placement, placement.root, owner)
        return
    if thread.running is not None and thread.lease_until > batch.now:
        raise ThreadBusy(thread.running)
    branch = batch.branches.get(thread.active_branch)
    if branch is None or placement.seen != (branch.id, branch.head):
        raise PlacementOutdated
    thread.running, thread.lease_until = new.id, batch.now + owner.lease
    thread.lineage = _merged(thread.lineage, new.lineage)
    batch.set_thread(thread)


def _merged(known: bytes | None, told: bytes | None) -> bytes | None:
    """What is known of a thread's lineage: a later turn adds to it and says nothing of most of it."""
    if known is None or told is None or known == told:
        return told or known
    return orjson.dumps({**orjson.loads(known), **orjson.loads(told)})


def _add_thread(batch: Batch, new: NewResponse, placement: Placement, root: str, owner: Owner) -> None:
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


def _add_response(batch: Batch, new: NewResponse, placement: Placement, owner: Owner) -> None:
    batch.leases[new.id] = Lease(owner.epoch, new.status)
    batch.add(
        _INSERT_RESPONSE,
        id=new.id,
        tenant=placement.tenant,
        thread_id=placement.thread_id,
        first=placement.first,
        own=placement.position,
        previous_response_id=new.previous_response_id,
        status=new.status,
        model=new.model,
        backend=new.backend,
        background=new.background,
        store=new.store,
        envelope=new.envelope,
        preamble=new.preamble[0] if new.preamble else None,
        input=new.input,
        owner=owner.name,
        lease_until=batch.now + owner.lease,
        epoch=owner.epoch,
        created_at=new.created_at,
    )


def append_journal(response_id: str, owner: Owner, tenant: str, entry: tuple[int, int, bytes]) -> Unit[None]:
    """Write a batch of a run's deltas. `entry`: the number of the first event they make, how many
    events they make, the deltas."""
    first, count, payload = entry

    def apply(batch: Batch) -> None:
        _check_lease(batch, response_id, owner)
        batch.add(_INSERT_JOURNAL, response_id=response_id, first=first, tenant=tenant, count=count, payload=payload)

    return Unit(apply, responses=(response_id,), patient=True)


def end(response_id: str, owner: Owner, placement: Placement, ending: Ending, store: bool = True) -> Unit[None]:
    """Write everything the end of a response changes, and drop its journal."""

    def apply(batch: Batch) -> None:
        _check_lease(batch, response_id, owner)
        branch_id = _append_items(batch, placement, ending) if ending.moves_branch else None
        batch.leases[response_id].status = ending.status
        if placement.exclusive:
            _release_thread(batch, response_id, placement, branch_id)
        if ending.memory is not None and placement.exclusive:
            batch.add(_REMEMBER, thread=placement.thread_id, new_memory=ending.memory)
        if ending.journaled:
            batch.add(_DELETE_JOURNAL, response=response_id)
        if store:
            batch.add(_END_RESPONSE, **_end_row(response_id, placement, ending, branch_id))
        else:
            batch.add(_DELETE_RESPONSE, response=response_id)

    return Unit(
        apply,
        responses=(response_id,),
        threads=(placement.thread_id,) if is_named(placement.thread_id) else (),
        branches=(placement.branch_id,) if ending.moves_branch else (),
        patient=True,
    )


def take_over(response_id: str, epoch: int, owner: Owner) -> Unit[None]:
    """Make a response whose lease has run out this worker's. Raises `StaleWriter` when another was first."""

    def apply(batch: Batch) -> None:
        lease = batch.leases.get(response_id)
        if lease is None or lease.epoch != epoch or lease.status not in RUNNING:
            raise StaleWriter("This response has ended, or is another worker's.")
        lease.epoch = owner.epoch
        batch.add(
            _TAKE_OVER,
            response=response_id,
            new_owner=owner.name,
            new_epoch=owner.epoch,
            new_lease=batch.now + owner.lease,
        )

    return Unit(apply, responses=(response_id,))


def _check_lease(batch: Batch, response_id: str, owner: Owner) -> None:
    lease = batch.leases.get(response_id)
    if lease is None or lease.epoch != owner.epoch or lease.status not in RUNNING:
        raise StaleWriter("Another worker has taken over this response.")


def _append_items(batch: Batch, placement: Placement, ending: Ending) -> str:
    """Put the turn's items on its branch, or on a new one where that branch has gone on without it."""
    new = [*ending.input, *ending.output]
    stop = placement.position + len(new)
    branch = batch.branches.get(placement.branch_id)
    if branch is None:
        raise StaleWriter("The branch of this response has been deleted.")
    if branch.head == placement.position and _is_its_own(batch, placement, branch):
        batch.move_head(branch, stop)
    else:
        parent, branch = branch, Branch(placement.new_branch, placement.thread_id, placement.position)
        batch.add_branch(branch, placement.tenant, parent.id)
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


def _release_thread(batch: Batch, response_id: str, placement: Placement, branch_id: str | None) -> None:
    thread = batch.threads.get(placement.thread_id)
    if thread is None or thread.running != response_id:
        return
    thread.running, thread.lease_until = None, 0.0
    thread.active_branch = branch_id or thread.active_branch
    batch.set_thread(thread)


def _end_row(response_id: str, placement: Placement, ending: Ending, branch_id: str | None) -> dict[str, Any]:
    output_at = placement.position + len(ending.input)
    on_branch = branch_id is not None
    row = {
        "branch_id": branch_id,
        "output_at": output_at if on_branch else None,
        "stop": output_at + len(ending.output) if on_branch else None,
        "status": ending.status,
        "envelope": ending.envelope,
        "input": None if on_branch else join(item.payload for item in ending.input),
        "output": None if on_branch else join(item.payload for item in ending.output),
        "error": ending.error,
        "usage": ending.usage,
        "incomplete": ending.incomplete,
        "completed_at": ending.completed_at,
    }
    return {"response": response_id, **{f"end_{column}": value for column, value in row.items()}}


def join(payloads: Iterable[bytes]) -> bytes:
    """A JSON array of payloads that are JSON already."""
    return b"[" + b",".join(payloads) + b"]"
