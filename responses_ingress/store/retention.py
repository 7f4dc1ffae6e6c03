"""What is deleted, and when: responses that nobody used for long, or beyond a number; journals whose cursors
are past; threads that are idle; and the items that nothing needs any more.

What must stay true: a branch's items stay as long as a response, a fork, a running turn or a thread needs
them, so that descendants of what is deleted keep their history; each call is one small transaction of its
caller's, and several workers may call at once: what one has locked the others pass by. Rows are locked in the
writer's order (responses, threads, branches, preambles; each by their keys), so that nobody waits in a circle;
and what is needed is asked only when the lock is there, so that what began meanwhile is seen.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Row, bindparam, delete, exists, func, literal_column, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import InvalidRequest
from responses_ingress.store.responses import find_response
from responses_ingress.store.tables import (
    are_preambles,
    branches,
    is_running,
    items,
    journal,
    preambles,
    responses,
    threads,
)

MOST = 100
"""Responses or threads that one call deletes at most."""

_MOST_ROWS = 2_000
"""Rows of items or of journals that one call is to delete with them; but one response or thread has any number."""

_MOST_CHOSEN = 1_000  # that are found beyond a number at a time
_MOST_IDS = 1_000  # in one statement, of which PostgreSQL takes 32,767

_CHOSEN = (responses.c.id, responses.c.tenant, responses.c.preamble, responses.c.branch_id, responses.c.base)


async def delete_response(connection: AsyncConnection, tenant: str, response_id: str, now: float) -> bool:
    """Delete an ended response. False where there is none. Raises `InvalidRequest` while it runs."""
    row = await find_response(connection, tenant, response_id, now)
    if row is None:
        return False
    if row.running:
        raise InvalidRequest("Cannot delete an in-flight response.")
    if await _delete(connection, [row.id]):
        return True
    if await find_response(connection, tenant, response_id, now) is not None:
        raise InvalidRequest("Cannot delete a response that one in the queue builds on.")
    return False


_waiting = responses.alias("waiting")
_is_waited_for = exists().where(
    _waiting.c.previous_response_id == responses.c.id,
    _waiting.c.status.in_([literal_column("'queued'"), literal_column("'in_progress'")]),
    _waiting.c.base.is_(None),
)
"""A response in the queue builds on it, and has not begun to."""

_is_active = exists().where(threads.c.id == branches.c.thread_id, threads.c.active_branch == branches.c.id)
_own_items = (
    select(branches.c.head - branches.c.parent_position)
    .where(branches.c.id == responses.c.branch_id, ~_is_active)
    .scalar_subquery()
    .label("weight")
)
"""The items that may go with a response, where it is the last that needs them."""


def _few(found: Iterable[Any]) -> list[str]:
    """The ids of the first of these rows (id, weight), as many as a small transaction can take."""
    few: list[str] = []
    weight = 0
    for row in found:
        weight += row.weight or 0
        if few and weight > _MOST_ROWS:
            break
        few.append(row.id)
    return few


_EXPIRED = (
    select(responses.c.id, _own_items)
    .where(responses.c.expires_at <= bindparam("now"), ~_is_waited_for)
    .order_by(responses.c.expires_at)
    .limit(MOST)
    .with_for_update(skip_locked=True, of=responses)
)


async def delete_expired(connection: AsyncConnection, now: float) -> int:
    """Delete some of the responses whose time is over; how many."""
    return await _delete(connection, _few((await connection.execute(_EXPIRED, {"now": now})).all()))


_kept = (responses.c.store, responses.c.expires_at.is_not(None))
_over = select(responses.c.tenant).where(*_kept).group_by(responses.c.tenant).having(func.count() > bindparam("most"))
_ranked = (
    select(
        responses.c.id,
        func.row_number().over(partition_by=responses.c.tenant, order_by=responses.c.expires_at.desc()).label("rank"),
    )
    .where(*_kept, responses.c.tenant.in_(_over))
    .subquery()
)
_BEYOND = (
    select(_ranked.c.id).where(_ranked.c.rank > bindparam("most")).order_by(_ranked.c.rank.desc()).limit(_MOST_CHOSEN)
)


async def find_beyond(connection: AsyncConnection, most: int) -> list[str]:
    """Some of the responses beyond a tenant's `most`, those unused for longest."""
    return list((await connection.execute(_BEYOND, {"most": most})).scalars())


_FREE = (
    select(responses.c.id, _own_items)
    .where(responses.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(responses.c.id)
    .with_for_update(skip_locked=True, of=responses)
)


async def delete_chosen(connection: AsyncConnection, ids: Sequence[str]) -> int:
    """Delete some of these responses, of those that are still there, have ended and are nobody's to delete just now;
    how many."""
    return await _delete(connection, _few((await connection.execute(_FREE, {"ids": list(ids)})).all()))


_journaled = select(func.count()).select_from(journal).where(journal.c.response_id == responses.c.id).scalar_subquery()
_PAST = (
    select(responses.c.id, _journaled.label("weight"))
    .where(responses.c.journal_until <= bindparam("now"))
    .order_by(responses.c.journal_until)
    .limit(MOST)
    .with_for_update(skip_locked=True, of=responses)
)


async def drop_journals(connection: AsyncConnection, now: float) -> int:
    """Drop the journals of some responses that ended long enough ago, and the names by which a repeated request
    would find them; how many."""
    ids = _few((await connection.execute(_PAST, {"now": now})).all())
    if ids:
        await connection.execute(delete(journal).where(journal.c.response_id.in_(ids)))
        gone: dict[str, None] = dict.fromkeys(("journal_until", "retry_key", "retry_body"))
        await connection.execute(update(responses).where(responses.c.id.in_(ids)).values(gone))
    return len(ids)


_branched = (
    select(func.sum(branches.c.head - branches.c.parent_position + 1))
    .where(branches.c.thread_id == threads.c.id)
    .scalar_subquery()
)
_IDLE = (
    select(threads.c.id, _branched.label("weight"))
    .where(
        threads.c.updated_at < bindparam("before"),
        or_(threads.c.running.is_(None), ~exists().where(responses.c.id == threads.c.running, is_running)),
    )
    .order_by(threads.c.updated_at)
    .limit(MOST)
    .with_for_update(skip_locked=True, of=threads)
)


async def delete_idle_threads(connection: AsyncConnection, before: float) -> int:
    """Delete some of the threads that nobody used since `before`; how many. Responses of theirs that are still
    kept keep their history."""
    ids = _few((await connection.execute(_IDLE, {"before": before})).all())
    if ids:
        theirs = (await connection.execute(select(branches.c.id).where(branches.c.thread_id.in_(ids)))).scalars().all()
        await connection.execute(delete(threads).where(threads.c.id.in_(ids)))
        await collect(connection, theirs)
    return len(ids)


_DELETE = (
    delete(responses)
    .where(responses.c.id.in_(bindparam("ids", expanding=True)), ~is_running, ~_is_waited_for)
    .returning(*_CHOSEN)
)


async def _delete(connection: AsyncConnection, ids: Sequence[str]) -> int:
    """Delete ended responses with all that only they need; how many."""
    if not ids:
        return 0
    gone = (await connection.execute(_DELETE, {"ids": list(ids)})).all()
    await connection.execute(delete(journal).where(journal.c.response_id.in_([row.id for row in gone])))
    await collect(connection, [id for row in gone for id in (row.branch_id, row.base) if id is not None])
    await _drop_preambles(connection, {(row.tenant, row.preamble) for row in gone if row.preamble is not None})
    return len(gone)


_named = are_preambles()
_LOCK_PREAMBLES = (
    select(preambles.c.digest).where(_named).order_by(preambles.c.tenant, preambles.c.digest).with_for_update()
)
_DROP_PREAMBLES = delete(preambles).where(
    _named, ~exists().where(responses.c.tenant == preambles.c.tenant, responses.c.preamble == preambles.c.digest)
)


async def _drop_preambles(connection: AsyncConnection, told: Collection[tuple[str, bytes]]) -> None:
    """Delete those of these preambles that no response has any more."""
    if told:
        keys = {"tenants": list({tenant for tenant, _ in told}), "digests": list({digest for _, digest in told})}
        await connection.execute(_LOCK_PREAMBLES, keys)
        await connection.execute(_DROP_PREAMBLES, keys)


_of_ids = branches.c.id.in_(bindparam("ids", expanding=True))
_children = branches.alias("children")
# Each step is a scalar: for a join PostgreSQL would read the whole table.
_line = select(branches.c.id).where(_of_ids).cte("line", recursive=True)
_above = select(branches.c.parent_branch).where(branches.c.id == _line.c.id).scalar_subquery()
_LINE = select(_line.union(select(_above).select_from(_line).where(_line.c.id.is_not(None))).c.id)
_LED_TO = (
    select(_children.c.id)
    .join(branches, branches.c.id == _children.c.parent_branch)
    .where(_of_ids, _children.c.parent_position <= branches.c.parent_position)
)
_LOCK_BRANCHES = select(branches.c.id).where(_of_ids).order_by(branches.c.id).with_for_update()


async def _lock_branches(connection: AsyncConnection, ids: Iterable[str]) -> None:
    """Lock the branches, all they came from, and what any of these is only the way to."""
    line = [id for id in (await connection.execute(_LINE, {"ids": list(ids)})).scalars() if id is not None]
    led_to = (await connection.execute(_LED_TO, {"ids": line})).scalars()
    await connection.execute(_LOCK_BRANCHES, {"ids": [*line, *led_to]})


NEEDS = (
    branches.c.id,
    branches.c.parent_branch,
    branches.c.parent_position,
    branches.c.head,
    exists().where(threads.c.id == branches.c.thread_id, threads.c.active_branch == branches.c.id).label("active"),
    select(func.max(responses.c.stop)).where(responses.c.branch_id == branches.c.id).scalar_subquery().label("stop"),
    select(func.max(responses.c.own))
    .where(responses.c.base == branches.c.id, is_running)
    .scalar_subquery()
    .label("begun"),
    select(func.max(_children.c.parent_position))
    .where(_children.c.parent_branch == branches.c.id)
    .scalar_subquery()
    .label("forked"),
)
"""What `needed` looks at: columns of a query over branches."""

_NEEDED = select(*NEEDS).where(_of_ids)
_CUT = delete(items).where(items.c.branch_id == bindparam("branch"), items.c.position >= bindparam("end"))
_GONE = delete(branches).where(_of_ids)
_way = branches.alias("way")
_PASS_ON = (
    update(branches)
    .where(branches.c.parent_branch == bindparam("branch"))
    .values(parent_branch=select(_way.c.parent_branch).where(_way.c.id == bindparam("branch")).scalar_subquery())
)
_SHORTER = (
    update(branches)
    .where(branches.c.id == bindparam("branch"))
    .values(head=bindparam("end"), parent_position=bindparam("begins"))
)


async def collect(connection: AsyncConnection, candidates: Iterable[str]) -> None:
    """Delete what nothing needs of these branches: their last items, or all of them; and then maybe of their
    parents. What grew out of one that is gone grows out of its parent."""
    all_of_them = sorted(set(candidates))
    for start in range(0, len(all_of_them), _MOST_IDS):
        left = all_of_them[start : start + _MOST_IDS]
        await _lock_branches(connection, left)
        while left:
            left = await _cut(connection, (await connection.execute(_NEEDED, {"ids": left})).all())


async def _cut(connection: AsyncConnection, found: Sequence[Row[Any]]) -> list[str]:
    """Cut these branches off behind what is needed of them; the parents of which less is needed then."""
    too_long = [(branch, end) for branch in found if (end := needed(branch)) is None or end < branch.head]
    gone = [branch for branch, end in too_long if end is None]
    shorter = [  # a running turn may go on from before the place where its branch begins
        {"branch": branch.id, "end": end, "begins": min(end, branch.parent_position)}
        for branch, end in too_long
        if end is not None
    ]
    if too_long:
        await connection.execute(_CUT, [{"branch": branch.id, "end": end or 0} for branch, end in too_long])
    ways = [{"branch": branch.id} for branch in gone if branch.forked is not None]
    if ways:  # one by one, since one may lead to the next
        await connection.execute(_PASS_ON, ways)
    if gone:
        await connection.execute(_GONE, {"ids": [branch.id for branch in gone]})
    if shorter:
        await connection.execute(_SHORTER, shorter)
    freed = [branch.parent_branch for branch, end in too_long if end is None or end < branch.parent_position]
    return [id for id in dict.fromkeys(freed) if id is not None]


def needed(branch: Row[Any]) -> int | None:
    """Up to which position something needs the branch, which has `NEEDS`; None where nothing does. None of its
    items is needed by what grows out of it no later than it begins itself: it is only the way there."""
    if branch.active:
        return int(branch.head)
    ends = [end for end in (branch.stop, branch.begun) if end is not None]
    if branch.forked is not None and (ends or branch.forked > branch.parent_position):
        ends.append(branch.forked)
    return max(ends) if ends else None
