"""A runner over a real database with a scripted backend, and what tests of it look at.

What the database holds is read over a connection of its own: what that finds is committed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.backends.base import Route
from responses_ingress.core.builder import Event
from responses_ingress.core.replay import fold
from responses_ingress.core.request import Caller, parse_request
from responses_ingress.ids import Ids
from responses_ingress.runs.feed import Follower
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.run import Run
from responses_ingress.runs.runner import Limits, Runner
from responses_ingress.runs.tail import Tail
from responses_ingress.runs.upkeep import Retention, Upkeep
from responses_ingress.store.database import Database
from responses_ingress.store.responses import StoredResponse, envelope_at_creation
from responses_ingress.testing import ManualClock, ScriptedBackend, Step
from tests.stranger import Stranger, stranger

Json = dict[str, Any]
SESSION = Caller(thread_key="a session")
_POLL = 0.005
_WITH_PREAMBLE = """
    SELECT r.*, p.payload AS told FROM responses r
    LEFT JOIN preambles p ON p.tenant = r.tenant AND p.digest = r.preamble WHERE r.id = ?
"""


class Watched(Database):
    """Knows how often it was read from or written to, but for what goes through the writer (`uses`), and
    how many do so now (`users`)."""

    uses, users = 0, 0

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        with self._using():
            async with super().reading() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        with self._using():
            async with super().transaction() as connection:
                yield connection

    @contextmanager
    def _using(self) -> Iterator[None]:
        self.uses += 1
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


@dataclass(slots=True)
class Stage:
    """One process's worth: its clock, its backend and its runner, over the database at `url`."""

    url: str
    clock: ManualClock
    ids: Ids
    database: Watched
    backend: ScriptedBackend
    metrics: Metrics
    runner: Runner
    upkeep: Upkeep
    stranger: Stranger

    async def ask(self, text: str = "hi", caller: Caller | None = None, **fields: Any) -> Run | Tail:
        """Ask for a response to `text`, which may be one that is there already."""
        body = {"model": "scripted-model", "input": text, "stream": True, **fields}
        return await self.runner.create(parse_request(body), caller or Caller())

    async def create(self, text: str = "hi", caller: Caller | None = None, **fields: Any) -> Run:
        """Begin a response to `text`, in this process."""
        run = await self.ask(text, caller, **fields)
        assert isinstance(run, Run)
        return run

    async def play(self, *steps: Step, caller: Caller | None = None, **fields: Any) -> Run:
        """Begin a response whose turn plays `steps`."""
        self.backend.script(steps)
        return await self.create(caller=caller, **fields)

    def rows(self, query: str, *values: Any) -> list[Json]:
        """What a stranger finds in the database now."""
        return self.stranger.rows(query, *values)

    async def change(self, statement: str, *values: Any) -> None:
        """Do to the database what nobody here does, when nobody is writing."""
        async with locked(self.url) as connection:
            connection.execute(statement, *values)

    def row(self, response_id: str) -> Json:
        """The row of a response."""
        (row,) = self.rows("SELECT * FROM responses WHERE id = ?", response_id)
        return row

    def thread(self, key: str = "a session") -> Json:
        """The row of a session."""
        (row,) = self.rows("SELECT * FROM threads WHERE key = ?", key)
        return row

    def journal(self, response_id: str) -> list[Json]:
        return self.rows("SELECT * FROM journal WHERE response_id = ? ORDER BY first", response_id)

    def replayed(self, response_id: str) -> list[Json]:
        """The events that a response's journal makes, from the row alone."""
        entries = self.journal(response_id)
        if not entries:
            return []
        (row,) = self.rows(_WITH_PREAMBLE, response_id)
        known = StoredResponse(**{name: row[name] for name in StoredResponse._fields} | {"preamble": row["told"]})
        return parsed(fold(envelope_at_creation(known), [entry["payload"] for entry in entries]).take())


@asynccontextmanager
async def staged(
    url: str,
    limits: Limits | None = None,
    *,
    clock: ManualClock | None = None,
    seed: int = 1,
    routes: Callable[[ScriptedBackend], Sequence[Route]] | None = None,
    backend: ScriptedBackend | None = None,
) -> AsyncIterator[Stage]:
    """A process on the database at `url`. Two at a time need different seeds."""
    clock = clock or ManualClock()
    ids = Ids(clock, Random(seed).randbytes)
    backend = backend or ScriptedBackend()
    database = Watched(url, clock)
    metrics = Metrics()
    found = routes(backend) if routes else [Route("*", backend)]
    runner = Runner(database, found, limits or Limits(), metrics, ids)
    upkeep = Upkeep(database, runner, Retention())
    with stranger(url) as connection:
        try:
            yield Stage(url, clock, ids, database, backend, metrics, runner, upkeep, connection)
        finally:
            await runner.close(0)
            await upkeep.close()
            await database.close()


@asynccontextmanager
async def locked(url: str) -> AsyncIterator[Stranger]:
    """Another writer has the database: nothing can be committed meanwhile but what it writes itself."""
    with stranger(url) as connection:
        while not connection.lock():  # noqa: ASYNC110 - waiting there would keep the server from giving way
            await asyncio.sleep(_POLL)
        yield connection
        connection.execute("COMMIT")


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state that nobody announces."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_POLL)


async def loop_turns() -> None:
    """Let everything that is ready to run do so, and what that makes ready."""
    for _ in range(20):
        await asyncio.sleep(0)


def parsed(events: Sequence[Event]) -> list[Json]:
    return [orjson.loads(event.data) for event in events]


def types(run: Run) -> list[str]:
    """The types of the events that anyone could have seen by now."""
    return [event.type for event in run.feed.events]


async def events_of(run: Run) -> list[Json]:
    """All events of a run, when it has ended."""
    await run.ended
    return parsed(run.feed.events)


async def read_until(follower: Follower, type: str) -> list[Json]:
    """Read on until an event of this type is there; gives what was read."""
    events: list[Json] = []
    while not any(event["type"] == type for event in events):
        assert not follower.done, f"no {type}, but {[event['type'] for event in events]}"
        events += parsed(await follower.next(1))
    return events


async def taken(run: Run, text: str) -> None:
    """Wait until the run has taken from its backend what makes its output read `text`."""
    await until(lambda: output_text(run.response()) == text)


def output_text(response: Json) -> str:
    """All text of a response's messages."""
    parts = [part for item in response["output"] for part in item.get("content") or ()]
    return "".join(part["text"] for part in parts)
