"""The life of a response in the database: who may begin, who may write, and what an end leaves behind."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from sqlalchemy import select

from responses_ingress.errors import PlacementOutdated, StaleWriter, StoreUnavailable, ThreadBusy
from responses_ingress.ids import named_thread
from responses_ingress.store.history import read_payloads
from responses_ingress.store.queue import claim_left_behind
from responses_ingress.store.responses import read_input, read_journal, read_output
from responses_ingress.store.tables import responses, threads
from responses_ingress.store.turns import append_journal, begin, end
from responses_ingress.store.values import DEFAULT_KEEP, Ending, Entry, Keep, Owner, Placement
from tests.store.desk import LEASE, NOW, Desk


async def outcomes(futures: Sequence[asyncio.Future[None]]) -> list[type[BaseException] | None]:
    found = await asyncio.gather(*futures, return_exceptions=True)
    return [None if one is None else type(one) for one in found]


async def own_items(desk: Desk, response_id: str, tenant: str = "") -> tuple[list[str], list[str]]:
    """Texts of a response's input and output, wherever they are kept."""
    row = await desk.row(response_id, tenant)
    async with desk.database.reading() as connection:
        items = (await read_input(connection, row), await read_output(connection, row))
    return ([item["content"] for item in items[0]], [item["content"] for item in items[1]])


async def times(desk: Desk, response_id: str) -> tuple[float | None, float | None]:
    """Until when a response's journal is kept, and when it expires."""
    query = select(responses.c.journal_until, responses.c.expires_at).where(responses.c.id == response_id)
    async with desk.database.reading() as connection:
        until, expires = (await connection.execute(query)).one()
    return until, expires


async def journaled(desk: Desk, response_id: str) -> int:
    async with desk.database.reading() as connection:
        return len(await read_journal(connection, response_id))


async def taken_over(desk: Desk, response_id: str) -> Owner:
    """Let the response's lease run out, and another worker claim it: who that is."""
    desk.clock.now += LEASE
    another = Owner("another", 0, LEASE)
    async with desk.database.transaction() as connection:
        rows = await claim_left_behind(connection, another, desk.clock())
    assert [row.id for row in rows] == [response_id]
    return replace(another, epoch=rows[0].epoch)


# Beginning.


async def test_a_response_that_begins_is_found_and_runs(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement, model="gpt", envelope=b'{"x":1}', background=True, status="queued")
    row = await desk.row(response_id)
    assert (row.status, row.model, row.thread_id, row.created_at) == ("queued", "gpt", placement.thread_id, int(NOW))
    assert row.running
    assert (row.branch_id, row.stop, row.completed_at) == (None, None, None)


async def test_the_first_turn_of_a_session_makes_its_thread_and_takes_it(desk: Desk) -> None:
    response_id = await desk.begin(await desk.session(), lineage=b'{"window_id":"w"}')
    thread = await desk.thread()
    assert thread is not None
    assert (thread.id, thread.running, thread.lease_until, thread.head) == (
        named_thread("", "s"),
        response_id,
        NOW + LEASE,
        0,
    )


async def test_what_is_told_of_a_threads_lineage_adds_to_what_is_known(desk: Desk) -> None:
    for told in (b'{"parent":"p","window":1}', None, b'{"window":2}'):
        place = await desk.session()
        response_id = await desk.begin(place, lineage=told)
        await desk.end(response_id, place, [], [])
    async with desk.database.reading() as connection:
        known = (await connection.execute(select(threads.c.lineage))).scalar_one()
    assert orjson.loads(known) == {"parent": "p", "window": 2}


async def test_a_session_has_one_running_turn(desk: Desk) -> None:
    first = await desk.begin(await desk.session())
    for _ in range(2):
        with pytest.raises(ThreadBusy) as caught:
            await desk.begin(await desk.session())
        assert caught.value.running == first


async def test_a_turn_that_is_refused_leaves_no_row(desk: Desk) -> None:
    await desk.begin(await desk.session())
    new = desk.new(await desk.session())
    with pytest.raises(ThreadBusy):
        await desk.database.submit(begin(new, await desk.session(), desk.owner))
    assert await desk.find(new.id) is None
    assert await desk.count("responses") == 1


async def test_of_turns_of_a_session_that_begin_together_one_has_it(desk: Desk) -> None:
    places = [await desk.session() for _ in range(5)]
    units = [begin(desk.new(place), place, desk.owner) for place in places]
    found = await outcomes([desk.database.submit(unit) for unit in units])
    assert found == [None, ThreadBusy, ThreadBusy, ThreadBusy, ThreadBusy]


async def test_of_two_workers_that_begin_a_session_together_one_has_it(desk: Desk, other_desk: Desk) -> None:
    for key in map(str, range(10)):
        futures = []
        for worker in (desk, other_desk):
            place = await worker.session(key)
            futures.append(worker.database.submit(begin(worker.new(place), place, worker.owner)))
        found = await outcomes(futures)
        assert sorted(found, key=str) == [ThreadBusy, None]
    assert await desk.count("responses") == await desk.count("threads") == await desk.count("branches") == 10


async def test_sessions_of_other_names_and_tenants_are_not_busy(desk: Desk) -> None:
    await desk.begin(await desk.session("a"))
    await desk.begin(await desk.session("b"))
    await desk.begin(await desk.session("a", tenant="t"))
    assert await desk.count("threads") == 3


async def test_a_turn_placed_before_the_thread_moved_is_outdated(desk: Desk) -> None:
    new_session = await desk.session()
    await desk.turn(await desk.session(), "a", "1")
    with pytest.raises(PlacementOutdated):
        await desk.begin(new_session)
    placed = await desk.session()
    await desk.turn(await desk.session(), "b", "2")
    with pytest.raises(PlacementOutdated):
        await desk.begin(placed)
    assert await desk.begin(await desk.session())


async def test_a_turn_placed_before_the_thread_changed_its_branch_is_outdated(desk: Desk) -> None:
    first = await desk.turn(await desk.session(), "a", "1")
    placed = await desk.session()
    row = await desk.row(first)
    elsewhere = replace(await desk.session(), branch_id=row.branch_id or "", position=0, first=0)
    await desk.turn(elsewhere, "another beginning", "2")
    with pytest.raises(PlacementOutdated):
        await desk.begin(placed)


async def test_a_turn_placed_in_a_thread_that_is_gone_is_outdated(desk: Desk) -> None:
    placed = replace(await desk.session(), root=None, seen=("a branch", 3))
    with pytest.raises(PlacementOutdated):
        await desk.begin(placed)


async def test_a_turn_whose_lease_ran_out_does_not_keep_the_session(desk: Desk) -> None:
    await desk.begin(await desk.session())
    desk.clock.now += LEASE - 1
    with pytest.raises(ThreadBusy):
        await desk.begin(await desk.session())
    desk.clock.now += 1
    second = await desk.begin(await desk.session())
    thread = await desk.thread()
    assert thread is not None and (thread.running, thread.lease_until) == (second, desk.clock.now + LEASE)


async def test_a_renewed_lease_keeps_the_session(desk: Desk) -> None:
    response_id = await desk.begin(await desk.session())
    desk.clock.now += LEASE - 1
    await desk.renew(response_id)
    desk.clock.now += LEASE - 1
    with pytest.raises(ThreadBusy):
        await desk.begin(await desk.session())


async def test_what_repeats_from_turn_to_turn_is_stored_once(desk: Desk) -> None:
    preamble = (b"digest", b'{"instructions":"long"}')
    ids = [await desk.begin(desk.chain(), preamble=preamble) for _ in range(3)]
    await desk.begin(desk.chain("tenant"), preamble=preamble)
    assert await desk.count("preambles") == 2
    assert {(await desk.row(id)).preamble for id in ids} == {preamble[1]}


async def test_a_response_that_exists_already_is_refused_and_stays(desk: Desk) -> None:
    placement = desk.chain()
    new = desk.new(placement)
    await desk.database.submit(begin(new, placement, desk.owner))
    with pytest.raises(StoreUnavailable):
        await desk.database.submit(begin(replace(new, model="another"), desk.chain(), desk.owner))
    assert (await desk.row(new.id)).model == "m"


# The journal.


async def test_a_journal_is_read_in_the_order_it_was_written(desk: Desk) -> None:
    response_id = await desk.begin(desk.chain())
    entries = [Entry(first, 2, f"[{first}]".encode()) for first in (0, 2, 10, 4)]
    for entry in entries:
        await desk.database.submit(append_journal(response_id, desk.owner, "", entry))
    async with desk.database.reading() as connection:
        assert await read_journal(connection, response_id) == sorted(entries)
        assert await read_journal(connection, response_id, 4) == sorted(entries)[2:]


async def test_the_same_place_in_a_journal_is_written_once(desk: Desk) -> None:
    """A batch whose commit nobody heard of is written again."""
    response_id = await desk.begin(desk.chain())
    for payload in (b"[1]", b"[2]"):
        await desk.database.submit(append_journal(response_id, desk.owner, "", Entry(0, 1, payload)))
    async with desk.database.reading() as connection:
        assert await read_journal(connection, response_id) == [Entry(0, 1, b"[1]")]


# Ending.


async def test_an_end_puts_input_and_output_on_the_branch(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement, input=b'[{"content":"a"}]', request=b"{}")
    await desk.end(
        response_id, placement, ["a", "b"], ["1"], usage=b'{"total_tokens":3}', completed_at=5, echo=b'{"y":2}'
    )
    row = await desk.row(response_id)
    assert (row.status, row.branch_id, row.first, row.own, row.output_at, row.stop) == (
        "completed",
        placement.root,
        0,
        0,
        2,
        3,
    )
    assert (row.usage, row.completed_at, row.envelope, row.echo, row.input, row.output) == (
        b'{"total_tokens":3}',
        5,
        b'{"model":"m"}',
        b'{"y":2}',
        None,
        None,
    )
    assert (row.owner, row.request, row.asked) == (None, None, None)
    assert await desk.lineage(response_id) == ["a", "b", "1"]
    assert await own_items(desk, response_id) == (["a", "b"], ["1"])


async def test_an_end_that_lingers_keeps_its_journal_to_the_end_for_a_while(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement)
    await desk.journal(response_id, 0)
    last = Entry(1, 2, b'["the end"]')
    await desk.end(
        response_id, placement, ["a"], ["1"], journal=last, lingers=True, keep=Keep(journal=60, response=900)
    )
    async with desk.database.reading() as connection:
        assert await read_journal(connection, response_id) == [Entry(0, 1, b'["deltas"]'), last]
    assert await times(desk, response_id) == (NOW + 60, NOW + 900)


async def test_an_end_that_nobody_can_come_back_to_drops_its_journal(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement)
    await desk.journal(response_id, 0)
    await desk.end(response_id, placement, ["a"], ["1"], journal=Entry(1, 2, b"[]"), keep=Keep(response=900))
    assert await journaled(desk, response_id) == 0
    assert await times(desk, response_id) == (None, NOW + 900)


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_what_is_not_stored_may_linger_as_long_as_its_journal(desk: Desk, status: str) -> None:
    """It ran in the background, or may be asked for by the same request again."""
    placement = await desk.session()
    response_id = await desk.begin(placement, store=False)
    await desk.end(
        response_id, placement, ["a"], ["1"], status=status, store=False, lingers=True, journal=Entry(0, 9, b"[]")
    )
    assert await journaled(desk, response_id) == 1
    assert await times(desk, response_id) == (NOW + DEFAULT_KEEP.journal, NOW + DEFAULT_KEEP.journal)
    assert await desk.history() == (["a", "1"] if status == "completed" else [])


async def test_an_end_gives_the_session_back_and_moves_its_branch(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    thread = await desk.thread()
    assert thread is not None and (thread.running, thread.lease_until, thread.head) == (None, 0.0, 2)
    await desk.turn(await desk.session(), "b", "2", status="incomplete", incomplete="max_output_tokens")
    assert await desk.history() == ["a", "1", "b", "2"]
    assert await desk.count("items") == 4
    assert await desk.count("branches") == 1


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_turn_that_failed_leaves_the_session_as_it_was(desk: Desk, status: str) -> None:
    await desk.turn(await desk.session(), "a", "1")
    before = await desk.thread()
    failed = await desk.turn(await desk.session(), "b", "half", status=status, error=b'{"code":"x"}')
    assert await desk.thread() == before
    assert await desk.history() == ["a", "1"]
    row = await desk.row(failed)
    assert (row.status, row.error, row.branch_id, row.stop) == (status, b'{"code":"x"}', None, None)
    assert await own_items(desk, failed) == (["b"], ["half"])
    assert await desk.count("items") == 2
    await desk.turn(await desk.session(), "b", "2")
    assert await desk.history() == ["a", "1", "b", "2"]


async def test_a_first_turn_that_failed_leaves_an_empty_session(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "half", status="failed")
    assert await desk.history() == []
    await desk.turn(await desk.session(), "a", "1")
    assert await desk.history() == ["a", "1"]


async def test_what_is_not_stored_leaves_its_items_in_the_session_and_no_response(desk: Desk) -> None:
    response_id = await desk.turn(await desk.session(), "a", "1", store=False)
    assert await desk.find(response_id) is None
    assert await desk.count("responses") == 0
    assert await desk.history() == ["a", "1"]


async def test_what_is_not_stored_is_not_found_while_it_runs_but_holds_its_session(desk: Desk) -> None:
    response_id = await desk.begin(await desk.session(), store=False)
    assert await desk.find(response_id) is None
    with pytest.raises(ThreadBusy):
        await desk.begin(await desk.session())


async def test_what_is_not_stored_and_fails_leaves_nothing(desk: Desk) -> None:
    placement = await desk.session()
    response_id = await desk.begin(placement, store=False)
    await desk.journal(response_id, 0)
    await desk.end(response_id, placement, ["a"], ["half"], status="failed", store=False)
    assert [await desk.count(table) for table in ("responses", "journal", "items")] == [0, 0, 0]


async def test_what_a_backend_remembers_is_kept_on_the_session(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1", memory=b'{"id":"up_1"}')
    await desk.turn(await desk.session(), "b", "2")
    thread = await desk.thread()
    assert thread is not None and thread.memory == b'{"id":"up_1"}'


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_items_keep_their_payload_to_the_byte(desk: Desk, status: str) -> None:
    payload = b'{"z":1,"a":"\\u0000 \xf0\x9f\x98\x80","n":1.0,"type":"message","content":"x"}'
    item = replace(desk.item("x"), payload=payload)
    placement = desk.chain()
    response_id = await desk.begin(placement)
    ending = Ending(status, [item, item], [item])
    await desk.database.submit(end(response_id, desk.owner, placement, ending))
    row = await desk.row(response_id)
    if row.branch_id is None:
        assert (row.input, row.output) == (b"[" + payload + b"," + payload + b"]", b"[" + payload + b"]")
    else:
        async with desk.database.reading() as connection:
            assert await read_payloads(connection, row.branch_id, 0, 3) == [payload] * 3


# Where a turn's items go.


async def test_a_chain_goes_on_on_its_branch(desk: Desk) -> None:
    response_id = await desk.turn(desk.chain(), "0", "0")
    for number in "123":
        response_id = await desk.turn(await desk.after(response_id), number, number)
    assert await desk.lineage(response_id) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert (await desk.count("branches"), await desk.count("items"), await desk.count("threads")) == (1, 8, 0)


async def test_a_second_child_of_a_response_gets_a_branch_of_its_own(desk: Desk) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    children = [await desk.turn(await desk.after(root), text, text.upper()) for text in ("b", "c", "d")]
    assert [await desk.lineage(child) for child in children] == [
        ["a", "1", "b", "B"],
        ["a", "1", "c", "C"],
        ["a", "1", "d", "D"],
    ]
    assert await desk.lineage(root) == ["a", "1"]
    assert (await desk.count("branches"), await desk.count("items")) == (3, 8)
    assert [await own_items(desk, child) for child in children] == [
        (["b"], ["B"]),
        (["c"], ["C"]),
        (["d"], ["D"]),
    ]


@pytest.mark.parametrize("together", [False, True], ids=["one after the other", "in one transaction"])
async def test_children_that_run_side_by_side_each_get_their_branch(desk: Desk, together: bool) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    places = [await desk.after(root) for _ in range(3)]
    ids = [await desk.begin(place, previous_response_id=root) for place in places]
    units = [desk.ending(id, place, [str(at)], []) for at, (id, place) in enumerate(zip(ids, places, strict=True))]
    if together:
        await asyncio.gather(*map(desk.database.submit, units))
    else:
        for unit in units:
            await desk.database.submit(unit)
    assert [await desk.lineage(id) for id in ids] == [["a", "1", "0"], ["a", "1", "1"], ["a", "1", "2"]]
    assert len({(await desk.row(id)).branch_id for id in ids}) == 3


async def test_children_that_end_in_two_workers_each_get_their_branch(desk: Desk, other_desk: Desk) -> None:
    root = await desk.turn(desk.chain(), "a", "1")
    ids, futures = [], []
    for worker in (desk, other_desk):
        place = await worker.after(root)
        ids.append(await worker.begin(place))
        futures.append((worker, worker.ending(ids[-1], place, [worker.owner.name], [])))
    await asyncio.gather(*(worker.database.submit(unit) for worker, unit in futures))
    assert [await desk.lineage(id) for id in ids] == [["a", "1", "worker 0"], ["a", "1", "worker 1"]]


async def test_a_session_that_was_rewritten_goes_on_on_a_new_branch(desk: Desk) -> None:
    """Compaction, an edit or a rollback: the turn is placed below the branch's head."""
    await desk.turn(await desk.session(), "a", "1")
    old = await desk.turn(await desk.session(), "b", "2")
    await desk.turn(replace(await desk.session(), position=2, first=0), "b edited", "3")
    assert await desk.history() == ["a", "1", "b edited", "3"]
    assert await desk.lineage(old) == ["a", "1", "b", "2"]
    await desk.turn(replace(await desk.session(), position=0, first=0), "summary", "4")
    await desk.turn(await desk.session(), "c", "5")
    assert await desk.history() == ["summary", "4", "c", "5"]
    assert await desk.count("items") == 2 + 2 + 2 + 2 + 2


async def test_a_rewritten_turn_that_fails_leaves_the_old_branch_active(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    await desk.turn(replace(await desk.session(), position=0), "summary", "half", status="failed")
    assert await desk.history() == ["a", "1"]
    assert await desk.count("branches") == 1


async def test_a_session_may_begin_in_the_middle_of_another(desk: Desk) -> None:
    for text in "ab":
        await desk.turn(await desk.session("parent"), text, text.upper())
    parent = await desk.thread("parent")
    assert parent is not None
    place = replace(await desk.session("child"), branch_id=parent.active_branch, position=2)
    await desk.turn(place, "c", "C")
    await desk.turn(await desk.session("child"), "d", "D")
    await desk.turn(await desk.session("parent"), "e", "E")
    assert await desk.history("child") == ["a", "A", "c", "C", "d", "D"]
    assert await desk.history("parent") == ["a", "A", "b", "B", "e", "E"]
    assert await desk.count("items") == 10


async def test_a_session_may_go_on_from_a_response_of_another_thread(desk: Desk) -> None:
    elsewhere = await desk.turn(desk.chain(), "x", "X")
    await desk.turn(await desk.session(), "a", "A")
    row = await desk.row(elsewhere)
    place = replace(await desk.session(), branch_id=row.branch_id or "", position=row.stop or 0)
    await desk.turn(place, "y", "Y")
    assert await desk.history() == ["x", "X", "y", "Y"]
    assert await desk.lineage(elsewhere) == ["x", "X"]
    thread = await desk.thread()
    assert thread is not None and thread.active_branch == place.new_branch


async def test_a_child_from_outside_does_not_move_the_session(desk: Desk) -> None:
    last = await desk.turn(await desk.session(), "a", "1")
    child = await desk.turn(await desk.after(last), "b", "2")
    assert await desk.history() == ["a", "1"]
    assert await desk.lineage(child) == ["a", "1", "b", "2"]
    grandchild = await desk.turn(await desk.after(child), "c", "3")
    await desk.turn(await desk.session(), "d", "4")
    assert await desk.history() == ["a", "1", "d", "4"]
    assert await desk.lineage(grandchild) == ["a", "1", "b", "2", "c", "3"]
    assert (await desk.count("branches"), await desk.count("items")) == (2, 8)


async def test_a_session_whose_first_turn_failed_has_nothing_of_what_it_began_from(desk: Desk) -> None:
    elsewhere = await desk.turn(desk.chain(), "x", "X")
    row = await desk.row(elsewhere)
    place = replace(await desk.session(), branch_id=row.branch_id or "", position=2)
    await desk.turn(place, "y", "half", status="failed")
    assert await desk.history() == []
    await desk.turn(await desk.session(), "a", "1")
    assert await desk.history() == ["a", "1"]


async def test_a_turn_whose_branch_is_gone_is_refused(desk: Desk) -> None:
    placement = replace(desk.chain(), branch_id="no such branch", position=2)
    response_id = await desk.begin(placement)
    with pytest.raises(StaleWriter):
        await desk.end(response_id, placement, ["a"], ["1"])
    assert (await desk.row(response_id)).running


# Fencing.


def writes(desk: Desk, response_id: str, placement: Placement) -> dict[str, Any]:
    return {
        "journal": append_journal(response_id, desk.owner, "", Entry(0, 1, b"[]")),
        "end": desk.ending(response_id, placement, ["a"], ["1"]),
        "end unstored": desk.ending(response_id, placement, ["a"], ["1"], store=False),
    }


@pytest.mark.parametrize("write", ["journal", "end", "end unstored"])
async def test_a_run_that_was_taken_over_writes_nothing_more(desk: Desk, write: str) -> None:
    placement = await desk.session()
    response_id = await desk.begin(placement)
    another = await taken_over(desk, response_id)
    with pytest.raises(StaleWriter):
        await desk.database.submit(writes(desk, response_id, placement)[write])
    assert (await desk.row(response_id)).running
    assert [await desk.count(table) for table in ("items", "journal")] == [0, 0]
    await desk.end(response_id, placement, ["a"], ["2"], owner=another)
    assert await desk.history() == ["a", "2"]


@pytest.mark.parametrize("status", ["completed", "failed"])
@pytest.mark.parametrize("write", ["journal", "end", "end unstored"])
async def test_a_response_that_has_ended_is_written_no_more(desk: Desk, write: str, status: str) -> None:
    placement = desk.chain()
    response_id = await desk.turn(placement, "a", "1", status=status)
    before = await desk.row(response_id)
    with pytest.raises(StaleWriter):
        await desk.database.submit(writes(desk, response_id, placement)[write])
    assert await desk.row(response_id) == before
    assert await desk.count("journal") == 0


@pytest.mark.parametrize("write", ["journal", "end", "end unstored"])
async def test_a_response_that_never_began_is_not_written(desk: Desk, write: str) -> None:
    placement = desk.chain()
    with pytest.raises(StaleWriter):
        await desk.database.submit(writes(desk, "resp_unknown", placement)[write])
    assert [await desk.count(table) for table in ("responses", "items", "journal")] == [0, 0, 0]


@pytest.mark.parametrize("store", [True, False])
async def test_of_two_endings_in_one_transaction_one_counts(desk: Desk, store: bool) -> None:
    await desk.turn(await desk.session(), "a", "1")
    placement = await desk.session()
    response_id = await desk.begin(placement, store=store)
    endings = [desk.ending(response_id, placement, ["b"], [text], store=store) for text in "23"]
    assert await outcomes([desk.database.submit(unit) for unit in endings]) == [None, StaleWriter]
    assert await desk.history() == ["a", "1", "b", "2"]
    assert (await desk.count("items"), await desk.count("branches")) == (4, 1)


async def test_who_takes_over_a_session_turn_gives_the_session_back(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    placement = await desk.session()
    response_id = await desk.begin(placement, input=b'[{"content":"b"}]')
    another = await taken_over(desk, response_id)
    await desk.end(response_id, placement, ["b"], ["half"], status="failed", owner=another)
    thread = await desk.thread()
    assert thread is not None and thread.running is None
    assert await desk.history() == ["a", "1"]


async def test_a_late_end_neither_frees_nor_moves_a_session_that_is_anothers_now(desk: Desk) -> None:
    """Its lease ran out, the next turn has the session, and nobody has closed it yet."""
    await desk.turn(await desk.session(), "a", "1")
    late_place = await desk.session()
    late = await desk.begin(late_place)
    desk.clock.now += LEASE + 1
    place = await desk.session()
    second = await desk.begin(place)
    await desk.end(late, late_place, ["late"], ["x"])
    thread = await desk.thread()
    assert thread is not None and thread.running == second
    await desk.end(second, place, ["b"], ["2"])
    assert await desk.history() == ["a", "1", "b", "2"]
    assert await desk.lineage(late) == ["a", "1", "late", "x"]


async def test_a_later_end_than_its_successors_does_not_change_the_session(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    late_place = await desk.session()
    late = await desk.begin(late_place)
    desk.clock.now += LEASE + 1
    await desk.turn(await desk.session(), "b", "2")
    await desk.end(late, late_place, ["late"], ["x"])
    assert await desk.history() == ["a", "1", "b", "2"]
    assert await desk.lineage(late) == ["a", "1", "late", "x"]


async def test_a_late_end_of_a_sessions_first_turn_is_kept_beside_what_came_instead(desk: Desk) -> None:
    late_place = await desk.session()
    late = await desk.begin(late_place)
    desk.clock.now += LEASE + 1
    await desk.turn(await desk.session(), "b", "2")
    await desk.end(late, late_place, ["late"], ["x"])
    assert await desk.history() == ["b", "2"]
    assert await desk.lineage(late) == ["late", "x"]
