"""What comes twice: a request that is made again, a response that begins again, a commit that nobody heard of."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete, select

from responses_ingress.core.request import Retry
from responses_ingress.errors import AlreadyBegun, InvalidRequest, KeyReused, PlacementOutdated, StaleWriter, ThreadBusy
from responses_ingress.store.queue import cancel, hand_over
from responses_ingress.store.responses import StoredResponse
from responses_ingress.store.retention import drop_journals
from responses_ingress.store.tables import responses, threads
from responses_ingress.store.turns import append_journal, begin, begin_claimed, end, use
from responses_ingress.store.values import Ending, Entry, Keep, Placement
from responses_ingress.store.writer import Batch, Lease, Unit
from tests.store.desk import LEASE, NOW, Desk

NAME, BODY = b"n" * 16, b"b" * 16
AGAIN = Retry(NAME, BODY, attaches=True)
KEEP = Keep(journal=60, response=900)
END = Entry(1, 1, b"[]")


async def known(desk: Desk, retry: Retry = AGAIN) -> str | None:
    """The response that the request has begun before; where there is none it begins now."""
    try:
        await desk.begin(desk.chain(), retry=retry)
    except AlreadyBegun as error:
        return error.response_id
    return None


async def ended(desk: Desk, status: str = "completed", retry: Retry = AGAIN, **facts: Any) -> str:
    place = desk.chain()
    response_id = await desk.begin(place, retry=retry)
    await desk.end(response_id, place, ["a"], ["1"], status=status, lingers=True, keep=KEEP, journal=END, **facts)
    return response_id


async def expiry(desk: Desk, response_id: str) -> float | None:
    async with desk.database.reading() as connection:
        query = select(responses.c.expires_at).where(responses.c.id == response_id)
        found: float | None = (await connection.execute(query)).scalar_one()
        return found


# A request that is made again.


async def test_of_what_is_asked_over_and_over_only_the_last_time_is_read_and_only_for_a_repeat(desk: Desk) -> None:
    ids = []
    for _ in range(3):
        ids.append(await desk.begin(desk.chain(), retry=Retry(b"name")))
        desk.clock.now += 1

    def told(attaches: bool) -> Unit[list[str]]:
        return Unit(
            lambda batch: [known.id for known in batch.repeats[b"name"]], repeats=(Retry(b"name", None, attaches),)
        )

    assert await desk.database.submit(told(attaches=True)) == ids[-1:]
    assert await desk.database.submit(told(attaches=False)) == []


async def test_a_request_that_runs_is_not_begun_again(desk: Desk, other_desk: Desk) -> None:
    place = await desk.session()
    running = await desk.begin(place, retry=AGAIN)
    for worker in (desk, other_desk):
        assert await known(worker) == running
        with pytest.raises(AlreadyBegun):  # and not that its thread is busy, with itself
            await worker.begin(await worker.session(), retry=AGAIN)
    assert await desk.count("responses") == await desk.count("branches") == 1


@pytest.mark.parametrize("status", ["completed", "incomplete"])
async def test_a_request_that_has_just_ended_well_is_not_begun_again(desk: Desk, status: str) -> None:
    first = await ended(desk, status)
    desk.clock.now += 59
    assert await known(desk) == first
    desk.clock.now += 1  # nobody comes back for it any more
    assert await known(desk) is None


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_what_failed_is_no_answer(desk: Desk, status: str) -> None:
    await ended(desk, status)
    assert await known(desk) is None
    assert await known(desk) is not None  # the one that runs now


async def test_an_earlier_success_is_an_answer_though_another_try_failed(desk: Desk) -> None:
    first = await ended(desk)
    await ended(desk, "failed", replace(AGAIN, attaches=False))
    assert await known(desk) == first


async def test_what_ended_and_does_not_linger_is_no_answer(desk: Desk) -> None:
    place = desk.chain()
    await desk.end(await desk.begin(place, retry=AGAIN), place, ["a"], ["1"])
    assert await known(desk) is None


async def test_where_the_journal_is_gone_so_is_the_name(desk: Desk) -> None:
    await ended(desk)
    desk.clock.now += 60
    async with desk.database.transaction() as connection:
        assert await drop_journals(connection, desk.clock()) == 1
    assert await known(desk, replace(AGAIN, body=b"another")) is None


async def test_the_same_key_for_another_request_is_refused(desk: Desk) -> None:
    other = replace(AGAIN, body=b"another")
    running = await desk.begin(desk.chain(), retry=AGAIN)
    with pytest.raises(KeyReused):
        await known(desk, other)
    assert await known(desk, replace(AGAIN, body=None)) == running
    assert await desk.count("responses") == 1


async def test_a_name_without_a_body_means_what_was_begun_under_it(desk: Desk) -> None:
    running = await desk.begin(desk.chain(), retry=replace(AGAIN, body=None))
    assert await known(desk, AGAIN) == running


async def test_who_does_not_attach_leaves_its_name_for_those_who_do(desk: Desk) -> None:
    """As an SDK that sends a request the first time."""
    first = replace(AGAIN, attaches=False)
    await desk.begin(desk.chain(), retry=first)
    desk.clock.now += 1
    second = await desk.begin(desk.chain(), retry=first)
    assert await known(desk) == second  # the newest


async def test_another_name_is_another_request(desk: Desk) -> None:
    await desk.begin(desk.chain(), retry=AGAIN)
    assert await known(desk, Retry(b"m" * 16, BODY, attaches=True)) is None
    assert await desk.begin(desk.chain())


async def test_of_requests_that_come_together_one_begins(desk: Desk) -> None:
    found = await asyncio.gather(*(known(desk) for _ in range(5)))
    [begun] = {id for id in found if id is not None}
    assert (found[0], found[1:]) == (None, [begun] * 4)
    assert await desk.count("responses") == 1


async def test_of_two_workers_given_the_same_request_one_begins_it(desk: Desk, other_desk: Desk) -> None:
    for number in range(20):
        retry = Retry(b"%16d" % number, attaches=True)
        found = await asyncio.gather(*(known(worker, retry) for worker in (desk, other_desk)))
        assert found.count(None) == 1
    assert await desk.count("responses") == 20


async def test_what_was_handed_over_is_still_what_the_request_means(desk: Desk) -> None:
    running = await desk.begin(desk.chain(), retry=AGAIN, background=True)
    await desk.database.submit(hand_over(running, desk.owner, "", resumable=False, said=False))
    assert await known(desk) == running


# A response that begins when it was claimed.


async def claimed(desk: Desk, **facts: Any) -> StoredResponse:
    await desk.wait(**facts)
    [row] = await desk.claim()
    return row


async def begin_it(desk: Desk, row: StoredResponse, place: Placement, **facts: Any) -> None:
    await desk.database.submit(begin_claimed(row, None, place, desk.as_owner(row), b'[{"content":"a"}]', **facts))


async def test_what_was_claimed_begins_as_this_workers(desk: Desk, other_desk: Desk) -> None:
    row = await claimed(desk)
    place = await desk.session()
    desk.clock.now += 1
    with desk.database.bell.listen(row.id) as ear:
        await begin_it(desk, row, place)
        assert await ear.heard(0)
    begun = await desk.row(row.id)
    assert (begun.status, begun.owner, begun.epoch, begun.base) == ("in_progress", desk.owner.name, 1, place.branch_id)
    assert (begun.thread_id, begun.input) == (place.thread_id, b'[{"content":"a"}]')
    thread = await desk.thread()
    assert thread is not None and (thread.running, thread.lease_until) == (row.id, NOW + 1 + LEASE)
    await desk.end(row.id, place, ["a"], ["1"], owner=desk.as_owner(row))
    assert await desk.history() == ["a", "1"]


async def test_what_begins_again_begins_from_the_start(desk: Desk, other_desk: Desk) -> None:
    """On the branch that it made the first time, and with a journal of its own."""
    row = await claimed(desk)
    place = replace(desk.chain(), thread_id=row.thread_id)
    await begin_it(desk, row, place)
    await desk.journal(row.id, 0, owner=desk.as_owner(row))
    desk.clock.now += LEASE
    [again] = await other_desk.claim_left()
    await begin_it(other_desk, again, place)
    assert (await desk.count("journal"), await desk.count("branches")) == (0, 1)
    with pytest.raises(StaleWriter):
        await desk.end(row.id, place, ["a"], ["1"], owner=desk.as_owner(row))
    await other_desk.end(row.id, place, ["a"], ["2"], owner=other_desk.as_owner(again))
    assert await desk.lineage(row.id) == ["a", "2"]


async def test_a_turn_that_was_claimed_does_not_begin_beside_another(desk: Desk) -> None:
    row = await claimed(desk)
    running = await desk.begin(await desk.session())
    with pytest.raises(ThreadBusy) as caught:
        await begin_it(desk, row, await desk.session())
    assert caught.value.running == running
    assert (await desk.row(row.id)).status == "queued"


async def test_a_turn_that_was_claimed_does_not_begin_where_the_thread_has_moved(desk: Desk) -> None:
    row = await claimed(desk)
    place = await desk.session()
    await desk.turn(await desk.session(), "a", "1")
    with pytest.raises(PlacementOutdated):
        await begin_it(desk, row, place)


async def test_what_another_has_claimed_by_now_does_not_begin(desk: Desk, other_desk: Desk) -> None:
    row = await claimed(desk)
    desk.clock.now += LEASE
    [theirs] = await other_desk.claim()
    with pytest.raises(StaleWriter):
        await begin_it(desk, row, await desk.session())
    assert await desk.thread() is None
    await desk.database.submit(cancel(theirs, Ending("cancelled", [], [])))
    await begin_it(other_desk, theirs, await desk.session())  # its owner was asked, and has yet to hear of it
    assert (await desk.row(row.id)).asked == "cancel"


async def test_what_was_cancelled_does_not_begin(desk: Desk) -> None:
    row = await desk.row(await desk.wait())
    await desk.database.submit(cancel(row, Ending("cancelled", [], [])))
    with pytest.raises(StaleWriter):
        await begin_it(desk, row, await desk.session())


@pytest.mark.parametrize("began", ["now", "queued", "claimed"])
async def test_nothing_begins_behind_a_parent_that_is_gone(desk: Desk, began: str) -> None:
    """Its items may be gone too, and their place another's."""
    root = await desk.turn(desk.chain(), "a", "1")
    parent = await desk.turn(await desk.after(root), "b", "2")
    place = await desk.after(parent)
    row = await claimed(desk, previous_response_id=parent) if began == "claimed" else None
    async with desk.database.transaction() as connection:
        await connection.execute(delete(responses).where(responses.c.id == parent))
    with pytest.raises(PlacementOutdated):
        if began == "now":
            await desk.begin(place, previous_response_id=parent)
        elif row is None:
            await desk.wait(previous_response_id=parent)
        else:
            await begin_it(desk, row, place)
    assert row is None or (await desk.row(row.id)).status == "queued"


async def test_what_a_waiting_response_builds_on_is_not_deleted(desk: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1")
    place = await desk.after(parent)
    row = await claimed(desk, previous_response_id=parent)
    with pytest.raises(InvalidRequest, match="one in the queue"):
        await desk.delete(parent)
    await begin_it(desk, row, place)
    assert await desk.delete(parent)


async def test_a_thread_does_not_begin_on_another_that_was_cut_off(desk: Desk) -> None:
    await desk.turn(await desk.session("parent"), "a", "1")
    parent = await desk.thread("parent")
    assert parent is not None
    place = replace(await desk.session("child"), branch_id=parent.active_branch, position=3)
    with pytest.raises(PlacementOutdated):
        await desk.begin(place)
    assert await desk.begin(replace(place, position=2))


async def test_a_turn_that_ends_beyond_its_branch_is_refused(desk: Desk) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    place = replace(await desk.after(root), position=5)
    response_id = await desk.begin(place)
    with pytest.raises(StaleWriter):
        await desk.end(response_id, place, ["b"], ["2"])
    assert (await desk.count("items"), await desk.count("branches")) == (2, 1)


# What is used is kept.


async def test_what_is_read_or_built_on_is_kept_for_longer(desk: Desk) -> None:
    parent = await desk.turn(desk.chain(), "a", "1", keep=KEEP)
    assert await expiry(desk, parent) == NOW + 900
    desk.clock.now += 100
    await desk.database.submit(use(parent, KEEP))
    assert await expiry(desk, parent) == NOW + 1000
    desk.clock.now += 100
    new = desk.new(await desk.after(parent), previous_response_id=parent)
    await desk.database.submit(begin(new, await desk.after(parent), desk.owner, KEEP))
    assert await expiry(desk, parent) == NOW + 1100
    desk.clock.now += 100
    row = await claimed(desk, previous_response_id=parent)
    await begin_it(desk, row, await desk.after(parent), keep=KEEP)
    assert await expiry(desk, parent) == NOW + 1200


async def test_use_shortens_nothing(desk: Desk) -> None:
    kept = await desk.turn(desk.chain(), "a", "1", keep=KEEP)
    await desk.database.submit(use(kept, Keep(response=1)))
    assert await expiry(desk, kept) == NOW + 900
    running = await desk.begin(desk.chain())
    for id in (running, "resp_unknown"):
        await desk.database.submit(use(id, KEEP))
    assert await expiry(desk, running) is None


# A commit that nobody heard of: the same unit is applied again.


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed", "cancelled"])
@pytest.mark.parametrize(("store", "lingers"), [(True, True), (True, False), (False, True), (False, False)])
async def test_an_end_that_is_written_again_counts_once(desk: Desk, status: str, store: bool, lingers: bool) -> None:
    await desk.turn(await desk.session(), "a", "1")
    place = await desk.session()
    response_id = await desk.begin(place, store=store)
    ending = desk.ending(
        response_id, place, ["b"], ["2"], status=status, store=store, lingers=lingers, journal=END, memory=b"{}"
    )
    await desk.database.submit(ending)
    before = await everything(desk)
    await desk.database.submit(ending)
    assert await everything(desk) == before
    assert await desk.history() == (["a", "1", "b", "2"] if status in ("completed", "incomplete") else ["a", "1"])
    await desk.turn(await desk.session(), "c", "3")
    await desk.database.submit(ending)
    assert (await desk.history())[-2:] == ["c", "3"]


async def everything(desk: Desk) -> dict[str, list[Any]]:
    async with desk.database.reading() as connection:
        return {
            table.name: sorted(map(tuple, await connection.execute(select(table)))) for table in (responses, threads)
        } | {name: [await desk.count(name)] for name in ("items", "journal", "branches")}


async def test_an_end_that_was_not_written_does_not_count_where_another_has_ended_it(desk: Desk) -> None:
    place = await desk.session()
    response_id = await desk.begin(place)
    ending = desk.ending(response_id, place, ["a"], ["half"], status="failed", error=b'{"code":"mine"}')
    lost = Batch(NOW)
    lost.leases[response_id] = Lease(1, "in_progress")
    ending.apply(lost)  # and the transaction is rolled back
    desk.clock.now += LEASE
    [row] = await desk.claim_left()
    await desk.end(response_id, place, ["a"], [], status="failed", error=b'{"code":"theirs"}', owner=desk.as_owner(row))
    with pytest.raises(StaleWriter):
        await desk.database.submit(ending)
    assert (await desk.row(response_id)).error == b'{"code":"theirs"}'


async def test_an_end_that_was_not_written_is_written(desk: Desk) -> None:
    place = desk.chain()
    response_id = await desk.begin(place)
    ending = desk.ending(response_id, place, ["a"], [], status="failed")
    lost = Batch(NOW)
    lost.leases[response_id] = Lease(1, "in_progress")
    ending.apply(lost)
    await desk.database.submit(ending)
    assert (await desk.row(response_id)).status == "failed"


async def test_what_is_written_again_while_it_runs_counts_once(desk: Desk) -> None:
    response_id = await desk.begin(desk.chain())
    units = [append_journal(response_id, desk.owner, "", Entry(0, 1, b"[]"))]
    units += [hand_over(response_id, desk.owner, "", resumable=True, said=True)]
    for unit in units:
        for _ in range(2):
            await desk.database.submit(unit)
    assert await desk.count("journal") == 1
    [row] = await desk.claim_left()
    assert row.epoch == 2
    with pytest.raises(StaleWriter):  # it is another's by now
        await desk.database.submit(units[1])


async def test_two_different_endings_are_no_repetition(desk: Desk) -> None:
    place = desk.chain()
    response_id = await desk.begin(place)
    ending = Ending("completed", [], [])
    await desk.database.submit(end(response_id, desk.owner, place, ending))
    with pytest.raises(StaleWriter):
        await desk.database.submit(end(response_id, desk.owner, place, ending))


async def test_a_late_turn_leaves_no_memory_on_a_thread_that_is_anothers(desk: Desk) -> None:
    late_place = await desk.session()
    late = await desk.begin(late_place)
    desk.clock.now += LEASE
    await desk.turn(await desk.session(), "b", "2", memory=b'{"of":"the next"}')
    await desk.end(late, late_place, ["late"], ["x"], memory=b'{"of":"the late"}')
    thread = await desk.thread()
    assert thread is not None and thread.memory == b'{"of":"the next"}'
