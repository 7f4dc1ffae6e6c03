"""Two workers on PostgreSQL in each other's way: one is stopped before its commit, with all its locks, while the
other does what does not go with it. SQLite lets one in at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.util import await_only

from responses_ingress.errors import PlacementOutdated
from responses_ingress.ids import named_thread
from responses_ingress.store.database import Database
from responses_ingress.store.queue import cancel, hand_over
from responses_ingress.store.retention import delete_expired, delete_idle_threads, drop_journals
from responses_ingress.store.turns import begin, use
from responses_ingress.store.values import Ending, Entry, Keep
from tests.store.claims import delete_beyond
from tests.store.desk import LEASE, NOW, Desk, at_desk

PREAMBLE = (b"digest", b'{"instructions":"long"}')
CANCELLED = Ending("cancelled", [], [])


@pytest.fixture
async def desk(postgres_database: str) -> AsyncIterator[Desk]:
    async with at_desk(postgres_database) as desk:
        yield desk


@pytest.fixture
async def other(desk: Desk, postgres_database: str) -> AsyncIterator[Desk]:
    async with at_desk(postgres_database, desk.clock, seed=1) as other:
        yield other


@dataclass
class Gate:
    """Before the commits of one worker. arrived: one stands there. go: they may."""

    arrived: asyncio.Event
    go: asyncio.Event

    async def stopped(self, work: Any) -> "asyncio.Future[Any]":
        """`work` on its way, standing at the gate."""
        on_its_way: asyncio.Future[Any] = asyncio.ensure_future(work)
        await self.arrived.wait()
        return on_its_way


@contextmanager
def gate(database: Database) -> Iterator[Gate]:
    gate = Gate(asyncio.Event(), asyncio.Event())

    def stop(_connection: object) -> None:
        gate.arrived.set()
        await_only(gate.go.wait())

    for engine in (database._write, database._rest):
        event.listen(engine.sync_engine, "commit", stop)
    try:
        yield gate
    finally:
        gate.go.set()
        for engine in (database._write, database._rest):
            event.remove(engine.sync_engine, "commit", stop)


async def waits(work: Any, watcher: Desk) -> "asyncio.Future[Any]":
    """`work` on its way, once it waits for a lock that another has."""
    on_its_way: asyncio.Future[Any] = asyncio.ensure_future(work)
    async with watcher.database.reading() as connection:
        while not (await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar_one():
            assert not on_its_way.done(), "it did not wait"
    return on_its_way


async def sweep(desk: Desk, delete: Any, *given: Any) -> int:
    async with desk.database.transaction() as connection:
        deleted: int = await delete(connection, *given)
        return deleted


# Beginning, ending and deleting.


async def test_a_parent_that_is_deleted_while_its_child_begins_leaves_its_items(desk: Desk, other: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1")
    place = await desk.after(parent)
    new = desk.new(place, previous_response_id=parent)
    with gate(desk.database) as before_commit:
        beginning = await before_commit.stopped(desk.database.submit(begin(new, place, desk.owner)))
        deleting = await waits(other.delete(parent), desk)
        before_commit.go.set()
        await beginning
    assert await deleting is True
    await desk.end(new.id, place, ["b"], ["2"])
    assert await desk.lineage(new.id) == ["a", "1", "b", "2"]


async def test_a_child_that_begins_while_its_parent_is_deleted_does_not(desk: Desk, other: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1")
    place = await desk.after(parent)
    with gate(other.database) as before_commit:
        deleting = await before_commit.stopped(other.delete(parent))
        beginning = await waits(desk.begin(place, previous_response_id=parent), desk)
        before_commit.go.set()
        assert await deleting is True
    with pytest.raises(PlacementOutdated):
        await beginning
    assert [await desk.count(table) for table in ("responses", "branches", "items")] == [0, 0, 0]


async def test_a_copy_of_a_thread_that_begins_on_a_branch_that_goes_keeps_it(desk: Desk, other: Desk) -> None:
    """The branch is not its thread's active one any more, and the last response on it is deleted just then."""
    first = await desk.turn(await desk.session("parent"), "a", "1")
    old = (await desk.row(first)).branch_id or ""
    await desk.turn(replace(await desk.session("parent"), position=0), "anew", "2")
    place = replace(await desk.session("copy"), branch_id=old, position=2)
    new = desk.new(place)
    with gate(desk.database) as before_commit:
        beginning = await before_commit.stopped(desk.database.submit(begin(new, place, desk.owner)))
        deleting = await waits(other.delete(first), desk)
        before_commit.go.set()
        await beginning
    assert await deleting is True
    await desk.end(new.id, place, ["b"], ["3"])
    assert await desk.history("copy") == ["a", "1", "b", "3"]


async def test_a_parent_that_is_deleted_while_its_child_ends_leaves_its_items(desk: Desk, other: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1")
    place = await desk.after(parent)
    child = await desk.begin(place, previous_response_id=parent)
    with gate(desk.database) as before_commit:
        ending = await before_commit.stopped(desk.end(child, place, ["b"], ["2"]))
        deleting = await waits(other.delete(parent), desk)
        before_commit.go.set()
        await ending
    assert await deleting is True
    assert await desk.lineage(child) == ["a", "1", "b", "2"]
    assert await desk.delete(child)
    assert [await desk.count(table) for table in ("branches", "items")] == [0, 0]


async def test_what_repeats_is_not_deleted_while_another_begins_with_it(desk: Desk, other: Desk) -> None:
    last = await desk.begin(place := desk.chain(), preamble=PREAMBLE)
    await desk.end(last, place, ["a"], ["1"])
    with gate(desk.database) as before_commit:
        beginning = await before_commit.stopped(desk.begin(desk.chain(), preamble=PREAMBLE))
        deleting = await waits(other.delete(last), desk)
        before_commit.go.set()
        begun = await beginning
    assert await deleting is True
    assert (await desk.row(begun)).preamble == PREAMBLE[1]


async def test_what_repeats_is_written_again_where_it_is_just_deleted(desk: Desk, other: Desk) -> None:
    last = await desk.begin(place := desk.chain(), preamble=PREAMBLE)
    await desk.end(last, place, ["a"], ["1"])
    with gate(other.database) as before_commit:
        deleting = await before_commit.stopped(other.delete(last))
        beginning = await waits(desk.begin(desk.chain(), preamble=PREAMBLE), desk)
        before_commit.go.set()
        assert await deleting is True
    assert (await desk.row(await beginning)).preamble == PREAMBLE[1]


async def test_a_thread_in_which_a_turn_begins_is_passed_by(desk: Desk, other: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    desk.clock.now += 100
    place = await desk.session()
    with gate(desk.database) as before_commit:
        beginning = await before_commit.stopped(desk.begin(place))
        assert await sweep(other, delete_idle_threads, NOW + 50) == 0
        before_commit.go.set()
        await beginning
    assert await sweep(other, delete_idle_threads, NOW + 50) == 0


async def test_a_turn_does_not_begin_in_a_thread_that_is_just_deleted(desk: Desk, other: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1", store=False)
    desk.clock.now += 100
    place = await desk.session()
    with gate(other.database) as before_commit:
        deleting = await before_commit.stopped(sweep(other, delete_idle_threads, NOW + 50))
        beginning = await waits(desk.begin(place), desk)
        before_commit.go.set()
        assert await deleting == 1
    with pytest.raises(PlacementOutdated):
        await beginning
    await desk.turn(await desk.session(), "b", "2")
    assert await desk.history() == ["b", "2"]


async def test_what_is_used_just_then_does_not_expire(desk: Desk, other: Desk) -> None:
    keep = Keep(response=900)
    old = await desk.turn(desk.chain(), "a", "1", keep=keep)
    desk.clock.now += 900
    with gate(desk.database) as before_commit:
        using = await before_commit.stopped(desk.database.submit(use(old, keep)))
        assert await sweep(other, delete_expired, desk.clock()) == 0
        before_commit.go.set()
        await using
    assert await sweep(other, delete_expired, desk.clock()) == 0


# Several workers that sweep.


async def test_two_that_delete_beyond_a_number_do_not_delete_twice_as_many(desk: Desk, other: Desk) -> None:
    for number in range(10):
        await desk.turn(desk.chain(), str(number), "")
    with gate(desk.database) as before_commit:
        sweeping = await before_commit.stopped(sweep(desk, delete_beyond, 6))
        assert await sweep(other, delete_beyond, 6) == 0
        before_commit.go.set()
        assert await sweeping == 4
    assert await desk.count("responses") == 6


async def test_what_one_sweeps_the_other_passes_by(desk: Desk, other: Desk) -> None:
    keep = Keep(journal=10, response=900)
    for number in range(6):
        place = await desk.session(str(number))
        id = await desk.begin(place)
        await desk.end(id, place, ["a"], ["1"], lingers=True, journal=Entry(0, 1, b"[]"), keep=keep)
    desk.clock.now += 900
    now = desk.clock()
    sweeps: list[tuple[Any, ...]] = [(drop_journals, now), (delete_expired, now), (delete_idle_threads, now)]
    for given in sweeps:
        with gate(desk.database) as before_commit:
            sweeping = await before_commit.stopped(sweep(desk, *given))
            assert await sweep(other, *given) == 0
            before_commit.go.set()
            assert await sweeping == 6
    assert [await desk.count(table) for table in ("responses", "threads", "branches", "items")] == [0, 0, 0, 0]


async def test_sweeping_and_writing_side_by_side_disturb_nobody(desk: Desk, other: Desk) -> None:
    """Nobody waits in a circle, however turns and sweeps come together; and no history breaks."""
    keep = Keep(journal=0.5, response=1)
    roots = [await desk.turn(desk.chain(), f"root {number}", "!") for number in range(4)]

    async def grow(worker: Desk, name: str) -> None:
        for number in range(25):
            parents = roots if number % 2 else roots[::-1]
            places = [await worker.after(parent) for parent in parents]
            ids = [
                await worker.begin(place, previous_response_id=parent, preamble=PREAMBLE)
                for place, parent in zip(places, parents, strict=True)
            ]
            facts: dict[str, Any] = {"lingers": True, "journal": Entry(0, 1, b"[]"), "keep": keep}
            await asyncio.gather(
                *(worker.end(id, place, [name], ["!"], **facts) for id, place in zip(ids, places, strict=True)),
                *(worker.database.submit(use(parent, Keep())) for parent in roots),
            )
            worker.clock.now += 0.25

    async def tidy(worker: Desk, growing: "asyncio.Future[Any]") -> None:
        while not growing.done():
            for delete in (drop_journals, delete_expired):
                await sweep(worker, delete, worker.clock())

    growing = asyncio.gather(grow(desk, "here"), grow(other, "there"))
    await asyncio.gather(growing, tidy(desk, growing), tidy(other, growing))
    desk.clock.now += 10
    while await sweep(desk, delete_expired, desk.clock()):
        pass
    for number, root in enumerate(roots):
        assert await desk.lineage(root) == [f"root {number}", "!"]
    assert [await desk.count(table) for table in ("responses", "branches", "items", "preambles")] == [4, 4, 8, 0]


# Claiming.


async def test_who_claims_passes_by_what_is_just_cancelled(desk: Desk, other: Desk) -> None:
    row = await desk.row(await desk.wait())
    with gate(desk.database) as before_commit:
        cancelling = await before_commit.stopped(desk.database.submit(cancel(row, CANCELLED)))
        assert await other.claim() == []
        before_commit.go.set()
        await cancelling
    assert (await desk.row(row.id)).status == "cancelled"


async def test_who_cancels_what_is_just_claimed_asks_its_owner(desk: Desk, other: Desk) -> None:
    row = await desk.row(await desk.wait())
    with gate(other.database) as before_commit:
        claiming = await before_commit.stopped(other.claim())
        cancelling = await waits(desk.database.submit(cancel(row, CANCELLED)), desk)
        before_commit.go.set()
        assert [one.id for one in await claiming] == [row.id]
    await cancelling
    after = await desk.row(row.id)
    assert (after.status, after.owner, after.asked) == ("queued", other.owner.name, "cancel")


async def test_what_is_just_handed_over_is_claimed_when_it_is(desk: Desk, other: Desk) -> None:
    response_id = await desk.begin(await desk.session())
    desk.clock.now += LEASE
    given = hand_over(response_id, desk.owner, named_thread("", "s"), resumable=True, said=False)
    with gate(desk.database) as before_commit:
        giving = await before_commit.stopped(desk.database.submit(given))
        assert await other.claim_left() == []
        before_commit.go.set()
        await giving
    assert [row.id for row in await other.claim_left()] == [response_id]


async def test_what_is_just_renewed_is_not_claimed(desk: Desk, other: Desk) -> None:
    response_id = await desk.begin(desk.chain())
    desk.clock.now += LEASE
    with gate(desk.database) as before_commit:
        renewing = await before_commit.stopped(desk.renew(response_id))
        assert await other.claim_left() == []
        before_commit.go.set()
        await renewing
    assert await other.claim_left() == []


async def test_what_is_just_claimed_is_not_renewed(desk: Desk, other: Desk) -> None:
    response_id = await desk.begin(await desk.session())
    desk.clock.now += LEASE
    with gate(other.database) as before_commit:
        claiming = await before_commit.stopped(other.claim_left())
        renewing = await waits(desk.renew(response_id, NOW + 10 * LEASE), desk)
        before_commit.go.set()
        assert [row.id for row in await claiming] == [response_id]
    await renewing
    desk.clock.now += LEASE
    assert [row.id for row in await desk.claim_left()] == [response_id]
