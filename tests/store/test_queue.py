"""Between workers: who waits, who may claim what, what is given back, and what is asked of an owner."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

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
    cancel,
    claim_queued,
    hand_over,
    nowhere,
    put_back,
    sign,
)
from responses_ingress.store.responses import read_journal
from responses_ingress.store.values import Ending, Entry, Keep, Owner
from responses_ingress.store.wake import QUEUE
from tests.store.claims import begin_waiting, claimed, is_due, lease_of, left
from tests.store.desk import LEASE, NOW, Desk, at_desk

ROOT = Path(__file__).parents[2]
CANCELLED = Ending("cancelled", [], [], journal=Entry(0, 3, b'["cancelled"]'), keep=Keep(60, 900))


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
        handing = desk.database.submit(given)
        taken = await left(other_desk)
        await asyncio.wait((handing,))
        row = await desk.row(response_id)
        if taken:
            assert row.owner == other_desk.owner.name
            assert handing.exception() is None or isinstance(handing.exception(), StaleWriter)
        else:
            assert (handing.exception(), row.owner) == (None, None)
            assert await left(other_desk) == [response_id]
        assert (await desk.row(response_id)).epoch == 2
        await other_desk.end(response_id, nowhere(row), [], [], status="failed", owner=Owner("", 2, LEASE))
