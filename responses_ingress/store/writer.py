"""The group-commit writer: every unit of work that is pending when it is free goes into one transaction.

A unit decides before it writes. The batch first reads the few rows its units rely on (leases, epochs,
branch heads), each with one query for all; then each unit in turn looks at those facts, raises or
changes them and adds rows; then every kind of row is written with one `executemany`. So a refused unit
costs the others nothing, and a transaction has the same few statements for one unit and for fifty.

What must stay true: units are applied in the order they were submitted; a unit that raises has added
nothing; a unit's caller resumes only when its writes are committed; when the database refuses a batch,
its units run again one by one, so that one bad unit fails alone.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import (
    ClauseElement,
    Executable,
    Insert,
    Row,
    Table,
    bindparam,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.compiler import SQLCompiler

from responses_ingress.core.request import Retry
from responses_ingress.errors import IngressError, StoreUnavailable
from responses_ingress.ids import Clock
from responses_ingress.store.tables import are_preambles, branches, is_running, preambles, responses, threads
from responses_ingress.store.wake import CHANNEL, Bell, payloads

T = TypeVar("T")
logger = logging.getLogger(__name__)

FAULTS = (IntegrityError, DataError, ProgrammingError, NotSupportedError)
"""Of the database's errors, those in which what was to be written is at fault; so it is with any that is none of
the database's."""

OUTAGES = (DBAPIError, PoolTimeout, OSError)
"""Any other of its errors: it cannot be reached, or cannot write for now. Where the driver tells an SQLSTATE,
that decides (`_is_fault`): under PostgreSQL SQLAlchemy gives most errors the one class."""

_FAULTY_STATES = ("22", "23", "42", "54", "0A")  # data, integrity, syntax or access, too much, not supported
_CONTENTION = ("40001", "40P01")  # serialization failure, deadlock: the transaction may simply be tried again

RUNNING = ("queued", "in_progress")

_MOST_UNITS = 200
_RETRY_DELAY = 0.5
PATIENCE = 60.0
"""Seconds that work under way waits for a database that is down."""

Order = AbstractAsyncContextManager[Any]
"""Who writes next in this process: a fair lock where the database lets one write at a time."""

ALL_AT_ONCE: Order = nullcontext()


@dataclass(slots=True)
class Lease:
    """Whose a response is: the facts a run's every write depends on."""

    epoch: int
    status: str
    owner: str | None = None
    followed_until: float | None = None


class Repeat(NamedTuple):
    """A response that a repeated request may mean."""

    id: str
    body: bytes | None
    status: str
    journal_until: float | None
    created_at: int


@dataclass(slots=True)
class Thread:
    """A thread's row, as far as units change it."""

    id: str
    tenant: str
    active_branch: str
    running: str | None
    lease_until: float
    lineage: bytes | None


@dataclass(slots=True)
class Branch:
    id: str
    thread_id: str
    head: int


class Batch:
    """The facts one transaction has read, and the rows it will write."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.leases: dict[str, Lease] = {}
        self.threads: dict[str, Thread] = {}
        self.branches: dict[str, Branch] = {}
        self.repeats: defaultdict[bytes, list[Repeat]] = defaultdict(list)  # by name, the newest first
        self.preambles: set[tuple[str, bytes]] = set()  # (tenant, digest) of those that are there
        self.queued = 0  # how many responses wait in the queue
        self.topics: dict[str, None] = {}  # what to ring for, in order
        self.rows: defaultdict[Executable, list[dict[str, Any]]] = defaultdict(list)

    def add(self, statement: Executable, **row: Any) -> None:
        """Write `row` with `statement`, a module constant. Rows of one statement go out together, in the
        order they were added: inserts first, then updates, then deletes."""
        self.rows[statement].append(row)

    def ring(self, topic: str) -> None:
        """Wake who waits for `topic`, when this is committed."""
        self.topics[topic] = None

    def add_branch(self, branch: Branch, tenant: str, parent: str | None = None) -> None:
        self.add(
            _INSERT_BRANCH,
            id=branch.id,
            tenant=tenant,
            thread_id=branch.thread_id,
            parent_branch=parent,
            parent_position=branch.head,
            head=branch.head,
        )
        self.branches[branch.id] = branch

    def move_head(self, branch: Branch, head: int) -> None:
        branch.head = head
        self.add(_MOVE_HEAD, branch=branch.id, new_head=head)

    def set_thread(self, thread: Thread) -> None:
        """Write the thread as it is now."""
        self.add(
            _SET_THREAD,
            thread=thread.id,
            set_branch=thread.active_branch,
            set_running=thread.running,
            set_lease=thread.lease_until,
            set_lineage=thread.lineage,
            set_updated=int(self.now),
        )


def insert_of(table: Table, *columns: str) -> Insert:
    """An insert that gives just these columns."""
    return insert(table).values({name: bindparam(name) for name in columns or table.c.keys()})


_INSERT_BRANCH = insert_of(branches)
_MOVE_HEAD = update(branches).where(branches.c.id == bindparam("branch")).values(head=bindparam("new_head"))
_SET_THREAD = (
    update(threads)
    .where(threads.c.id == bindparam("thread"))
    .values(
        active_branch=bindparam("set_branch"),
        running=bindparam("set_running"),
        lease_until=bindparam("set_lease"),
        lineage=bindparam("set_lineage"),
        updated_at=bindparam("set_updated"),
    )
)


@dataclass(frozen=True, slots=True)
class Unit(Generic[T]):
    """A unit of work: what it must know of, and what it does. `apply` decides first and adds rows last.

    preambles:    of which of these (tenant, digest) are there, and stay at least as long as this transaction.
    repeats:      by what requests are known when they come again, see `Batch.repeats`.
    counts_queue: it must know how long the queue is.
    patient:      while the database cannot be reached it waits (work under way), instead of failing (a request).
    """

    apply: Callable[[Batch], T]
    responses: Sequence[str] = ()
    threads: Sequence[str] = ()
    branches: Sequence[str] = ()
    preambles: Sequence[tuple[str, bytes]] = ()
    repeats: Sequence[Retry] = ()
    counts_queue: bool = False
    patient: bool = False


class _Pending(Generic[T]):
    """A unit on its way, and who waits for it."""

    __slots__ = ("done", "since", "tried", "unit")

    def __init__(self, unit: Unit[T], loop: asyncio.AbstractEventLoop) -> None:
        self.unit = unit
        self.tried = False
        self.since: float | None = None  # when the database first could not be reached
        self.done: asyncio.Future[T] = loop.create_future()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def succeed(self, result: T) -> None:
        if not self.done.done():
            self.done.set_result(result)


def _query(table: Table, *columns: str) -> Executable:
    """`columns` of the rows whose id is in `:ids`, locked against other workers."""
    chosen = [table.c[name] for name in columns]
    wanted = table.c.id.in_(bindparam("ids", expanding=True))
    return select(*chosen).where(wanted).order_by(table.c.id).with_for_update()


_LEASES = _query(responses, "id", "epoch", "status", "owner", "followed_until")
_THREADS = _query(threads, "id", "tenant", "active_branch", "running", "lease_until", "lineage")
_BRANCHES = _query(branches, "id", "thread_id", "head")
_PREAMBLES = (
    select(preambles.c.tenant, preambles.c.digest)
    .where(are_preambles())
    .order_by(preambles.c.tenant, preambles.c.digest)
    .with_for_update(read=True, key_share=True)  # of others only those who delete it wait
)
_newer = responses.alias("newer")
# Of each name those of the last time: a request that is made over and over has very many.
_REPEATS = (
    select(
        responses.c.retry_key.label("name"),
        responses.c.id,
        responses.c.retry_body.label("body"),
        responses.c.status,
        responses.c.journal_until,
        responses.c.created_at,
    )
    .where(
        responses.c.retry_key.in_(bindparam("ids", expanding=True)),
        responses.c.created_at
        == select(func.max(_newer.c.created_at)).where(_newer.c.retry_key == responses.c.retry_key).scalar_subquery(),
    )
    .order_by(responses.c.created_at.desc(), responses.c.id.desc())
)
_QUEUED = select(func.count()).select_from(responses).where(is_running, responses.c.status == "queued")
_LOCK = text("SELECT pg_advisory_xact_lock(name) FROM unnest(CAST(:names AS BIGINT[])) AS name")
_QUEUE_LOCK = 7_230_517_665
_NOTIFY = text("SELECT pg_notify(:channel, :payload)")


class Writer:
    """The writer of one process. `submit` from the loop it runs in; `close` when all is submitted."""

    def __init__(
        self, engine: AsyncEngine, clock: Clock, bell: Bell, patience: float = PATIENCE, order: Order = ALL_AT_ONCE
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._order = order
        self._clock = clock
        self._bell = bell
        self._patience = patience
        self._many = engine.dialect.name == "postgresql"
        """Whether others write at the same time: SQLite lets one in at a time."""
        self._pending: list[_Pending[Any]] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._statements: dict[Executable, tuple[str, Callable[[dict[str, Any]], Any]]] = {}
        self._task = asyncio.create_task(self._run(), name="store-writer")

    def submit(self, unit: Unit[T]) -> asyncio.Future[T]:
        """Commit `unit` with whatever else is pending. The future raises what the unit raised, or
        `StoreUnavailable`; cancelling it does not take the unit back."""
        pending = _Pending(unit, self._loop)
        if self._closing:
            pending.fail(StoreUnavailable("The server is shutting down.", retry_after=1))
        else:
            self._pending.append(pending)
            self._wake.set()
        return pending.done

    @property
    def working(self) -> bool:
        return not self._task.done()

    async def close(self) -> None:
        """Commit what is pending, then stop."""
        self._closing = True
        self._wake.set()
        await self._task

    async def _run(self) -> None:
        while not (self._closing and not self._pending):
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                batch, self._pending = self._pending[:_MOST_UNITS], self._pending[_MOST_UNITS:]
                self._pending[:0] = await self._commit(batch)

    async def _commit(self, pending: Sequence[_Pending[Any]]) -> Sequence[_Pending[Any]]:
        """Write these; what of them is to be tried again, before anything that came later."""
        try:
            results = await self._transact(pending)
        except Exception as error:  # also a fault of ours must fail its own unit, and not end the writer
            if not _is_fault(error):
                return await self._put_off(pending, error)
            return await (self._commit_singly(pending) if len(pending) > 1 else self._try_again(pending[0], error))
        for one, result in zip(pending, results, strict=True):
            one.fail(result) if isinstance(result, Exception) else one.succeed(result)
        return ()

    async def _commit_singly(self, pending: Sequence[_Pending[Any]]) -> Sequence[_Pending[Any]]:
        """One of these cannot be written: alone, it fails alone. None passes one that is put off."""
        for at, one in enumerate(pending):
            left = await self._commit((one,))
            if left:
                return [*left, *pending[at + 1 :]]
        return ()

    async def _try_again(self, one: _Pending[Any], error: Exception) -> Sequence[_Pending[Any]]:
        """Where another worker was first with a row that the unit inserts, it finds that row when it is applied
        again, with the facts as they are now."""
        if not one.tried:
            one.tried = True
            return await self._commit((one,))
        logger.error("a unit of work cannot be written: %s", kind(error))
        one.fail(StoreUnavailable("The database refused to store this.", retry_after=2))
        return ()

    async def _put_off(self, pending: Sequence[_Pending[Any]], error: Exception) -> Sequence[_Pending[Any]]:
        """The database cannot be reached: requests fail, work under way waits for it, up to a limit. Where
        two workers were only in each other's way, everything is tried again."""
        contended = sqlstate(error) in _CONTENTION
        if not contended:
            logger.error("the database failed a batch of %d: %s", len(pending), kind(error))
        now = self._loop.time()
        waiting = []
        for one in pending:
            one.since = one.since or now
            if (one.unit.patient or contended) and now - one.since < self._patience:
                waiting.append(one)
            else:
                one.fail(StoreUnavailable("The database cannot be written to now.", retry_after=2))
        if not contended:
            await asyncio.sleep(_RETRY_DELAY)
        return waiting

    async def _transact(self, pending: Sequence[_Pending[Any]]) -> list[Any]:
        """One transaction; each unit's result, or the error it refused with."""
        async with self._order, self._engine.begin() as connection:
            batch = await self._read_facts(connection, [one.unit for one in pending])
            results = [_apply(one.unit, batch) for one in pending]
            for statement in sorted(batch.rows, key=_rank):
                sql, pick = self._compiled(statement)
                await connection.exec_driver_sql(sql, [pick(row) for row in batch.rows[statement]])
            if self._many:
                for payload in payloads(batch.topics):
                    await connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": payload})
        self._bell.ring(batch.topics)
        return results

    def _compiled(self, statement: Executable) -> tuple[str, Callable[[dict[str, Any]], Any]]:
        """The statement in the driver's words, and what puts a row's values into its order. Compiled once:
        SQLAlchemy's own handling of each row costs as much as writing it."""
        known = self._statements.get(statement)
        if known is None:
            assert isinstance(statement, ClauseElement)
            compiled = statement.compile(dialect=self._engine.dialect)
            assert isinstance(compiled, SQLCompiler) and compiled.positiontup is not None
            names = list(compiled.positiontup)
            pick = itemgetter(*names) if len(names) > 1 else lambda row: (row[names[0]],)
            known = self._statements[statement] = (str(compiled), pick)
        return known

    async def _read_facts(self, connection: AsyncConnection, units: Sequence[Unit[Any]]) -> Batch:
        batch = Batch(self._clock())
        retries = [retry for unit in units for retry in unit.repeats]
        if retries and self._many:  # two workers given the same request: the second sees the first
            names = {int.from_bytes(retry.name[:8], signed=True) for retry in retries}
            await connection.execute(_LOCK, {"names": sorted(names)})
        for row in await _fetch(connection, _LEASES, (id for unit in units for id in unit.responses)):
            batch.leases[row.id] = Lease(row.epoch, row.status, row.owner, row.followed_until)
        for row in await _fetch(connection, _THREADS, (id for unit in units for id in unit.threads)):
            batch.threads[row.id] = Thread(**row._mapping)
        for row in await _fetch(connection, _BRANCHES, (id for unit in units for id in unit.branches)):
            batch.branches[row.id] = Branch(row.id, row.thread_id, row.head)
        told = {key for unit in units for key in unit.preambles}
        if told:
            keys = {"tenants": list({tenant for tenant, _ in told}), "digests": list({digest for _, digest in told})}
            batch.preambles.update((row.tenant, row.digest) for row in await connection.execute(_PREAMBLES, keys))
        for row in await _fetch(connection, _REPEATS, (retry.name for retry in retries if retry.attaches)):
            batch.repeats[row.name].append(Repeat(row.id, row.body, row.status, row.journal_until, row.created_at))
        if any(unit.counts_queue for unit in units):
            if self._many:  # so that no two workers fill the same last place
                await connection.execute(_LOCK, {"names": [_QUEUE_LOCK]})
            batch.queued = (await connection.execute(_QUEUED)).scalar_one()
        return batch


def kind(error: Exception) -> str:
    """The driver's error by name and SQLSTATE: its text may hold what was to be written."""
    return f"{type(getattr(error, 'orig', None) or error).__name__} {sqlstate(error)}".rstrip()


def sqlstate(error: Exception) -> str:
    """PostgreSQL's five characters, or "" where the driver tells none."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _is_fault(error: Exception) -> bool:
    """Whether what was to be written is at fault, and not the state of the database."""
    state = sqlstate(error)
    return state[:2] in _FAULTY_STATES if state else isinstance(error, FAULTS) or not isinstance(error, OUTAGES)


def _rank(statement: Executable) -> int:
    return 2 if statement.is_delete else 1 if statement.is_update else 0


def _apply(unit: Unit[Any], batch: Batch) -> Any:
    try:
        return unit.apply(batch)
    except IngressError as error:
        return error
    except Exception as error:  # a fault of ours must fail its own unit, and not end the writer
        logger.exception("a unit of work failed")
        return error


async def _fetch(connection: AsyncConnection, query: Executable, ids: Iterable[str | bytes]) -> Sequence[Row[Any]]:
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return ()
    return (await connection.execute(query, {"ids": wanted})).all()
