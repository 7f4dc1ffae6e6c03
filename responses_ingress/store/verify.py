"""Looking for damage in a live database: what no run of commits can leave behind, and is there all the same.

What must stay true: it only reads, and each read is one statement over a bounded number of rows, so nobody
waits for it and it sees every commit whole or not at all; what it finds it looks at once more, so that what
merely moved between two reads is no finding; a finding names a row and never its content.

That a history has every position exactly once is shown one branch at a time: a branch holds the positions from
where it begins up to its head, its parent reaches to where it begins, and no line of parents goes in circles.
Then every span below a head is whole.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Column, ColumnElement, Row, Select, and_, bindparam, exists, func, select, tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.core.items import digest
from responses_ingress.core.replay import fold
from responses_ingress.errors import IllegalDelta, SettingsError
from responses_ingress.store.engine import is_sqlite, read_engine
from responses_ingress.store.migrate import shown
from responses_ingress.store.responses import StoredResponse, envelope_at_creation, load, read_journal
from responses_ingress.store.retention import NEEDS, needed
from responses_ingress.store.tables import branches, items, journal, preambles, responses, threads
from responses_ingress.store.values import Entry
from responses_ingress.store.writer import RUNNING

PAGE = 200
"""Rows of one statement."""

_MARGIN = 10.0
"""Seconds beyond a lease that a worker may need to notice that it has run out."""

_ENDED = ("completed", "incomplete", "failed", "cancelled")
_ON_BRANCH = ("completed", "incomplete")


@dataclass(frozen=True, slots=True)
class Finding:
    table: str
    row: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.table} {self.row}: {self.wrong}"


@dataclass(frozen=True, slots=True)
class _Hour:
    """When the database is looked at, and how long its leases are."""

    now: float
    lease: float


Judge = Callable[[AsyncConnection, Sequence[Row[Any]], _Hour], Awaitable[list[tuple[Row[Any], str]]]]


@dataclass(frozen=True, slots=True)
class _Check:
    """Rows to look at, which begin with their keys, and what tells those that are wrong."""

    keys: tuple[Column[Any], ...]
    rows: Select[Any]
    judge: Judge

    @property
    def table(self) -> str:
        return str(self.keys[0].table.name)

    def key(self, row: Row[Any]) -> tuple[Any, ...]:
        return tuple(row[: len(self.keys)])

    def name(self, row: Row[Any]) -> str:
        return "/".join(part.hex() if isinstance(part, bytes) else str(part) for part in self.key(row) if part != "")


async def verify(url: str, lease: float, tell: Callable[[Finding], None], now: float | None = None) -> Counter[str]:
    """Look at all of the database at `url` and `tell` what is wrong; how many rows of each table were seen.

    lease: the workers' setting. now: the database's time, unless it is given.
    """
    engine = read_engine(url)
    seen = Counter({check.table: 0 for check in _CHECKS})
    try:
        async with engine.connect() as connection:
            hour = _Hour(await _time_of(connection, url) if now is None else now, lease)
            for check in _CHECKS:
                await _run(connection, check, hour, tell, seen)
    except (SQLAlchemyError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        raise SettingsError(f"The database {shown(url)} cannot be used: {cause}.") from error
    finally:
        await engine.dispose()
    return seen


async def _time_of(connection: AsyncConnection, url: str) -> float:
    if is_sqlite(url):
        return time.time()
    return float(
        (await connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())::float8")).scalar_one()
    )


async def _run(
    connection: AsyncConnection, check: _Check, hour: _Hour, tell: Callable[[Finding], None], seen: Counter[str]
) -> None:
    """Look at all rows of a table, a page at a time; at those that look wrong, twice."""
    key, page = tuple_(*check.keys), check.rows.order_by(*check.keys).limit(PAGE)
    rows = (await connection.execute(page)).all()
    while rows:
        seen[check.table] += len(rows)
        wrong = await check.judge(connection, rows, hour)
        if wrong:
            suspects = check.rows.where(key.in_({check.key(row) for row, _ in wrong})).order_by(*check.keys)
            known = {(check.key(row), why) for row, why in wrong}
            for row, why in await check.judge(connection, (await connection.execute(suspects)).all(), hour):
                if (check.key(row), why) in known:
                    tell(Finding(check.table, check.name(row), why))
        rows = (await connection.execute(page.where(key > check.key(rows[-1])))).all()


def _each(judge: Callable[[Row[Any], _Hour], Iterator[str]]) -> Judge:
    """A judge that needs no more than the row."""

    async def judge_all(_: AsyncConnection, rows: Sequence[Row[Any]], hour: _Hour) -> list[tuple[Row[Any], str]]:
        return [(row, why) for row in rows for why in judge(row, hour)]

    return judge_all


# Threads.

_THREADS = (
    select(
        threads.c.id,
        threads.c.running,
        threads.c.lease_until,
        branches.c.thread_id.label("branch_of"),
        responses.c.thread_id.label("running_in"),
        responses.c.status,
    )
    .outerjoin(branches, branches.c.id == threads.c.active_branch)
    .outerjoin(responses, responses.c.id == threads.c.running)
)


def _thread(row: Row[Any], hour: _Hour) -> Iterator[str]:
    if row.branch_of is None:
        yield "its active branch is missing"
    elif row.branch_of != row.id:
        yield "its active branch is another thread's"
    if row.running is not None and row.lease_until > hour.now:
        if row.status not in RUNNING:
            yield "its turn is taken by a response that does not run"
        elif row.running_in != row.id:
            yield "its turn is taken by a response of another thread"


# Branches.

_parents = branches.alias("parents")


def _of_items(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return select(column).where(items.c.branch_id == branches.c.id).scalar_subquery()


_BRANCHES = select(
    *NEEDS,
    _parents.c.id.label("parent"),
    _parents.c.head.label("reached"),
    _of_items(func.count()).label("held"),
    _of_items(func.min(items.c.position)).label("lowest"),
    _of_items(func.max(items.c.position)).label("highest"),
    exists().where(threads.c.id == branches.c.thread_id).label("in_thread"),
).select_from(branches.outerjoin(_parents, _parents.c.id == branches.c.parent_branch))
_BASES = select(responses.c.base).where(responses.c.base.in_(bindparam("ids", expanding=True)))
# An id begins with its thread's partition, so a range of the primary key holds the own responses of all threads that a
# page of branches is of. It is read once a page: asked branch by branch it would grow with the square of the forks.
_OWN_BASES = _BASES.where(responses.c.id.between(bindparam("low"), bindparam("high")))

# A walk up the parents. In a circle one branch has the greatest id: its own walk meets only smaller ones, until
# it is back. So a walk may end at the first greater one, and is short also where there are many forks of forks.
_up = (
    select(branches.c.id.label("origin"), branches.c.parent_branch.label("id"))
    .where(branches.c.id.in_(bindparam("ids", expanding=True)), branches.c.parent_branch.is_not(None))
    .cte("up", recursive=True)
)
_CIRCLES = select(
    _up.union(
        select(_up.c.origin, branches.c.parent_branch).where(
            branches.c.id == _up.c.id, branches.c.parent_branch.is_not(None), _up.c.id < _up.c.origin
        )
    )
)


async def _judge_branches(
    connection: AsyncConnection, rows: Sequence[Row[Any]], hour: _Hour
) -> list[tuple[Row[Any], str]]:
    wrong = [(row, why) for row in rows for why in _branch(row)]
    ups = await connection.execute(_CIRCLES, {"ids": [row.id for row in rows]})
    circles = {up.origin for up in ups if up.origin == up.id}
    wrong += [(row, "it is its own ancestor") for row in rows if row.id in circles]
    left = {row.id: row for row in rows if needed(row) is None and row.forked is None and not row.in_thread}
    for bases in (_OWN_BASES, _BASES):  # what begins in a forked thread has another partition
        if left:
            ids = list(left)
            span = {"low": f"resp_{ids[0][:16]}", "high": f"resp_{ids[-1][:16]}g"}
            for id in set((await connection.execute(bases, {"ids": ids, **span})).scalars()):
                del left[id]
    return [*wrong, *((row, "nothing needs it") for row in left.values())]


def _branch(row: Row[Any]) -> Iterator[str]:
    begins, head = row.parent_position, row.head
    if row.parent_branch is None and begins != 0:
        yield f"it begins at position {begins} of no branch"
    if row.parent_branch is not None and row.parent is None:
        yield "its parent is missing"
    elif row.parent is not None and row.reached < begins:
        yield f"it begins at position {begins} of a branch whose head is {row.reached}"
    if head < begins:
        yield f"its head is {head}, and it begins at {begins}"
    elif row.held and row.lowest < begins:
        yield f"it has an item at position {row.lowest}, and begins at {begins}"
    elif row.held and row.highest >= head:
        yield f"it has an item at position {row.highest}, and its head is {head}"
    elif row.held != head - begins:
        yield f"it has {row.held} items, and {head - begins} positions"


# Items.

_ITEMS = select(
    items.c.branch_id,
    items.c.position,
    items.c.tenant,
    items.c.item_id,
    items.c.type,
    items.c.digest,
    items.c.payload,
    branches.c.tenant.label("owner"),
).outerjoin(branches, branches.c.id == items.c.branch_id)


def _item(row: Row[Any], _: _Hour) -> Iterator[str]:
    if row.owner is None:
        yield "its branch is missing"
    elif row.owner != row.tenant:
        yield "its branch is another tenant's"
    try:
        item = orjson.loads(row.payload)
        told, found = (item["id"], item["type"]), digest(item)
    except _UNREADABLE:
        yield "its payload cannot be read"
        return
    if told != (row.item_id, row.type):
        yield "its payload has another id or type"
    if found != row.digest:
        yield "its digest is another item's"


_UNREADABLE = (IllegalDelta, ValueError, TypeError, LookupError)


# Responses and their journals.

_bases = branches.alias("bases")
_GONE = ("request", "asked", "owner", "lease_until")  # once it has ended
_RESPONSES = (
    select(
        *(responses.c[name] for name in ("id", "status", "base", "branch_id", "first", "own", "output_at", "stop")),
        *(responses.c[name] for name in ("owner", "lease_until", "journal_until", "preamble")),
        *(responses.c[name].is_not(None).label(f"has_{name}") for name in (*_GONE, "input", "output", "error")),
        branches.c.head,
        branches.c.parent_position.label("begins"),
        _bases.c.id.label("continues"),
        preambles.c.digest.label("told"),
        exists().where(journal.c.response_id == responses.c.id).label("has_journal"),
    )
    .outerjoin(branches, branches.c.id == responses.c.branch_id)
    .outerjoin(_bases, _bases.c.id == responses.c.base)
    .outerjoin(preambles, and_(preambles.c.tenant == responses.c.tenant, preambles.c.digest == responses.c.preamble))
)


async def _judge_responses(
    connection: AsyncConnection, rows: Sequence[Row[Any]], hour: _Hour
) -> list[tuple[Row[Any], str]]:
    wrong = [(row, why) for row in rows for why in _response(row, hour)]
    by_id = {row.id: row for row in rows if row.has_journal}
    for stored in await load(connection, list(by_id)) if by_id else ():
        why = _journal_of(stored, await read_journal(connection, stored.id))
        if why is not None:
            wrong.append((by_id[stored.id], why))
    return wrong


def _response(row: Row[Any], hour: _Hour) -> Iterator[str]:
    if row.preamble is not None and row.told is None:
        yield "its preamble is missing"
    if row.status in RUNNING:
        yield from _unfinished(row, hour)
    elif row.status in _ENDED:
        yield from _ended(row)
    else:
        yield "its status is unknown"


def _unfinished(row: Row[Any], hour: _Hour) -> Iterator[str]:
    is_waiting = row.status == "queued" and row.owner is None
    if row.lease_until is None:
        yield "it has not ended, and has no lease"
    elif not is_waiting and row.lease_until + hour.lease + _MARGIN < hour.now:
        yield "its lease ran out long ago, and nobody has taken it over"
    if row.base is not None and row.continues is None:
        yield "the branch it continues is missing"
    if row.branch_id is not None:
        yield "it has not ended, and is on a branch"


def _ended(row: Row[Any]) -> Iterator[str]:
    for name in _GONE:
        if getattr(row, f"has_{name}"):
            yield f"it has ended, and has its {name} still"
    if row.has_journal and row.journal_until is None:
        yield "it has ended, and its journal is kept for ever"
    if row.has_error != (row.status == "failed"):
        yield f"it is {row.status}, and has {'an' if row.has_error else 'no'} error"
    if (row.branch_id is not None) != (row.status in _ON_BRANCH):
        yield f"it is {row.status}, and on {'no' if row.branch_id is None else 'a'} branch"
    elif row.branch_id is None:
        if not (row.has_input and row.has_output):
            yield "its items are nowhere"
    elif row.has_input or row.has_output:
        yield "its items are on a branch and on its row"
    else:
        yield from _span(row)


def _span(row: Row[Any]) -> Iterator[str]:
    if row.head is None:
        yield "its branch is missing"
    elif row.output_at is None or row.stop is None or not 0 <= row.first <= row.own <= row.output_at <= row.stop:
        yield f"its span is out of order: {row.first}, {row.own}, {row.output_at}, {row.stop}"
    elif row.own < row.begins:
        yield f"it added items from position {row.own} on, and its branch begins at {row.begins}"
    elif row.stop > row.head:
        yield f"its span stops at {row.stop}, and its branch's head is {row.head}"


def _journal_of(row: StoredResponse, entries: Sequence[Entry]) -> str | None:
    """What is wrong with a response's journal, which may have been dropped meanwhile."""
    number = 0
    for entry in entries:
        if entry.first != number:
            return f"its journal goes on with event {entry.first} where {number} is next"
        number += entry.events
    try:
        builder = fold(envelope_at_creation(row), (entry.payload for entry in entries), silent=True)
    except _UNREADABLE:
        return "its journal cannot be read"
    if entries and builder.number != number:
        return f"its journal makes {builder.number} events, and counts {number}"
    if entries and not row.running and (not builder.ended or builder.status != row.status):
        return f"it is {row.status}, and its journal ends as {builder.status}"
    return None


# What belongs to a response.

_PREAMBLES = select(
    preambles.c.tenant,
    preambles.c.digest,
    exists().where(responses.c.tenant == preambles.c.tenant, responses.c.preamble == preambles.c.digest).label("used"),
)
_JOURNAL = select(journal.c.response_id, journal.c.first, responses.c.id).outerjoin(
    responses, responses.c.id == journal.c.response_id
)


def _preamble(row: Row[Any], _: _Hour) -> Iterator[str]:
    if not row.used:
        yield "no response uses it"


def _entry(row: Row[Any], _: _Hour) -> Iterator[str]:
    if row.id is None:
        yield "its response is missing"


_CHECKS = (
    _Check((threads.c.id,), _THREADS, _each(_thread)),
    _Check((branches.c.id,), _BRANCHES, _judge_branches),
    _Check((items.c.branch_id, items.c.position), _ITEMS, _each(_item)),
    _Check((responses.c.id,), _RESPONSES, _judge_responses),
    _Check((preambles.c.tenant, preambles.c.digest), _PREAMBLES, _each(_preamble)),
    _Check((journal.c.response_id, journal.c.first), _JOURNAL, _each(_entry)),
)
