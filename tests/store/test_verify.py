"""What `verify` finds: nothing in what the server itself has written, and every kind of damage by its row."""

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event

from responses_ingress.core.deltas import Text
from responses_ingress.core.request import Caller
from responses_ingress.errors import SettingsError, UpstreamError
from responses_ingress.runs.runner import Limits
from responses_ingress.runs.tail import Tail
from responses_ingress.store import verify as verification
from responses_ingress.store.retention import collect
from responses_ingress.store.tables import threads
from responses_ingress.store.verify import verify
from responses_ingress.testing import opened, spoken
from tests.runs.stage import SESSION, Stage, staged, taken, until
from tests.store.desk import Desk
from tests.stranger import TABLES

LEASE = 30.0
LIMITS = Limits(flush_interval=0, lease=LEASE, max_background=0)
ELSEWHERE = Caller(thread_key="another session")
Ids = dict[str, str]


async def inhabit(stage: Stage) -> Ids:
    """Let all kinds of things come to be; the ids of responses by what they are, and of rows beside them."""
    ids: Ids = {}

    async def turn(name: str, caller: Caller | None = None, **fields: object) -> str:
        run = await stage.play(*spoken(f"said {name}"), caller=caller, **fields)
        await run.ended
        ids[name] = run.id
        return run.id

    first = await turn("first", instructions="Be brief.")
    await turn("second", previous_response_id=first)
    await turn("fork", previous_response_id=first)
    await turn("turn", SESSION)
    await turn("unstored", SESSION, store=False)
    said = {"type": "message", "role": "assistant", "content": "something else"}
    await turn("rewritten", SESSION, input=[said, {"role": "user", "content": "and now?"}])
    stage.backend.script([opened(), [Text(0, "half")], UpstreamError("Broken.")])
    failed = await stage.create(caller=SESSION)
    await failed.ended
    alone = await stage.play(opened(), UpstreamError("Broken."))
    await alone.ended
    deleted = await turn("deleted", previous_response_id=ids["second"])
    assert await stage.runner.delete("", deleted)
    waiting = await stage.ask("later", background=True)
    assert isinstance(waiting, Tail)
    running = await stage.play(opened(), [Text(0, "so far")], asyncio.Event(), caller=ELSEWHERE)
    await taken(running, "so far")
    await until(lambda: len(stage.journal(running.id)) == 2)
    ids |= {"failed": failed.id, "alone": alone.id, "waiting": waiting.id, "running": running.id}
    ids |= {f"{name} branch": stage.row(ids[name])["branch_id"] for name in ("first", "fork", "turn", "rewritten")}
    ids |= {"thread": stage.thread()["id"], "other thread": stage.thread("another session")["id"]}
    return ids


async def found(url: str, now: float, lease: float = LEASE) -> set[str]:
    findings: list[str] = []
    await verify(url, lease, lambda finding: findings.append(str(finding)), now)
    assert len(findings) == len(set(findings))
    return set(findings)


async def test_a_database_in_use_has_no_findings_and_every_row_is_looked_at(
    each_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "PAGE", 2)
    async with staged(each_database, LIMITS) as stage:
        await inhabit(stage)
        findings: list[object] = []
        seen = await verify(each_database, LEASE, findings.append, stage.clock())
        assert findings == []
        counts = {table: stage.rows(f"SELECT count(*) AS count FROM {table}")[0]["count"] for table in TABLES}
        assert seen == counts
        assert all(counts.values())


async def test_what_no_worker_recovers_is_found_by_the_databases_own_clock(each_database: str) -> None:
    async with staged(each_database, LIMITS) as stage:
        ids = await inhabit(stage)
        overdue = "its lease ran out long ago, and nobody has taken it over"
        assert await found(each_database, stage.clock() + LEASE + LEASE + 9) == set()
        late = stage.clock() + LEASE + LEASE + 11
        assert await found(each_database, late) == {f"responses {ids['running']}: {overdue}"}
        findings: list[object] = []
        await verify(each_database, LEASE, findings.append)  # the stage's clock stands still in the past
        assert [str(finding) for finding in findings] == [f"responses {ids['running']}: {overdue}"]


async def test_what_has_only_moved_is_no_finding(each_database: str) -> None:
    """A row is wrong when it is read, and right when it is read again."""
    async with staged(each_database, LIMITS) as stage:
        await inhabit(stage)
        stage.stranger.execute("UPDATE threads SET running = 'gone', lease_until = 1e12")

        def mend(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if "FROM threads" in statement:
                stage.stranger.execute("UPDATE threads SET running = NULL")

        event.listen(Engine, "after_cursor_execute", mend)
        try:
            assert await found(each_database, stage.clock()) == set()
        finally:
            event.remove(Engine, "after_cursor_execute", mend)
        stage.stranger.execute("UPDATE threads SET running = 'gone'")
        assert len(await found(each_database, stage.clock())) == 2


Inhabited = tuple[Path, Ids, float]


@pytest.fixture(scope="session")
def inhabited(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Inhabited:
    """A file as a crash would have left it, what is in it, and when."""
    folder = tmp_path_factory.mktemp("inhabited")
    url = f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, folder / 'live.db')}"

    async def make() -> tuple[Ids, float]:
        async with staged(url, LIMITS) as stage:
            ids = await inhabit(stage)
            stage.stranger.execute(f"VACUUM INTO '{folder / 'left.db'}'")
            return ids, stage.clock()

    return (folder / "left.db", *asyncio.run(make()))


DAMAGE = {
    # Threads.
    "UPDATE threads SET active_branch = 'gone' WHERE id = '{thread}'": "threads {thread}: its active branch is missing",
    "UPDATE threads SET active_branch = '{fork branch}' WHERE id = '{thread}'": (
        "threads {thread}: its active branch is another thread's"
    ),
    "UPDATE threads SET running = '{turn}', lease_until = 1e12 WHERE id = '{thread}'": (
        "threads {thread}: its turn is taken by a response that does not run"
    ),
    "UPDATE threads SET running = 'gone', lease_until = 1e12 WHERE id = '{thread}'": (
        "threads {thread}: its turn is taken by a response that does not run"
    ),
    "UPDATE threads SET running = '{running}', lease_until = 1e12 WHERE id = '{thread}'": (
        "threads {thread}: its turn is taken by a response of another thread"
    ),
    # Branches.
    "UPDATE branches SET head = head + 1 WHERE id = '{first branch}'": (
        "branches {first branch}: it has 4 items, and 5 positions"
    ),
    "DELETE FROM items WHERE branch_id = '{first branch}' AND position = 1": (
        "branches {first branch}: it has 3 items, and 4 positions"
    ),
    "UPDATE branches SET head = 3 WHERE id = '{first branch}'": (
        "branches {first branch}: it has an item at position 3, and its head is 3"
        "|responses {second}: its span stops at 4, and its branch's head is 3"
    ),
    "UPDATE items SET position = 1 WHERE branch_id = '{fork branch}' AND position = 2": (
        "branches {fork branch}: it has an item at position 1, and begins at 2"
    ),
    "UPDATE branches SET parent_position = 1 WHERE id = '{first branch}'": (
        "branches {first branch}: it begins at position 1 of no branch"
        "|branches {first branch}: it has an item at position 0, and begins at 1"
        "|responses {first}: it added items from position 0 on, and its branch begins at 1"
    ),
    "UPDATE branches SET parent_branch = 'gone' WHERE id = '{fork branch}'": (
        "branches {fork branch}: its parent is missing"
    ),
    "UPDATE branches SET parent_position = 9, head = 9 WHERE id = '{fork branch}'": (
        "branches {fork branch}: it begins at position 9 of a branch whose head is 4"
        "|branches {fork branch}: it has an item at position 2, and begins at 9"
        "|responses {fork}: it added items from position 2 on, and its branch begins at 9"
    ),
    "UPDATE branches SET head = 1 WHERE id = '{fork branch}'": (
        "branches {fork branch}: its head is 1, and it begins at 2"
        "|responses {fork}: its span stops at 4, and its branch's head is 1"
    ),
    "UPDATE branches SET parent_branch = '{fork branch}' WHERE id = '{first branch}'": (
        "branches {fork branch}: it is its own ancestor"  # one finding a circle
    ),
    "UPDATE branches SET parent_branch = id WHERE id = '{fork branch}'": (
        "branches {fork branch}: it is its own ancestor"
    ),
    "INSERT INTO branches SELECT 'left', tenant, 'gone', NULL, 0, 0 FROM branches WHERE id = '{first branch}'": (
        "branches left: nothing needs it"
    ),
    "DELETE FROM responses WHERE id = '{fork}'": (
        "branches {fork branch}: nothing needs it|journal {fork}/0: its response is missing"
        "|journal {fork}/4: its response is missing|journal {fork}/5: its response is missing"
    ),
    # Items.
    "INSERT INTO items SELECT 'left', 0, tenant, item_id, type, digest, payload FROM items LIMIT 1": (
        "items left/0: its branch is missing"
    ),
    "UPDATE items SET tenant = 'x' WHERE branch_id = '{fork branch}' AND position = 2": (
        "items {fork branch}/2: its branch is another tenant's"
    ),
    "UPDATE items SET digest = x'00' WHERE branch_id = '{fork branch}' AND position = 2": (
        "items {fork branch}/2: its digest is another item's"
    ),
    "UPDATE items SET type = 'reasoning' WHERE branch_id = '{fork branch}' AND position = 2": (
        "items {fork branch}/2: its payload has another id or type"
    ),
    "UPDATE items SET payload = x'00' WHERE branch_id = '{fork branch}' AND position = 2": (
        "items {fork branch}/2: its payload cannot be read"
    ),
    # Responses.
    "UPDATE responses SET status = 'unwell' WHERE id = '{first}'": (
        "responses {first}: its status is unknown|responses {first}: it is unwell, and its journal ends as completed"
    ),
    "UPDATE responses SET lease_until = NULL WHERE id = '{running}'": (
        "responses {running}: it has not ended, and has no lease"
    ),
    "UPDATE responses SET base = 'gone' WHERE id = '{running}'": (
        "responses {running}: the branch it continues is missing"
    ),
    "UPDATE responses SET branch_id = '{first branch}' WHERE id = '{running}'": (
        "responses {running}: it has not ended, and is on a branch"
    ),
    "UPDATE responses SET owner = 'x', asked = 'cancel' WHERE id = '{first}'": (
        "responses {first}: it has ended, and has its owner still"
        "|responses {first}: it has ended, and has its asked still"
    ),
    "UPDATE responses SET lease_until = 1, request = x'00' WHERE id = '{failed}'": (
        "responses {failed}: it has ended, and has its lease_until still"
        "|responses {failed}: it has ended, and has its request still"
    ),
    "UPDATE responses SET journal_until = NULL WHERE id = '{first}'": (
        "responses {first}: it has ended, and its journal is kept for ever"
    ),
    "UPDATE responses SET error = NULL WHERE id = '{failed}'": "responses {failed}: it is failed, and has no error",
    "UPDATE responses SET error = x'00' WHERE id = '{first}'": "responses {first}: it is completed, and has an error",
    "UPDATE responses SET branch_id = NULL WHERE id = '{first}'": (
        "responses {first}: it is completed, and on no branch"
    ),
    "UPDATE responses SET branch_id = '{turn branch}' WHERE id = '{failed}'": (
        "responses {failed}: it is failed, and on a branch"
    ),
    "UPDATE responses SET input = NULL WHERE id = '{failed}'": "responses {failed}: its items are nowhere",
    "UPDATE responses SET input = x'5b5d' WHERE id = '{first}'": (
        "responses {first}: its items are on a branch and on its row"
    ),
    "UPDATE responses SET branch_id = 'gone' WHERE id = '{first}'": "responses {first}: its branch is missing",
    "UPDATE responses SET output_at = 3 WHERE id = '{first}'": (
        "responses {first}: its span is out of order: 0, 0, 3, 2"
    ),
    "UPDATE responses SET stop = NULL WHERE id = '{first}'": (
        "responses {first}: its span is out of order: 0, 0, 1, None"
    ),
    "UPDATE responses SET own = 1 WHERE id = '{fork}'": "responses {fork}: its span is out of order: 2, 1, 3, 4",
    # What belongs to a response.
    "UPDATE preambles SET digest = x'00'": (
        "responses {first}: its preamble is missing|preambles 00: no response uses it"
    ),
    "UPDATE journal SET first = first + 100 WHERE response_id = '{running}' AND first > 0": (
        "responses {running}: its journal goes on with event 104 where 4 is next"
    ),
    "UPDATE journal SET count = count + 1 WHERE response_id = '{first}' AND first = 5": (
        "responses {first}: its journal makes 9 events, and counts 10"
    ),
    "UPDATE responses SET status = 'incomplete' WHERE id = '{first}'": (
        "responses {first}: it is incomplete, and its journal ends as completed"
    ),
    "DELETE FROM journal WHERE response_id = '{first}' AND first = 5": (
        "responses {first}: it is completed, and its journal ends as in_progress"
    ),
    "UPDATE journal SET payload = x'00' WHERE response_id = '{running}' AND first = 0": (
        "responses {running}: its journal cannot be read"
    ),
    "UPDATE journal SET payload = x'5b5d' WHERE response_id = '{running}' AND first = 0": (
        "responses {running}: its journal cannot be read"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_is_found_and_nothing_beside_it(inhabited: Inhabited, tmp_path: Path, damage: str) -> None:
    file, ids, now = inhabited
    copy = shutil.copy(file, tmp_path / "damaged.db")
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        assert connection.execute(damage.format(**ids)).rowcount > 0
    assert await found(f"sqlite+aiosqlite:///{copy}", now) == set(DAMAGE[damage].format(**ids).split("|"))


async def test_a_database_that_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(SettingsError, match="x.db cannot be used: file is not a database"):
        await found(f"sqlite+aiosqlite:///{tmp_path}/x.db", 0)


async def test_a_branch_that_is_needed_below_its_beginning_only_stays_without_items(
    each_database: str, desk: Desk
) -> None:
    """A turn begins below the place where the session's branch forked, and then the session is gone."""
    await desk.turn(await desk.session(), "a", "1", store=False)
    straight = replace(await desk.session(), position=1, first=0)
    await desk.turn(straight, "b", "2", store=False)
    forked = await desk.session()
    assert forked.branch_id != straight.branch_id
    await desk.begin(replace(forked, position=0, first=0), store=False)
    async with desk.database.transaction() as connection:
        await connection.execute(delete(threads))
        await collect(connection, [forked.branch_id])
    assert await found(each_database, desk.clock()) == set()


FORKS = [
    "INSERT INTO branches (id, tenant, thread_id, parent_branch, parent_position, head)"
    " SELECT printf('%016x%012x', 7, n), '', 'thread', CASE WHEN n > 1 THEN printf('%016x%012x', 7, 1) END, 0, 0"
    " FROM s",
    "INSERT INTO responses (id, tenant, thread_id, base, branch_id, first, own, output_at, stop, status, model,"
    " backend, background, store, envelope, epoch, created_at) SELECT printf('resp_%016x%034x', 7, n), '', 'thread',"
    " printf('%016x%012x', 7, 1), printf('%016x%012x', 7, n), 0, 0, 0, 0, 'completed', 'm', 'echo', false, true, '{}',"
    " 1, 1 FROM s",
]


@pytest.mark.parametrize("damage", ["", "UPDATE responses SET status = 'failed', branch_id = NULL, error = '{}'"])
async def test_the_cost_does_not_grow_with_the_square_of_a_threads_forks(sqlite_template: Path, damage: str) -> None:
    """Where its responses are on the branches, and where nothing needs these."""

    async def cost(forks: int) -> int:
        """SQLite's steps, in thousands."""
        file = shutil.copy(sqlite_template, sqlite_template.with_name(f"forks{forks}.db"))
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            for statement in FORKS:
                series = f"WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {forks}) "
                connection.execute(statement.replace(" SELECT", f" {series} SELECT", 1))
            connection.executescript(damage)
        return await steps(lambda: verify(f"sqlite+aiosqlite:///{file}", LEASE, lambda _: None, 1.0))

    assert await cost(4000) < 10 * await cost(1000)


async def steps(work: Callable[[], Awaitable[object]]) -> int:
    """How many thousand steps SQLite takes for the work."""
    taken = 0

    def count() -> None:
        nonlocal taken
        taken += 1

    def listen(connection: Any, _: object) -> None:
        connection.run_async(lambda driver: driver.set_progress_handler(count, 1000))

    event.listen(Engine, "connect", listen)
    try:
        await work()
    finally:
        event.remove(Engine, "connect", listen)
    return taken
