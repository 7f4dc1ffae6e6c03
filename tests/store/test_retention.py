"""What is deleted: so that nothing stays that nobody needs, and nobody's history breaks."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import insert, select

from responses_ingress.core.request import Retry
from responses_ingress.errors import InvalidRequest
from responses_ingress.store.history import find_holder
from responses_ingress.store.queue import hand_over
from responses_ingress.store.responses import find_response, load, read_journal
from responses_ingress.store.retention import (
    MOST,
    delete_expired,
    delete_idle_threads,
    delete_response,
    drop_journals,
)
from responses_ingress.store.tables import branches, responses
from responses_ingress.store.turns import append_journal, use
from responses_ingress.store.values import Entry, Keep, Placement
from tests.store.claims import delete_beyond
from tests.store.desk import LEASE, Desk
from tests.store.test_history import statements

NOTHING = {"responses": 0, "branches": 0, "items": 0, "journal": 0}
KEEP = Keep(journal=60, response=900)
END = Entry(0, 3, b"[]")


async def rows(desk: Desk) -> dict[str, int]:
    return {table: await desk.count(table) for table in NOTHING}


async def sweep(desk: Desk, delete: Callable[..., Awaitable[int]], *given: Any) -> int:
    """One small transaction of a sweep: how many it deleted."""
    async with desk.database.transaction() as connection:
        return await delete(connection, *given)


async def sweep_all(desk: Desk, delete: Callable[..., Awaitable[int]], *given: Any) -> int:
    total = 0
    while more := await sweep(desk, delete, *given):
        total += more
    return total


async def living(desk: Desk, ids: Iterable[str]) -> list[str]:
    """Which of these responses there are, in their order."""
    wanted = list(ids)
    async with desk.database.reading() as connection:
        found = {row.id for row in await load(connection, wanted)}
    return [id for id in wanted if id in found]


# Deleting by a client.


async def test_another_tenants_response_cannot_be_deleted_and_is_as_unknown_as_any(desk: Desk) -> None:
    mine = await desk.turn(desk.chain("me"), "a", "1")
    running = await desk.begin(desk.chain("me"))
    for id in (mine, running, "resp_unknown"):
        assert await desk.delete(id, "you") is False
    assert await desk.lineage(mine, "me") == ["a", "1"]


async def test_a_deleted_response_is_gone_with_its_items_and_its_journal(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement)
    await desk.journal(response_id, 0)
    await desk.end(response_id, placement, ["a"], ["1"], lingers=True, journal=Entry(1, 1, b"[]"))
    assert await rows(desk) == {"responses": 1, "branches": 1, "items": 2, "journal": 2}
    assert await desk.delete(response_id) is True
    assert await desk.find(response_id) is None
    assert await rows(desk) == NOTHING
    assert await desk.delete(response_id) is False


async def test_a_deletion_that_is_rolled_back_never_was(desk: Desk) -> None:
    response_id = await desk.turn(desk.chain(), "a", "1")
    with pytest.raises(ZeroDivisionError):
        async with desk.database.transaction() as connection:
            assert await delete_response(connection, "", response_id, desk.clock())
            assert await find_response(connection, "", response_id, desk.clock()) is None
            raise ZeroDivisionError
    assert await desk.lineage(response_id) == ["a", "1"]


@pytest.mark.parametrize("status", ["queued", "in_progress"])
async def test_a_running_response_cannot_be_deleted(desk: Desk, status: str) -> None:
    running = await desk.begin(desk.chain(), status=status)
    await desk.database.submit(append_journal(running, desk.owner, "", Entry(0, 1, b"[]")))
    with pytest.raises(InvalidRequest) as caught:
        await desk.delete(running)
    assert (caught.value.status, caught.value.message) == (400, "Cannot delete an in-flight response.")
    assert (await desk.row(running)).running
    async with desk.database.reading() as connection:
        assert await read_journal(connection, running) == [Entry(0, 1, b"[]")]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_failed_response_can_be_deleted_and_the_session_stays(desk: Desk, status: str) -> None:
    await desk.turn(await desk.session(), "a", "1")
    failed = await desk.turn(await desk.session(), "b", "half", status=status)
    assert await desk.delete(failed)
    assert await desk.find(failed) is None
    assert await desk.history() == ["a", "1"]


async def test_a_descendant_keeps_its_history(desk: Desk) -> None:
    first = await desk.turn(desk.chain(), "a", "1")
    second = await desk.turn(await desk.after(first), "b", "2")
    third = await desk.turn(await desk.after(second), "c", "3")
    assert await desk.delete(first)
    assert await desk.delete(second)
    assert await desk.lineage(third) == ["a", "1", "b", "2", "c", "3"]


async def test_a_child_on_a_branch_of_its_own_keeps_its_history(desk: Desk) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    kept = await desk.turn(await desk.after(root), "b", "2")
    forked = await desk.turn(await desk.after(root), "c", "3")
    assert await desk.delete(kept)
    assert await desk.lineage(forked) == ["a", "1", "c", "3"]
    assert (await rows(desk))["items"] == 4  # b and 2 are gone: the fork begins before them
    assert await desk.delete(root)
    assert await desk.lineage(forked) == ["a", "1", "c", "3"]


async def test_a_chain_goes_on_after_its_last_response_was_deleted(desk: Desk) -> None:
    first = await desk.turn(desk.chain(), "a", "1")
    last = await desk.turn(await desk.after(first), "b", "2")
    assert await desk.delete(last)
    again = await desk.turn(await desk.after(first), "c", "3")
    assert await desk.lineage(again) == ["a", "1", "c", "3"]
    assert await desk.lineage(first) == ["a", "1"]


async def test_what_a_running_child_builds_on_stays(desk: Desk) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    place = await desk.after(root)
    child = await desk.begin(place, previous_response_id=root)
    assert await desk.delete(root)
    await desk.end(child, place, ["b"], ["2"])
    assert await desk.lineage(child) == ["a", "1", "b", "2"]


async def test_what_a_running_child_in_another_thread_builds_on_stays(desk: Desk) -> None:
    await desk.turn(await desk.session(), "x", "X")
    root = await desk.turn(desk.chain(), "a", "1")
    row = await desk.row(root)
    place = replace(await desk.session(), branch_id=row.branch_id or "", position=2, first=2)
    child = await desk.begin(place, previous_response_id=root)
    assert await desk.delete(root)
    await desk.end(child, place, ["b"], ["2"])
    assert await desk.history() == ["a", "1", "b", "2"]


async def test_a_session_keeps_its_history_when_its_responses_are_deleted(desk: Desk) -> None:
    """As long as there is the thread, its active branch is needed to its end."""
    ids = [await desk.turn(await desk.session(), text, text.upper()) for text in "ab"]
    for id in reversed(ids):
        assert await desk.delete(id)
    assert await desk.history() == ["a", "A", "b", "B"]
    await desk.turn(await desk.session(), "c", "C")
    assert await desk.history() == ["a", "A", "b", "B", "c", "C"]


async def test_a_middle_turn_of_a_session_leaves_its_items(desk: Desk) -> None:
    first = await desk.turn(await desk.session(), "a", "1")
    await desk.turn(await desk.session(), "b", "2", store=False)
    assert await desk.delete(first)
    assert await desk.history() == ["a", "1", "b", "2"]


async def test_two_that_delete_the_same_response_agree_that_it_is_gone(desk: Desk, other_desk: Desk) -> None:
    response_id = await desk.turn(desk.chain(), "a", "1")
    results = await asyncio.gather(desk.delete(response_id), other_desk.delete(response_id))
    assert True in results
    assert await rows(desk) == NOTHING


# By time.


async def test_what_has_expired_is_deleted_and_what_runs_is_not(desk: Desk) -> None:
    short = await desk.turn(desk.chain("me"), "a", "1", keep=KEEP)
    failed = await desk.turn(desk.chain("you"), "b", "half", status="failed", keep=KEEP)
    long = await desk.turn(desk.chain(), "c", "3", keep=Keep(response=1000))
    running = await desk.begin(desk.chain())
    waiting = await desk.wait()
    ids = [short, failed, long, running, waiting]
    desk.clock.now += 899
    assert await sweep(desk, delete_expired, desk.clock()) == 0
    desk.clock.now += 1
    assert await sweep(desk, delete_expired, desk.clock()) == 2
    assert await living(desk, ids) == [long, running, waiting]
    desk.clock.now += 10**9
    assert await sweep(desk, delete_expired, desk.clock()) == 1
    assert await living(desk, ids) == [running, waiting]
    assert await desk.count("items") == 0


async def test_what_is_used_again_lives_longer(desk: Desk) -> None:
    response_id = await desk.turn(desk.chain(), "a", "1", keep=KEEP)
    desk.clock.now += 800
    await desk.database.submit(use(response_id, KEEP))
    desk.clock.now += 800
    assert await sweep(desk, delete_expired, desk.clock()) == 0
    desk.clock.now += 100
    assert await sweep(desk, delete_expired, desk.clock()) == 1


async def test_what_is_not_stored_goes_with_its_journal(desk: Desk) -> None:
    place = await desk.session()
    response_id = await desk.begin(place, store=False, background=True)
    await desk.end(response_id, place, ["a"], ["1"], store=False, lingers=True, journal=END, keep=KEEP)
    desk.clock.now += 60
    assert await sweep(desk, delete_expired, desk.clock()) == 1
    assert await rows(desk) == {"responses": 0, "branches": 1, "items": 2, "journal": 0}
    assert await desk.history() == ["a", "1"]


async def test_a_crowd_is_deleted_a_part_at_a_time(desk: Desk) -> None:
    await asyncio.gather(*(desk.turn(desk.chain(), "a", "1", keep=KEEP) for _ in range(MOST + 30)))
    desk.clock.now += 900
    assert [await sweep(desk, delete_expired, desk.clock()) for _ in range(3)] == [MOST, 30, 0]
    assert await rows(desk) == NOTHING


async def test_what_cannot_be_deleted_yet_is_in_nobodys_way(desk: Desk) -> None:
    awaited = await asyncio.gather(*(desk.turn(desk.chain(), "a", "1", keep=KEEP) for _ in range(MOST)))
    await asyncio.gather(*(desk.wait(previous_response_id=parent, most=MOST) for parent in awaited))
    desk.clock.now += 1
    later = await desk.turn(desk.chain(), "b", "2", keep=KEEP)
    desk.clock.now += 900
    assert await sweep(desk, delete_expired, desk.clock()) == 1
    assert await sweep(desk, delete_expired, desk.clock()) == 0
    assert await living(desk, [*awaited, later]) == awaited


async def test_long_histories_are_deleted_a_few_at_a_time(desk: Desk) -> None:
    for _ in range(3):
        place = desk.chain()
        await desk.end(await desk.begin(place), place, ["a"] * 1500, ["1"], keep=KEEP)
    desk.clock.now += 900
    assert [await sweep(desk, delete_expired, desk.clock()) for _ in range(4)] == [1, 1, 1, 0]
    assert await rows(desk) == NOTHING


async def test_many_take_as_many_statements_as_one(desk: Desk) -> None:
    counts = []
    for many in (1, 30):
        await asyncio.gather(*(desk.turn(desk.chain(), "a", "1", keep=KEEP) for _ in range(many)))
        desk.clock.now += 900
        async with desk.database.transaction() as connection:
            seen = statements(connection)
            assert await delete_expired(connection, desk.clock()) == many
        counts.append(len(seen))
    assert counts[0] == counts[1]


# By number.


async def test_of_a_tenants_responses_those_unused_for_longest_go_first(desk: Desk) -> None:
    ids = []
    for _ in range(5):
        ids.append(await desk.turn(desk.chain("me"), "a", "1", keep=KEEP))
        desk.clock.now += 1
    others = [await desk.turn(desk.chain("you"), "b", "2", keep=KEEP) for _ in range(3)]
    await desk.database.submit(use(ids[0], KEEP))
    assert await sweep_all(desk, delete_beyond, 3) == 2
    assert await living(desk, [*ids, *others]) == [ids[0], ids[3], ids[4], *others]
    assert await sweep_all(desk, delete_beyond, 3) == 0


async def test_what_runs_and_what_is_not_stored_is_not_counted(desk: Desk) -> None:
    ids = [await desk.begin(desk.chain()), await desk.wait()]
    place = await desk.session()
    ids.append(await desk.begin(place, store=False))
    await desk.end(ids[2], place, ["a"], ["1"], store=False, lingers=True, journal=END)
    ids.append(await desk.turn(desk.chain(), "b", "2"))
    assert await sweep_all(desk, delete_beyond, 1) == 0
    assert await living(desk, ids) == ids


async def test_a_crowd_beyond_the_number_is_deleted_a_part_at_a_time(desk: Desk) -> None:
    await asyncio.gather(*(desk.turn(desk.chain(), "a", "1") for _ in range(MOST + 30)))
    assert [await sweep(desk, delete_beyond, 10) for _ in range(3)] == [MOST, 20, 0]
    assert await rows(desk) == {"responses": 10, "branches": 10, "items": 20, "journal": 0}


# Journals.


async def test_long_journals_are_dropped_a_few_at_a_time(desk: Desk) -> None:
    for _ in range(3):
        place = desk.chain()
        response_id = await desk.begin(place)
        await asyncio.gather(*(desk.journal(response_id, number) for number in range(1500)))
        await desk.end(response_id, place, ["a"], ["1"], lingers=True, journal=Entry(1500, 1, b"[]"), keep=KEEP)
    desk.clock.now += 60
    assert [await sweep(desk, drop_journals, desk.clock()) for _ in range(4)] == [1, 1, 1, 0]
    assert await desk.count("journal") == 0


async def test_a_journal_is_dropped_when_nobody_comes_back_for_it_any_more(desk: Desk) -> None:
    ids = []
    for number in range(3):
        place = desk.chain()
        ids.append(await desk.begin(place, retry=Retry(b"%16d" % number, b"body")))
        await desk.journal(ids[-1], 0)
        keep = Keep(journal=60 * (number + 1))
        await desk.end(ids[-1], place, ["a"], ["1"], lingers=True, journal=Entry(1, 1, b"[]"), keep=keep)
    running = await desk.begin(desk.chain())
    await desk.journal(running, 0)
    desk.clock.now += 120
    assert await sweep(desk, drop_journals, desk.clock()) == 2
    assert await sweep(desk, drop_journals, desk.clock()) == 0
    async with desk.database.reading() as connection:
        assert [len(await read_journal(connection, id)) for id in [*ids, running]] == [0, 0, 2, 1]
        query = select(responses.c.retry_key, responses.c.retry_body).where(responses.c.journal_until.is_(None))
        assert {tuple(row) for row in await connection.execute(query)} == {(None, None)}
    assert await living(desk, ids) == ids
    assert await desk.lineage(ids[0]) == ["a", "1"]


# Threads.


async def idle(desk: Desk, seconds: float) -> int:
    return await sweep(desk, delete_idle_threads, desk.clock() - seconds)


async def test_a_thread_that_nobody_used_for_long_goes_with_all_its_items(desk: Desk) -> None:
    await desk.turn(await desk.session("old"), "a", "1", store=False)
    await desk.turn(replace(await desk.session("old"), position=0, first=0), "rewritten", "2", store=False)
    desk.clock.now += 100
    await desk.turn(await desk.session("new"), "b", "3", store=False)
    assert await idle(desk, 100) == 0
    desk.clock.now += 1
    assert await idle(desk, 100) == 1
    assert await desk.thread("old") is None
    assert await desk.history("new") == ["b", "3"]
    assert (await desk.count("branches"), await desk.count("items")) == (1, 2)
    assert await desk.turn(await desk.session("old"), "again", "4")


async def test_a_response_of_a_thread_that_is_gone_keeps_its_history(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1", store=False)
    kept = await desk.turn(await desk.session(), "b", "2")
    await desk.turn(await desk.session(), "c", "3", store=False)
    desk.clock.now += 100
    assert await idle(desk, 50) == 1
    assert await desk.lineage(kept) == ["a", "1", "b", "2"]
    assert await desk.count("items") == 4
    assert await desk.delete(kept)
    assert await rows(desk) == NOTHING


async def test_a_thread_copied_from_one_that_is_gone_keeps_its_history(desk: Desk) -> None:
    for text in "ab":
        await desk.turn(await desk.session("parent"), text, text.upper(), store=False)
    parent = await desk.thread("parent")
    assert parent is not None
    place = replace(await desk.session("child"), branch_id=parent.active_branch, position=2)
    desk.clock.now += 100
    child = await desk.begin(place, store=False)
    assert await idle(desk, 50) == 1
    assert await desk.count("items") == 2  # what the child runs on
    await desk.end(child, place, ["c"], ["C"], store=False)
    assert await desk.history("child") == ["a", "A", "c", "C"]
    desk.clock.now += 100
    assert await idle(desk, 50) == 1
    assert await rows(desk) == NOTHING


async def test_a_thread_whose_turn_runs_is_not_idle(desk: Desk) -> None:
    """Nor while whoever ran it is gone, and nobody has seen to it yet."""
    place = await desk.session()
    running = await desk.begin(place)
    desk.clock.now += LEASE + 1
    assert await idle(desk, 10) == 0
    await desk.end(running, place, ["a"], ["half"], status="failed")
    desk.clock.now += 11
    assert await idle(desk, 10) == 1
    assert await desk.delete(running)
    assert await rows(desk) == NOTHING


async def test_a_thread_of_any_number_of_branches_is_deleted(desk: Desk) -> None:
    """Also of more than PostgreSQL takes parameters."""
    place = await desk.session()
    await desk.turn(place, "a", "1", store=False)
    async with desk.database.transaction() as connection:
        root = {"tenant": "", "thread_id": place.thread_id, "parent_branch": None, "parent_position": 0, "head": 0}
        await connection.execute(insert(branches), [{"id": f"branch {number}", **root} for number in range(33_000)])
    desk.clock.now += 100
    assert await idle(desk, 50) == 1
    assert await rows(desk) == NOTHING


async def test_a_crowd_of_idle_threads_is_deleted_a_part_at_a_time(desk: Desk) -> None:
    places = [await desk.session(str(number)) for number in range(MOST + 5)]
    await asyncio.gather(*(desk.turn(place, "a", "1", store=False) for place in places))
    desk.clock.now += 100
    assert [await idle(desk, 50) for _ in range(3)] == [MOST, 5, 0]
    assert await rows(desk) == NOTHING


# What is collected: exactly what nothing needs.


async def chain(desk: Desk, length: int) -> list[str]:
    ids = [await desk.turn(desk.chain(), "0", "0")]
    for number in range(1, length):
        ids.append(await desk.turn(await desk.after(ids[-1]), str(number), str(number)))
    return ids


@pytest.mark.parametrize("order", ["front to back", "back to front", "middle first"])
async def test_a_chain_that_is_deleted_leaves_nothing(desk: Desk, order: str) -> None:
    ids = await chain(desk, 5)
    orders = {"front to back": ids, "back to front": ids[::-1], "middle first": [ids[n] for n in (2, 0, 4, 1, 3)]}
    for id in orders[order]:
        assert await desk.delete(id)
    assert await rows(desk) == NOTHING


async def test_a_chain_is_kept_as_far_as_anything_needs_it(desk: Desk) -> None:
    ids = await chain(desk, 4)
    for id, left in ((ids[0], 8), (ids[3], 6), (ids[1], 6), (ids[2], 0)):
        await desk.delete(id)
        assert await desk.count("items") == left


async def test_a_fork_keeps_what_is_before_it_and_no_more(desk: Desk) -> None:
    ids = await chain(desk, 3)
    fork = await desk.turn(await desk.after(ids[0]), "fork", "FORK")
    for id in (ids[1], ids[2], ids[0]):
        await desk.delete(id)
    assert await desk.lineage(fork) == ["0", "0", "fork", "FORK"]
    assert (await desk.count("items"), await desk.count("branches")) == (4, 2)
    await desk.delete(fork)
    assert await rows(desk) == NOTHING


async def test_a_fork_of_a_fork_that_is_gone_keeps_the_way_to_what_it_needs(desk: Desk) -> None:
    """A session is rewritten below the place where its branch began: the branch between is only a way then."""
    first = await desk.turn(await desk.session(), "a", "A")
    second = await desk.turn(await desk.session(), "b", "B")
    third = await desk.turn(replace(await desk.session(), position=3), "c", "C")  # after b
    fourth = await desk.turn(replace(await desk.session(), position=1), "d", "D")  # after a
    assert await desk.lineage(third) == ["a", "A", "b", "c", "C"]
    for id in (third, second, first):
        await desk.delete(id)
    assert await desk.history() == await desk.lineage(fourth) == ["a", "d", "D"]
    assert await desk.count("items") == 3
    await desk.turn(replace(await desk.session(), position=0), "e", "E")
    assert await desk.history() == ["e", "E"]
    await desk.delete(fourth)
    assert await desk.count("items") == 2


async def test_a_session_rewritten_at_its_end_keeps_only_the_branches_that_hold_something(desk: Desk) -> None:
    """Each fork here grows out of the one before it, and begins where that one does."""
    first = await desk.turn(await desk.session(), "a", "A")
    old = [await desk.turn(replace(await desk.session(), position=2), f"{n}", f"{n}!") for n in range(50)]
    kept, last = old.pop(20), old.pop()
    for id in (first, *old):
        assert await desk.delete(id)
    assert await desk.lineage(kept) == ["a", "A", "20", "20!"]
    assert await desk.history() == await desk.lineage(last) == ["a", "A", "49", "49!"]
    assert (await desk.count("branches"), await desk.count("items")) == (3, 6)
    desk.clock.now += 100
    assert await idle(desk, 50) == 1
    for id in (kept, last):
        assert await desk.delete(id)
    assert await rows(desk) == NOTHING


async def test_a_long_line_takes_as_many_statements_as_a_short_one(desk: Desk) -> None:
    counts = []
    for length in (2, 30):
        ids = [await desk.turn(await desk.session(str(length)), "a", "A", keep=KEEP)]
        for number in range(length):
            place = replace(await desk.session(str(length)), position=number + 1)
            ids.append(await desk.turn(place, "b", "B", keep=KEEP))
        async with desk.database.transaction() as connection:
            seen = statements(connection)
            assert await delete_response(connection, "", ids[-1], desk.clock())
        counts.append(len(seen))
    assert counts[0] == counts[1]


async def rewritten(desk: Desk, position: int) -> Placement:
    """The place of a session's next turn, whose client goes on from before its end."""
    place = await desk.session()
    async with desk.database.reading() as connection:
        holder = await find_holder(connection, place.branch_id, position)
    return replace(place, position=position, first=0, holder=holder)


async def test_what_a_running_turn_will_grow_out_of_stays(desk: Desk) -> None:
    ids = [await desk.turn(await desk.session(), "a", "A")]
    for position in (1, 2):
        ids.append(await desk.turn(await rewritten(desk, position), f"{position}", f"{position}!"))
    place = await rewritten(desk, 1)
    running = await desk.begin(place)
    for id in ids:
        assert await desk.delete(id)
    await desk.end(running, place, ["b"], ["B"])
    assert await desk.history() == await desk.lineage(running) == ["a", "b", "B"]
    assert await desk.count("branches") == 4  # also the two that it came by
    assert await desk.delete(running)
    assert (await desk.count("branches"), await desk.count("items")) == (2, 3)


async def test_a_way_that_a_running_turn_came_by_leads_on_to_what_begins_above_it(desk: Desk) -> None:
    """A turn that lost its lease runs on from before the place where the other fork begins."""
    first = await desk.turn(await desk.session(), "a", "A")
    second = await desk.turn(await desk.session(), "b", "B")
    third = await desk.turn(replace(await desk.session(), position=3), "c", "C")
    place = replace(await desk.session(), position=1)
    late = await desk.begin(place)
    desk.clock.now += LEASE + 1
    fourth = await desk.turn(replace(await desk.session(), position=2), "d", "D")
    for id in (third, second, first):
        assert await desk.delete(id)
    assert await desk.history() == await desk.lineage(fourth) == ["a", "A", "d", "D"]
    await desk.end(late, place, ["e"], ["E"])
    assert await desk.lineage(late) == ["a", "e", "E"]


async def test_what_begins_anew_needs_nothing_of_what_was(desk: Desk) -> None:
    first = await desk.turn(await desk.session(), "a", "A")
    await desk.turn(replace(await desk.session(), position=0), "b", "B")
    assert await desk.delete(first)
    assert await desk.history() == ["b", "B"]
    assert (await desk.count("branches"), await desk.count("items")) == (1, 2)


async def test_a_running_turn_keeps_what_it_builds_on_and_no_more(desk: Desk) -> None:
    ids = await chain(desk, 3)
    place = await desk.after(ids[0])
    child = await desk.begin(place, previous_response_id=ids[0])
    for id in ids:
        await desk.delete(id)
    assert await desk.count("items") == 2
    await desk.end(child, place, ["c"], ["C"])
    assert await desk.lineage(child) == ["0", "0", "c", "C"]
    await desk.delete(child)
    assert await rows(desk) == NOTHING


async def test_a_turn_that_was_handed_over_keeps_what_it_builds_on(desk: Desk) -> None:
    [root] = await chain(desk, 1)
    child = await desk.begin(await desk.after(root), previous_response_id=root)
    await desk.database.submit(hand_over(child, desk.owner, "", resumable=False, said=False))
    await desk.delete(root)
    assert await desk.count("items") == 2


async def test_what_a_turn_that_failed_was_built_on_goes_with_it(desk: Desk) -> None:
    [root] = await chain(desk, 1)
    place = await desk.after(root)
    child = await desk.begin(place, previous_response_id=root)
    await desk.delete(root)
    await desk.end(child, place, ["c"], ["half"], status="failed")
    await desk.delete(child)
    assert await rows(desk) == NOTHING


async def test_what_repeats_stays_as_long_as_anybody_has_it(desk: Desk) -> None:
    preamble = (b"digest", b'{"instructions":"long"}')
    ids = []
    for tenant in ("me", "me", "you"):
        place = desk.chain(tenant)
        ids.append(await desk.begin(place, preamble=preamble))
        await desk.end(ids[-1], place, ["a"], ["1"])
    assert await desk.count("preambles") == 2
    await desk.delete(ids[0], "me")
    assert (await desk.row(ids[1], "me")).preamble == preamble[1]
    await desk.delete(ids[1], "me")
    assert await desk.count("preambles") == 1
    assert (await desk.row(ids[2], "you")).preamble == preamble[1]
    assert (await desk.row(await desk.begin(desk.chain("me"), preamble=preamble), "me")).preamble == preamble[1]
