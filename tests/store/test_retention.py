"""What is deleted: so that nothing stays that nobody needs, and nobody's history breaks."""

import asyncio
from dataclasses import replace

import pytest

from responses_ingress.errors import InvalidRequest
from responses_ingress.store.responses import find_response, read_journal
from responses_ingress.store.retention import delete_response
from responses_ingress.store.turns import append_journal
from responses_ingress.store.values import Entry
from tests.store.desk import Desk

NOTHING = {"responses": 0, "branches": 0, "items": 0, "journal": 0}


async def rows(desk: Desk) -> dict[str, int]:
    return {table: await desk.count(table) for table in NOTHING}


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
            assert await delete_response(connection, "", response_id)
            assert await find_response(connection, "", response_id) is None
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
