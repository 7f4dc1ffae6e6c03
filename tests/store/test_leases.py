"""What stands in the row of a response that another process runs: what is asked of it, who follows, its lease."""

import asyncio
from pathlib import Path

import pytest

from responses_ingress.errors import StaleWriter
from responses_ingress.store.queue import (
    ask_to_yield,
    cancel,
    followed_until,
    hand_over,
    nowhere,
    renew_leases,
    sign,
)
from responses_ingress.store.responses import read_journal
from responses_ingress.store.values import Ending, Entry, Keep, Owner
from responses_ingress.store.wake import ASKED
from tests.store.claims import asked, claimed, is_due, lease_of, left
from tests.store.desk import LEASE, NOW, Desk

ROOT = Path(__file__).parents[2]
CANCELLED = Ending("cancelled", [], [], journal=Entry(0, 3, b'["cancelled"]'), keep=Keep(60, 900))


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


async def test_what_was_read_counts_as_seen_only_where_it_still_is(desk: Desk, other_desk: Desk) -> None:
    """It was read, and then handed over to begin again: what was read of it must not be shown."""
    response_id = await desk.begin(desk.chain(), background=True)
    read = await desk.row(response_id)
    await desk.database.submit(hand_over(response_id, desk.owner, "", resumable=False, said=True))
    with pytest.raises(StaleWriter):
        await other_desk.database.submit(sign(response_id, 0, of=(read.epoch, read.owner)))
    assert (await desk.row(response_id)).followed_until is None
    now = await desk.row(response_id)
    await other_desk.database.submit(sign(response_id, 0, of=(now.epoch, now.owner)))
    assert (await desk.row(response_id)).followed_until is not None


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
