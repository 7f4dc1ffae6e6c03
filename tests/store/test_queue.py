"""Between workers: who waits, who may claim what, what is given back, and what is asked of an owner."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from responses_ingress.core.request import Retry
from responses_ingress.errors import (
    AlreadyBegun,
    KeyReused,
    NotHandedOver,
    QueueFull,
    StaleWriter,
)
from responses_ingress.ids import named_thread
from responses_ingress.store.queue import (
    ask_to_yield,
    asked_of,
    cancel,
    claim_queued,
    followed_until,
    hand_over,
    is_any_due,
    nowhere,
    put_back,
    renew_leases,
    sign,
)
from responses_ingress.store.responses import StoredResponse, read_journal
from responses_ingress.store.tables import responses
from responses_ingress.store.turns import begin_claimed
from responses_ingress.store.values import Ending, Entry, Keep, Owner
from responses_ingress.store.wake import ASKED, QUEUE
from tests.store.desk import LEASE, NOW, Desk, at_desk

ROOT = Path(__file__).parents[2]
CANCELLED = Ending("cancelled", [], [], journal=Entry(0, 3, b'["cancelled"]'), keep=Keep(60, 900))


async def is_due(desk: Desk) -> bool:
    async with desk.database.reading() as connection:
        return await is_any_due(connection, desk.clock())


async def claimed(desk: Desk, most: int = 10) -> list[str]:
    return [row.id for row in await desk.claim(most)]


async def left(desk: Desk) -> list[str]:
    return [row.id for row in await desk.claim_left()]


async def asked(desk: Desk) -> dict[str, str]:
    async with desk.database.reading() as connection:
        return dict(await asked_of(connection, desk.owner.name))


async def lease_of(desk: Desk, response_id: str) -> float | None:
    async with desk.database.reading() as connection:
        query = select(responses.c.lease_until).where(responses.c.id == response_id)
        lease: float | None = (await connection.execute(query)).scalar_one()
    return lease


async def begin_waiting(desk: Desk, row: StoredResponse, key: str | None = None) -> None:
    """Let what was claimed begin, in the session `key` or alone."""
    place = await desk.session(key, row.tenant) if key else desk.chain(row.tenant)
    await desk.database.submit(begin_claimed(row, None, place, desk.as_owner(row), b"[]"))


# Waiting.


async def test_what_waits_has_no_owner_and_is_anybodys(desk: Desk, other_desk: Desk) -> None:
    assert not await is_due(desk)
    with desk.database.bell.listen(QUEUE) as ear:
        waiting = await desk.wait(model="gpt")
        assert await ear.heard(0)
    row = await desk.row(waiting)
    assert (row.status, row.owner, row.epoch, row.base, row.model) == ("queued", None, 0, None, "gpt")
    assert await is_due(other_desk)
    assert await left(other_desk) == []
    assert await claimed(other_desk) == [waiting]
    assert not await is_due(desk)


async def test_over_the_limit_nothing_is_left_behind(desk: Desk, other_desk: Desk) -> None:
    for _ in range(2):
        await desk.wait(most=2)
    for worker in (desk, other_desk):
        with pytest.raises(QueueFull) as caught:
            await worker.wait(most=2, preamble=(b"digest", b"{}"))
        assert (caught.value.status, bool(caught.value.retry_after)) == (429, True)
    assert (await desk.count("responses"), await desk.count("preambles")) == (2, 0)


async def test_of_many_that_come_together_as_many_wait_as_may(desk: Desk) -> None:
    found = await asyncio.gather(*(desk.wait(most=3) for _ in range(8)), return_exceptions=True)
    assert [type(one) for one in found] == [str] * 3 + [QueueFull] * 5
    assert await desk.count("responses") == 3


async def test_who_runs_or_has_ended_does_not_wait(desk: Desk) -> None:
    await desk.begin(desk.chain())
    await desk.turn(desk.chain(), "a", "1")
    waiting = await desk.wait(most=1)
    [row] = await desk.claim()
    with pytest.raises(QueueFull):  # claimed, but it has not begun
        await desk.wait(most=1)
    await begin_waiting(desk, row)
    assert await desk.wait(most=1) != waiting


async def test_a_request_that_waits_already_is_not_queued_again(desk: Desk, other_desk: Desk) -> None:
    retry = Retry(b"n" * 16, b"body", attaches=True)
    waiting = await desk.wait(retry=retry)
    for worker in (desk, other_desk):
        with pytest.raises(AlreadyBegun) as caught:
            await worker.wait(retry=retry)
        assert caught.value.response_id == waiting
        with pytest.raises(KeyReused):
            await worker.wait(retry=replace(retry, body=b"another"))
    assert await desk.count("responses") == 1


async def test_of_two_workers_given_the_same_request_one_queues_it(desk: Desk, other_desk: Desk) -> None:
    for number in range(10):
        retry = Retry(b"%16d" % number, attaches=True)
        found = await asyncio.gather(
            *(worker.wait(retry=retry) for worker in (desk, other_desk)), return_exceptions=True
        )
        [id] = [one for one in found if isinstance(one, str)]
        [known] = [one for one in found if isinstance(one, AlreadyBegun)]
        assert known.response_id == id


# Claiming what waits.


async def test_who_came_first_is_first(desk: Desk) -> None:
    ids = []
    for _ in range(5):
        ids.append(await desk.wait())
        desk.clock.now += 0.01
    parts = [set(await claimed(desk, 2)) for _ in range(4)]
    assert parts == [set(ids[:2]), set(ids[2:4]), set(ids[4:]), set()]


async def test_a_claim_makes_it_this_workers_and_raises_its_epoch(desk: Desk, other_desk: Desk) -> None:
    waiting = await desk.wait()
    for turn, worker in enumerate((desk, other_desk, desk), 1):
        [row] = await worker.claim()
        assert (row.id, row.owner, row.epoch, row.status) == (waiting, worker.owner.name, turn, "queued")
        assert await lease_of(desk, waiting) == desk.clock() + LEASE
        desk.clock.now += LEASE - 1
        assert await claimed(desk) == await claimed(other_desk) == []
        desk.clock.now += 1  # whoever had claimed it is gone


async def test_a_child_waits_for_its_parent(desk: Desk) -> None:
    place = desk.chain()
    parent = await desk.begin(place)
    child = await desk.wait(place.thread_id, previous_response_id=parent)
    assert not await is_due(desk)
    assert await claimed(desk) == []
    await desk.end(parent, place, ["a"], ["1"])
    assert await is_due(desk)
    assert await claimed(desk) == [child]


async def test_a_child_waits_for_a_parent_that_waits(desk: Desk) -> None:
    parent = await desk.wait()
    child = await desk.wait(previous_response_id=parent)
    assert await claimed(desk) == [parent]
    assert await claimed(desk) == []
    desk.clock.now += LEASE
    [row] = await desk.claim()
    assert row.id == parent
    await desk.database.submit(put_back(row, desk.as_owner(row), 10))
    await desk.database.submit(cancel(row, CANCELLED))
    assert await claimed(desk) == [child]


async def test_a_child_of_what_is_gone_is_claimed_so_that_it_can_be_told(desk: Desk) -> None:
    child = await desk.wait(previous_response_id="resp_gone")
    assert await claimed(desk) == [child]


async def test_children_of_one_parent_do_not_wait_for_each_other(desk: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1")
    thread = (await desk.row(parent)).thread_id
    children = {await desk.wait(thread, previous_response_id=parent) for _ in range(3)}
    assert set(await claimed(desk)) == children


async def test_a_turn_waits_while_another_has_its_thread(desk: Desk) -> None:
    place = await desk.session()
    running = await desk.begin(place)
    waiting = await desk.wait(place.thread_id)
    elsewhere = await desk.wait(named_thread("", "another"))
    assert await claimed(desk) == [elsewhere]
    assert not await is_due(desk)
    await desk.end(running, place, ["a"], ["1"])
    assert await is_due(desk)
    assert await claimed(desk) == [waiting]


async def test_a_turn_does_not_wait_for_one_whose_lease_ran_out(desk: Desk) -> None:
    place = await desk.session()
    await desk.begin(place)
    waiting = await desk.wait(place.thread_id)
    desk.clock.now += LEASE
    assert await claimed(desk) == [waiting]


async def test_of_turns_that_wait_for_one_thread_only_the_first_is_claimed(desk: Desk, other_desk: Desk) -> None:
    """The others could not begin, and would be claimed again and again."""
    thread = named_thread("", "s")
    waiting = {await desk.wait(thread) for _ in range(3)}
    [row] = await desk.claim()
    assert await claimed(other_desk) == []
    await begin_waiting(desk, row, "s")
    assert await claimed(other_desk) == []
    place = await desk.session()
    await desk.end(row.id, place, ["a"], ["1"], owner=desk.as_owner(row))
    [after] = await claimed(other_desk)
    assert {row.id, after} < waiting


async def test_turns_that_wait_for_a_thread_begin_in_the_order_they_came(desk: Desk) -> None:
    thread = named_thread("", "s")
    order = []
    for _ in range(4):
        order.append(await desk.wait(thread))
        desk.clock.now += 0.25
    for id in order:
        [row] = await desk.claim()
        assert row.id == id
        await begin_waiting(desk, row, "s")
        await desk.end(id, await desk.session(), ["a"], ["1"], owner=desk.as_owner(row))
    assert {(await desk.row(id)).epoch for id in order} == {1}


async def test_a_turn_whose_worker_is_gone_keeps_its_place_in_line(desk: Desk) -> None:
    thread = named_thread("", "s")
    first = await desk.wait(thread)
    desk.clock.now += 1
    second = await desk.wait(thread)
    assert await claimed(desk) == [first]
    desk.clock.now += LEASE
    assert await claimed(desk) == [first]
    desk.clock.now += LEASE
    [row] = await desk.claim()
    await desk.database.submit(put_back(row, desk.as_owner(row), 0))
    assert await claimed(desk) == [first] != [second]


async def test_two_workers_never_claim_the_same(desk: Desk, other_desk: Desk) -> None:
    ids = set(await asyncio.gather(*(desk.wait() for _ in range(40))))

    async def claim_all(worker: Desk) -> list[str]:
        found: list[str] = []
        while more := await claimed(worker, 3):
            found += more
        return found

    found = await asyncio.gather(claim_all(desk), claim_all(other_desk), claim_all(desk))
    everything = [id for one in found for id in one]
    assert sorted(everything) == sorted(ids)


async def test_a_worker_passes_by_what_another_is_just_claiming(postgres_database: str) -> None:
    async with at_desk(postgres_database) as desk, at_desk(postgres_database, desk.clock, seed=1) as other:
        ids = {await desk.wait() for _ in range(4)}
        async with desk.database.transaction() as connection:
            first = await claim_queued(connection, desk.owner, NOW, 2)
            async with asyncio.timeout(10):
                second = await other.claim()
        assert {row.id for row in first} | {row.id for row in second} == ids
        assert len(first) == len(second) == 2


async def claim_and_tell(url: str, seed: int) -> None:
    """As a process of its own: claim all there is, and print it."""
    async with at_desk(url, seed=seed) as desk:
        while rows := await desk.claim(3):
            print(*(row.id for row in rows), sep="\n")


async def test_two_processes_never_claim_the_same(desk: Desk, each_database: str) -> None:
    ids = await asyncio.gather(*(desk.wait() for _ in range(60)))
    code = "import asyncio, sys; from tests.store.test_queue import claim_and_tell"
    code += "; asyncio.run(claim_and_tell(sys.argv[1], int(sys.argv[2])))"
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, each_database, str(seed), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        for seed in (1, 2)
    ]
    told = [(await process.communicate())[0].decode().split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(told[0] + told[1]) == sorted(ids)


# Claiming what was left behind.


async def test_what_was_left_behind_is_anybodys_once_its_lease_has_run_out(desk: Desk, other_desk: Desk) -> None:
    stored = await desk.begin(desk.chain("me"))
    unstored = await desk.begin(await desk.session("s", "you"), store=False)
    await desk.turn(desk.chain(), "a", "1")
    desk.clock.now += LEASE - 1
    assert not await is_due(other_desk)
    assert await left(other_desk) == []
    desk.clock.now += 1
    assert await is_due(other_desk)
    assert await claimed(other_desk) == []  # they wait for nothing
    rows = await other_desk.claim_left()
    assert {(row.id, row.tenant, row.store, row.owner, row.epoch) for row in rows} == {
        (stored, "me", True, other_desk.owner.name, 2),
        (unstored, "you", False, other_desk.owner.name, 2),
    }
    assert await left(desk) == []
    assert not await is_due(desk)


async def test_of_two_workers_that_claim_one_has_it(desk: Desk, other_desk: Desk) -> None:
    for _ in range(10):
        response_id = await desk.begin(desk.chain())
        desk.clock.now += LEASE
        found = await asyncio.gather(left(desk), left(other_desk), left(desk))
        assert sorted(found) == [[], [], [response_id]]
        row = await desk.row(response_id)
        assert row.epoch == 2
        await desk.end(response_id, nowhere(row), [], [], status="failed", owner=Owner("", 2, LEASE))


async def test_a_crowd_that_was_left_behind_is_claimed_a_part_at_a_time(desk: Desk, other_desk: Desk) -> None:
    await asyncio.gather(*(desk.begin(desk.chain()) for _ in range(130)))
    desk.clock.now += LEASE
    parts = [len(await left(other_desk)) for _ in range(3)]
    assert parts == [100, 30, 0]


# Giving back.


async def test_what_cannot_begin_yet_is_put_back_for_a_while(desk: Desk, other_desk: Desk) -> None:
    waiting = await desk.wait()
    [row] = await desk.claim()
    await desk.database.submit(put_back(row, desk.as_owner(row), 2.0))
    assert (await desk.row(waiting)).owner is None
    desk.clock.now += 1
    assert await claimed(other_desk) == []
    desk.clock.now += 1
    [again] = await other_desk.claim()
    assert (again.id, again.epoch) == (waiting, 2)
    with pytest.raises(StaleWriter):
        await desk.database.submit(put_back(row, desk.as_owner(row), 2.0))


async def test_what_had_begun_and_is_put_back_has_said_nothing_and_frees_its_thread(desk: Desk) -> None:
    response_id = await desk.begin(await desk.session(), background=True, request=b"{}")
    await desk.journal(response_id, 0)
    desk.clock.now += LEASE
    [row] = await desk.claim_left()
    await desk.database.submit(put_back(row, desk.as_owner(row), 0.0))
    thread = await desk.thread()
    assert thread is not None and (thread.running, thread.lease_until) == (None, 0.0)
    assert await desk.count("journal") == 0
    assert await claimed(desk) == [response_id]


async def test_what_a_backend_remembers_is_handed_over_as_it_is(desk: Desk, other_desk: Desk) -> None:
    response_id = await desk.begin(await desk.session())
    await desk.journal(response_id, 0)
    await desk.database.submit(sign(response_id, 10))
    given = hand_over(response_id, desk.owner, named_thread("", "s"), resumable=True, said=True)
    with desk.database.bell.listen(QUEUE) as ear:
        await desk.database.submit(given)
        assert await ear.heard(0)
    assert await claimed(other_desk) == []
    [row] = await other_desk.claim_left()  # at once, and not when the lease has run out
    assert (row.id, row.status, row.epoch) == (response_id, "in_progress", 2)
    async with desk.database.reading() as connection:
        assert len(await read_journal(connection, response_id)) == 1
    thread = await desk.thread()
    assert thread is not None and thread.running == response_id


@pytest.mark.parametrize(("said", "followed"), [(False, False), (True, False), (False, True)])
async def test_what_nobody_has_seen_is_handed_over_to_begin_again(
    desk: Desk, other_desk: Desk, said: bool, followed: bool
) -> None:
    response_id = await desk.begin(await desk.session(), background=True)
    await desk.journal(response_id, 0)
    if followed:
        await desk.database.submit(sign(response_id, 10))
    await desk.database.submit(hand_over(response_id, desk.owner, named_thread("", "s"), resumable=False, said=said))
    thread = await desk.thread()
    assert thread is not None and thread.running is None
    assert await desk.count("journal") == 0
    assert await left(other_desk) == []
    [row] = await other_desk.claim()
    assert (row.id, row.status, row.epoch) == (response_id, "queued", 2)
    await begin_waiting(other_desk, row, "s")
    with pytest.raises(StaleWriter):
        await desk.journal(response_id, 0)


@pytest.mark.parametrize("how", ["signed", "from the beginning"])
async def test_what_may_have_been_seen_is_not_begun_again(desk: Desk, how: str) -> None:
    response_id = await desk.begin(await desk.session(), followed=how == "from the beginning")
    await desk.journal(response_id, 0)
    if how == "signed":
        await desk.database.submit(sign(response_id, 0))
    with pytest.raises(NotHandedOver):
        await desk.database.submit(
            hand_over(response_id, desk.owner, named_thread("", "s"), resumable=False, said=True)
        )
    thread = await desk.thread()
    assert thread is not None and thread.running == response_id
    assert await desk.count("journal") == 1
    await desk.journal(response_id, 1)  # it is this worker's still


async def test_only_what_is_ones_own_and_runs_can_be_handed_over(desk: Desk) -> None:
    ended = await desk.turn(desk.chain(), "a", "1")
    running = await desk.begin(desk.chain())
    for id, owner in ((ended, desk.owner), (running, replace(desk.owner, epoch=2)), ("resp_unknown", desk.owner)):
        with pytest.raises(StaleWriter):
            await desk.database.submit(hand_over(id, owner, "", resumable=True, said=False))
    desk.clock.now += 1
    assert not await is_due(desk)


async def test_a_thread_that_is_anothers_by_now_is_not_freed(desk: Desk) -> None:
    late = await desk.begin(await desk.session(), background=True)
    desk.clock.now += LEASE
    second = await desk.begin(await desk.session())
    await desk.database.submit(hand_over(late, desk.owner, named_thread("", "s"), resumable=False, said=False))
    thread = await desk.thread()
    assert thread is not None and thread.running == second


async def test_a_claim_and_a_handing_over_at_once_leave_it_to_one(desk: Desk, other_desk: Desk) -> None:
    """The lease has just run out: the owner gives it up as another takes it."""
    for _ in range(10):
        response_id = await desk.begin(desk.chain())
        desk.clock.now += LEASE
        given = hand_over(response_id, desk.owner, "", resumable=True, said=False)
        both: Any = await asyncio.gather(left(other_desk), desk.database.submit(given), return_exceptions=True)
        taken, handed = both
        row = await desk.row(response_id)
        if taken == [response_id]:
            assert row.owner == other_desk.owner.name and handed is None or isinstance(handed, StaleWriter)
        else:
            assert (taken, handed, row.owner) == ([], None, None)
            assert await left(other_desk) == [response_id]
        assert (await desk.row(response_id)).epoch == 2
        await other_desk.end(response_id, nowhere(row), [], [], status="failed", owner=Owner("", 2, LEASE))


# Asking an owner.


async def test_an_owner_is_asked_for_what_is_its_own(desk: Desk, other_desk: Desk) -> None:
    mine, other = [await desk.begin(await desk.session(key)) for key in ("a", "b")]
    theirs = await other_desk.begin(await other_desk.session("c"))
    with desk.database.bell.listen(ASKED) as ear:
        await desk.database.submit(ask_to_yield(mine))
        assert await ear.heard(0)
    for id in (other, theirs):
        await other_desk.database.submit(cancel(await desk.row(id), CANCELLED))
    assert await asked(desk) == {mine: "yield", other: "cancel"}
    assert await asked(other_desk) == {theirs: "cancel"}
    assert (await desk.row(other)).running


async def test_a_cancel_is_not_forgotten_over_a_wish_to_make_way(desk: Desk) -> None:
    response_id = await desk.begin(desk.chain())
    for unit in (ask_to_yield(response_id), cancel(await desk.row(response_id), CANCELLED), ask_to_yield(response_id)):
        await desk.database.submit(unit)
    assert await asked(desk) == {response_id: "cancel"}


async def test_nothing_is_asked_of_what_has_ended_waits_or_is_unknown(desk: Desk) -> None:
    ended = await desk.turn(desk.chain(), "a", "1")
    waiting = await desk.wait()
    for id in (ended, waiting, "resp_unknown"):
        await desk.database.submit(ask_to_yield(id))
    before = await desk.row(ended)
    await desk.database.submit(cancel(before, CANCELLED))
    assert await desk.row(ended) == before
    assert (await desk.row(waiting)).asked is None
    assert await asked(desk) == {}


async def test_what_was_asked_is_forgotten_at_the_end(desk: Desk) -> None:
    place = desk.chain()
    response_id = await desk.begin(place)
    await desk.database.submit(ask_to_yield(response_id))
    await desk.end(response_id, place, [], [], status="cancelled")
    assert await asked(desk) == {}
    assert (await desk.row(response_id)).asked is None


async def test_what_waits_is_cancelled_at_once(desk: Desk, other_desk: Desk) -> None:
    waiting = await desk.wait()
    with other_desk.database.bell.listen(waiting) as ear:
        await other_desk.database.submit(cancel(await desk.row(waiting), CANCELLED))
        assert await ear.heard(0)
    row = await desk.row(waiting)
    assert (row.status, row.owner, row.request, row.expires_at) == ("cancelled", None, None, NOW + 900)
    async with desk.database.reading() as connection:
        assert await read_journal(connection, waiting) == [CANCELLED.journal]
    assert await claimed(desk) == []
    assert not await is_due(desk)


async def test_of_what_was_claimed_its_owner_is_asked(desk: Desk, other_desk: Desk) -> None:
    waiting = await desk.wait()
    await desk.claim()
    await other_desk.database.submit(cancel(await desk.row(waiting), CANCELLED))
    assert await asked(desk) == {waiting: "cancel"}
    desk.clock.now += LEASE  # it never learns of it: whoever claims it next does
    [row] = await other_desk.claim()
    assert (row.asked, row.status) == ("cancel", "queued")


async def test_what_waits_to_be_gone_on_with_is_not_ended_here(desk: Desk) -> None:
    """Its backend is to be told."""
    response_id = await desk.begin(desk.chain(), background=True)
    await desk.database.submit(hand_over(response_id, desk.owner, "", resumable=True, said=False))
    await desk.database.submit(cancel(await desk.row(response_id), CANCELLED))
    [row] = await desk.claim_left()
    assert (row.status, row.asked) == ("in_progress", "cancel")


async def test_a_cancel_and_a_claim_at_once_do_not_miss_each_other(desk: Desk, other_desk: Desk) -> None:
    for _ in range(10):
        waiting = await desk.wait()
        row = await desk.row(waiting)
        taken, _ = await asyncio.gather(claimed(desk), other_desk.database.submit(cancel(row, CANCELLED)))
        after = await desk.row(waiting)
        if taken:
            assert (after.owner, after.asked, after.status) == (desk.owner.name, "cancel", "queued")
        else:
            assert (after.owner, after.asked, after.status) == (None, None, "cancelled")


# Following from elsewhere.


async def test_who_follows_signs_for_as_long(desk: Desk, other_desk: Desk) -> None:
    response_id = await desk.begin(desk.chain())

    async def until() -> float:
        async with desk.database.reading() as connection:
            return await followed_until(connection, response_id)

    assert await until() == 0.0
    await other_desk.database.submit(sign(response_id, 10))
    assert await until() == NOW + 10
    await desk.database.submit(sign(response_id, 0))  # another looked at it: the first follows all the same
    assert await until() == NOW + 10
    desk.clock.now += 5
    await other_desk.database.submit(sign(response_id, 10))
    assert await until() == NOW + 15


async def test_what_is_followed_from_the_beginning_says_so(desk: Desk) -> None:
    response_id = await desk.begin(desk.chain(), followed=True)
    async with desk.database.reading() as connection:
        assert await followed_until(connection, response_id) == NOW
        assert await followed_until(connection, "resp_unknown") == 0.0


async def test_nobody_signs_for_what_has_ended(desk: Desk) -> None:
    ended = await desk.turn(desk.chain(), "a", "1")
    await desk.database.submit(sign(ended, 10))
    assert (await desk.row(ended)).followed_until is None


# Leases.


async def test_renewing_prolongs_the_leases_of_a_workers_responses_and_threads(desk: Desk, other_desk: Desk) -> None:
    a, b = [await desk.begin(await desk.session(key)) for key in ("a", "b")]
    chain = await desk.begin(desk.chain())
    theirs = await other_desk.begin(await other_desk.session("c"))
    later = NOW + 10 * LEASE
    running = {id: (await desk.row(id)).thread_id for id in (a, chain, theirs)}
    async with desk.database.transaction() as connection:
        await renew_leases(connection, desk.owner.name, running, later)
    leases = [await lease_of(desk, id) for id in (a, chain, b, theirs)]
    assert leases == [later, later, NOW + LEASE, NOW + LEASE]
    threads = [await desk.thread(key) for key in ("a", "b", "c")]
    assert [thread and thread.lease_until for thread in threads] == [later, NOW + LEASE, NOW + LEASE]
    desk.clock.now += LEASE
    assert set(await left(other_desk)) == {b, theirs}


async def test_what_another_has_claimed_is_not_renewed_by_who_lost_it(desk: Desk, other_desk: Desk) -> None:
    response_id = await desk.begin(await desk.session())
    desk.clock.now += LEASE
    assert await left(other_desk) == [response_id]
    await desk.renew(response_id, NOW + 10 * LEASE)
    thread = await desk.thread()
    assert thread is not None and thread.lease_until == NOW + LEASE
    assert await lease_of(desk, response_id) == NOW + 2 * LEASE
    await other_desk.renew(response_id, NOW + 10 * LEASE)
    thread = await desk.thread()
    assert thread is not None and thread.lease_until == NOW + 10 * LEASE


async def test_a_thread_that_is_anothers_by_now_is_not_renewed(desk: Desk) -> None:
    late = await desk.begin(await desk.session())
    desk.clock.now += LEASE
    await desk.begin(await desk.session())
    await desk.renew(late, NOW + 10 * LEASE)
    thread = await desk.thread()
    assert thread is not None and thread.lease_until == NOW + 2 * LEASE


async def test_renewing_what_has_ended_or_nothing_changes_nothing(desk: Desk) -> None:
    ended = await desk.turn(await desk.session(), "a", "1")
    thread, row = await desk.thread(), await desk.row(ended)
    await desk.renew(ended, NOW + 10 * LEASE)
    async with desk.database.transaction() as connection:
        await renew_leases(connection, desk.owner.name, {}, NOW + 10 * LEASE)
    assert (await desk.thread(), await desk.row(ended)) == (thread, row)


async def test_a_renewal_and_a_claim_at_once_leave_one_owner(desk: Desk, other_desk: Desk) -> None:
    for _ in range(10):
        response_id = await desk.begin(desk.chain())
        desk.clock.now += LEASE
        taken, _ = await asyncio.gather(left(other_desk), desk.renew(response_id))
        row = await desk.row(response_id)
        assert (row.owner, row.epoch) == ((other_desk.owner.name, 2) if taken else (desk.owner.name, 1))
        owner = Owner("", row.epoch, LEASE)
        await desk.end(response_id, nowhere(row), [], [], status="failed", owner=owner)


async def test_renewing_and_writing_side_by_side_never_wait_for_each_other(desk: Desk, other_desk: Desk) -> None:
    """All lock rows in the same order: what the writer does in one transaction, in whatever order it was given."""
    places = [await desk.session(str(number)) for number in range(12)]
    ids = [await desk.begin(place) for place in places]
    running = {id: place.thread_id for id, place in zip(ids, places, strict=True)}

    async def renew(worker: Desk) -> None:
        for order in (ids, ids[::-1]) * 5:
            async with worker.database.transaction() as connection:
                mine = {id: running[id] for id in order}
                await renew_leases(connection, desk.owner.name, mine, NOW + LEASE)

    async def write(numbers: range) -> None:
        for number in numbers:
            await asyncio.gather(*(desk.journal(id, number) for id in (ids if number % 2 else ids[::-1])))

    await asyncio.gather(renew(desk), renew(other_desk), write(range(20)))
