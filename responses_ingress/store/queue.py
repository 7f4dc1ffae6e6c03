"""Responses between processes: waiting in the queue, claimed, taken over, put back, and what one process asks
of the one that runs a response.

What must stay true: an unfinished response is its owner's until `lease_until`, and then anybody's; whoever
claims one raises its epoch, so that of two only one can write; the database's clock decides; what is asked of
an owner stands in the row, so that it outlives the one who asked and the one who was asked.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Executable,
    Table,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import NotHandedOver, QueueFull, StaleWriter
from responses_ingress.ids import is_named
from responses_ingress.store.responses import StoredResponse, load
from responses_ingress.store.tables import is_running, responses, threads
from responses_ingress.store.turns import (
    DELETE_JOURNAL,
    add_response,
    check_lease,
    check_previous,
    check_repeat,
    told_in,
    write_end,
)
from responses_ingress.store.values import Ending, NewResponse, Owner, Placement
from responses_ingress.store.wake import ASKED, QUEUE
from responses_ingress.store.writer import RUNNING, Batch, Unit

_PATIENCE = 5  # seconds a client is told to wait for a place in the queue
_MOST = 100


def enqueue(new: NewResponse, placement: Placement, most: int) -> Unit[None]:
    """Write the row of a response that waits for a worker. Raises `QueueFull` where `most` wait already, and
    as `begin` does for a request that was made before."""

    def apply(batch: Batch) -> None:
        check_repeat(batch, new.retry)
        check_previous(batch, new.previous_response_id)
        if batch.queued >= most:
            raise QueueFull("Too many responses wait to be run. Try again later.", retry_after=_PATIENCE)
        batch.queued += 1
        add_response(batch, new, placement, None)
        batch.ring(QUEUE)

    previous = (new.previous_response_id,) if new.previous_response_id else ()
    repeats = (new.retry,) if new.retry is not None else ()
    return Unit(apply, previous, preambles=told_in(new, placement), repeats=repeats, counts_queue=True)


_is_due = and_(is_running, responses.c.lease_until <= bindparam("now"))
_parents = responses.alias("parents")
_parent_runs = exists().where(_parents.c.id == responses.c.previous_response_id, _parents.c.status.in_(RUNNING))
# Also while the lease of its turn has run out: whoever claims that one sees to it first, and it may go on.
_holders = responses.alias("holders")
_thread_is_busy = exists().where(
    threads.c.id == responses.c.thread_id,
    threads.c.running != responses.c.id,
    _holders.c.id == threads.c.running,
    _holders.c.status.in_(RUNNING),
)
_ahead = responses.alias("ahead")


def _came(table: Any) -> Any:
    return tuple_(table.c.created_at, table.c.lease_until, table.c.id)


# Of the turns that wait for a thread only the first can begin, and none while that is claimed and about to.
# As `ids.is_named`: without a name it is no thread that has its turns one by one.
_is_named = func.substr(responses.c.thread_id, 24, 2) == "01"
_another_is_first = and_(
    _is_named,
    exists().where(
        _ahead.c.thread_id == responses.c.thread_id,
        _ahead.c.status.in_([literal_column("'queued'"), literal_column("'in_progress'")]),  # as the index says
        _ahead.c.status == literal_column("'queued'"),
        _ahead.c.id != responses.c.id,
        or_(
            and_(_ahead.c.owner.is_not(None), _ahead.c.lease_until > bindparam("now")),
            _came(_ahead) < _came(responses),
        ),
    ),
)
_ready = and_(responses.c.status == "queued", ~_parent_runs, ~_thread_is_busy, ~_another_is_first)
_DUE = (
    select(responses.c.id)
    .where(_is_due, or_(responses.c.status == "in_progress", _ready))
    .order_by(responses.c.lease_until)
    .limit(1)
)


def _claim(which: Any) -> Executable:
    """Make the responses that have waited longest this worker's, past those another is claiming just now. One that
    had an owner has seen its process die."""
    chosen = (
        select(responses.c.id)
        .where(_is_due, which)
        .order_by(responses.c.lease_until, responses.c.id)
        .limit(bindparam("most"))
        .with_for_update(skip_locked=True, of=responses)
        .cte("chosen")
    )
    return (
        update(responses)
        .where(responses.c.id.in_(select(chosen.c.id)))
        .values(
            owner=bindparam("who"),
            epoch=responses.c.epoch + 1,
            lease_until=bindparam("until"),
            attempts=responses.c.attempts + case((responses.c.owner.is_not(None), 1), else_=0),
        )
        .returning(responses.c.id)
    )


_CLAIM_QUEUED = _claim(_ready)
_CLAIM_LEFT = _claim(responses.c.status == "in_progress")


async def is_any_due(connection: AsyncConnection, now: float) -> bool:
    """Whether a response waits for a worker, or has lost the one it had."""
    return (await connection.execute(_DUE, {"now": now})).first() is not None


async def claim_queued(connection: AsyncConnection, owner: Owner, now: float, most: int) -> list[StoredResponse]:
    """Up to `most` responses that wait to be run and can run now, as this worker's."""
    return await _claimed(connection, _CLAIM_QUEUED, owner, now, min(most, _MOST))


async def claim_left_behind(connection: AsyncConnection, owner: Owner, now: float) -> list[StoredResponse]:
    """Responses that had begun, and whose owner has let the lease run out, as this worker's."""
    return await _claimed(connection, _CLAIM_LEFT, owner, now, _MOST)


async def _claimed(
    connection: AsyncConnection, statement: Executable, owner: Owner, now: float, most: int
) -> list[StoredResponse]:
    values = {"now": now, "most": most, "who": owner.name, "until": now + owner.lease}
    ids = [row.id for row in await connection.execute(statement, values)]
    return await load(connection, ids) if ids else []


_PUT_BACK = (
    update(responses)
    .where(responses.c.id == bindparam("response"))
    .values(owner=null(), status=bindparam("new_status"), lease_until=bindparam("not_before"))
)


def put_back(row: StoredResponse, owner: Owner, delay: float) -> Unit[None]:
    """Give back a claimed response that cannot begin yet, and let nobody claim it for `delay` seconds."""

    def apply(batch: Batch) -> None:
        check_lease(batch, row.id, owner)
        _to_begin_again(batch, row.id, row.thread_id)
        batch.add(_PUT_BACK, response=row.id, new_status="queued", not_before=batch.now + delay)

    return Unit(apply, responses=(row.id,), threads=_row_of(row.thread_id), patient=True)


def _to_begin_again(batch: Batch, response_id: str, thread_id: str) -> None:
    """What it said is nothing, and its thread, if it has that, is free."""
    batch.add(DELETE_JOURNAL, response=response_id)
    thread = batch.threads.get(thread_id)
    if thread is not None and thread.running == response_id:
        thread.running, thread.lease_until = None, 0.0
        batch.set_thread(thread)


def _row_of(thread_id: str) -> tuple[str, ...]:
    """The thread, where it has a row."""
    return (thread_id,) if is_named(thread_id) else ()


def hand_over(response_id: str, owner: Owner, thread_id: str, *, resumable: bool, said: bool) -> Unit[None]:
    """Give up a running response for another worker: to go on with, where its backend remembers (`resumable`),
    else to begin again. Raises `NotHandedOver` where that is not possible, because somebody may have seen what
    it said."""

    def apply(batch: Batch) -> None:
        check_lease(batch, response_id, owner)
        if not resumable:
            if said and batch.leases[response_id].followed_until is not None:
                raise NotHandedOver("What this response has said may have been seen.")
            _to_begin_again(batch, response_id, thread_id)
        status = "in_progress" if resumable else "queued"
        batch.add(_PUT_BACK, response=response_id, new_status=status, not_before=batch.now)
        batch.ring(QUEUE)

    return Unit(apply, responses=(response_id,), threads=_row_of(thread_id), patient=True)


_ASK = (
    update(responses)
    .where(responses.c.id == bindparam("response"), responses.c.asked.is_distinct_from(literal_column("'cancel'")))
    .values(asked=bindparam("what"))
)


def ask_to_yield(response_id: str) -> Unit[None]:
    """Ask the owner of a running response to end it, if nobody follows it."""

    def apply(batch: Batch) -> None:
        lease = batch.leases.get(response_id)
        if lease is not None and lease.status in RUNNING and lease.owner is not None:
            batch.add(_ASK, response=response_id, what="yield")
            batch.ring(ASKED)

    return Unit(apply, responses=(response_id,))


def cancel(row: StoredResponse, cancelled: Ending) -> Unit[None]:
    """Cancel a response that waits to be run, or ask its owner to. Does nothing where it has ended."""

    def apply(batch: Batch) -> None:
        lease = batch.leases.get(row.id)
        if lease is None or lease.status not in RUNNING:
            return
        if lease.owner is None and lease.status == "queued":
            lease.status = cancelled.status
            write_end(batch, row.id, nowhere(row), cancelled)
            batch.ring(row.id)
        else:
            batch.add(_ASK, response=row.id, what="cancel")
            batch.ring(ASKED)

    return Unit(apply, responses=(row.id,))


def nowhere(row: StoredResponse) -> Placement:
    """The place of a response whose end goes onto no branch; it has the thread's turn, if it has begun."""
    return Placement(row.tenant, row.thread_id, None, "", row.own, row.first, "", exclusive=True)


_ASKED = select(responses.c.id, responses.c.asked).where(
    is_running, responses.c.owner == bindparam("who"), responses.c.asked.is_not(None)
)


async def asked_of(connection: AsyncConnection, owner: str) -> list[tuple[str, Literal["cancel", "yield"]]]:
    """What others ask of the responses that `owner` runs."""
    return [(row.id, row.asked) for row in await connection.execute(_ASKED, {"who": owner})]


_ANSWERED = (
    update(responses)
    .where(responses.c.id == bindparam("response"), responses.c.asked == literal_column("'yield'"))
    .values(asked=null())
)


def answered(response_id: str) -> Unit[None]:
    """It was asked to make way and does not, because somebody follows it."""

    def apply(batch: Batch) -> None:
        batch.add(_ANSWERED, response=response_id)

    return Unit(apply, responses=(response_id,))


_SIGN = (
    update(responses)
    .where(
        responses.c.id == bindparam("response"),
        is_running,
        or_(responses.c.followed_until.is_(None), responses.c.followed_until < bindparam("until")),
    )
    .values(followed_until=bindparam("until"))
)


def sign(response_id: str, seconds: float, of: tuple[int, str | None] | None = None) -> Unit[None]:
    """Say in its row that somebody follows a response, and will for so long. Raises `StaleWriter` where it runs on,
    but has another epoch and owner than `of` says, and so may say something else by now."""

    def apply(batch: Batch) -> None:
        lease = batch.leases.get(response_id)
        if of is not None and lease is not None and lease.status in RUNNING and (lease.epoch, lease.owner) != of:
            raise StaleWriter("This response has moved to another worker.")
        batch.add(_SIGN, response=response_id, until=batch.now + seconds)

    return Unit(apply, responses=(response_id,))


_FOLLOWED = select(responses.c.followed_until).where(responses.c.id == bindparam("response"))


async def followed_until(connection: AsyncConnection, response_id: str) -> float:
    """Until when somebody in another process follows the response; 0 where nobody ever did."""
    return (await connection.execute(_FOLLOWED, {"response": response_id})).scalar() or 0.0


def _renewal(table: Table, *conditions: ColumnElement[bool]) -> Executable:
    """Prolong leases. The rows are locked in the order in which the writer does, so that no two processes wait
    for each other."""
    mine = and_(table.c.id.in_(bindparam("ids", expanding=True)), *conditions)
    locked = select(table.c.id).where(mine).order_by(table.c.id).with_for_update().cte("locked")
    return (
        update(table)
        .where(table.c.id.in_(select(locked.c.id)))
        .values(lease_until=bindparam("until"))
        .returning(table.c.id)
    )


_RENEW_RESPONSES = _renewal(responses, responses.c.owner == bindparam("who"))
_RENEW_THREADS = _renewal(threads, threads.c.running.in_(bindparam("turns", expanding=True)))


async def renew_leases(connection: AsyncConnection, owner: str, running: Mapping[str, str], until: float) -> None:
    """Keep the leases of what `owner` is running: response -> its thread. What is another's by now stays so."""
    renewed = await connection.execute(_RENEW_RESPONSES, {"ids": list(running), "who": owner, "until": until})
    still = [row.id for row in renewed]
    if still:
        ids = list({running[response] for response in still})
        await connection.execute(_RENEW_THREADS, {"ids": ids, "turns": still, "until": until})
