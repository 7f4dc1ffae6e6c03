"""Reading and deleting responses: for their tenant alone, and so that nobody's history breaks."""

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest

from responses_ingress.core.envelope import open_envelope, reduce, split_repeated
from responses_ingress.core.request import parse_request
from responses_ingress.errors import InvalidRequest
from responses_ingress.store.responses import (
    delete_response,
    envelope_of,
    find_expired,
    find_response,
    read_input,
    read_journal,
    read_output,
)
from responses_ingress.store.turns import append_journal, end
from responses_ingress.store.values import Ending
from tests.store.desk import LEASE, NOW, Desk


async def rows(desk: Desk) -> dict[str, int]:
    return {table: await desk.count(table) for table in ("responses", "items", "journal")}


# Finding.


async def test_a_response_is_found_by_its_tenant_and_by_nobody_else(desk: Desk) -> None:
    mine = await desk.turn(desk.chain("me"), "a", "1")
    assert (await desk.row(mine, "me")).tenant == "me"
    for tenant in ("you", "", "ME"):
        assert await desk.find(mine, tenant) is None
        assert await desk.find("resp_unknown", tenant) is None


async def test_another_tenants_response_cannot_be_deleted_and_is_as_unknown_as_any(desk: Desk) -> None:
    mine = await desk.turn(desk.chain("me"), "a", "1")
    running = await desk.begin(desk.chain("me"))
    for id in (mine, running, "resp_unknown"):
        assert await desk.delete(id, "you") is False
    assert await desk.lineage(mine, "me") == ["a", "1"]


async def test_the_same_session_name_is_another_thread_for_another_tenant(desk: Desk) -> None:
    await desk.turn(await desk.session("s", "me"), "mine", "1")
    await desk.turn(await desk.session("s", "you"), "yours", "2")
    assert await desk.history("s", "me") == ["mine", "1"]
    assert await desk.history("s", "you") == ["yours", "2"]


@pytest.mark.parametrize("status", ["completed", "failed", "in_progress"])
async def test_what_is_not_stored_is_never_found(desk: Desk, status: str) -> None:
    placement = await desk.session()
    response_id = await desk.begin(placement, store=False)
    if status != "in_progress":
        await desk.end(response_id, placement, ["a"], ["1"], status=status, store=False)
    assert await desk.find(response_id) is None
    assert await desk.delete(response_id) is False


async def test_the_response_object_comes_back_as_it_was_made(desk: Desk) -> None:
    body: dict[str, Any] = {
        "model": "gpt",
        "input": "a",
        "instructions": "be nice",
        "tools": [{"type": "function", "name": "f"}],
        "temperature": 0,
        "metadata": {"k": "v"},
    }
    placement = desk.chain()
    new = desk.new(placement, model="gpt")
    made = open_envelope(parse_request(body), new.id, int(NOW))
    rest, repeated = split_repeated(reduce(made))
    facts = {"id": new.id, "model": "gpt", "envelope": orjson.dumps(rest)}
    await desk.begin(placement, **facts, preamble=(b"digest", orjson.dumps(repeated)))
    assert envelope_of(await desk.row(new.id)) == made
    usage = {"input_tokens": 1}
    ending = Ending(
        "incomplete",
        orjson.dumps(rest | {"service_tier": "flex"}),
        desk.items("a"),
        [desk.item("1", "assistant")],
        usage=orjson.dumps(usage),
        incomplete="max_output_tokens",
        completed_at=None,
    )
    await desk.database.submit(end(new.id, desk.owner, placement, ending))
    assert envelope_of(await desk.row(new.id)) == made | {
        "status": "incomplete",
        "service_tier": "flex",
        "usage": usage,
        "incomplete_details": {"reason": "max_output_tokens"},
    }


async def test_a_failed_response_says_why(desk: Desk) -> None:
    error = {"code": "upstream_error", "message": "It broke."}
    failed = await desk.turn(desk.chain(), "a", "1", status="failed", error=orjson.dumps(error), completed_at=None)
    envelope = envelope_of(await desk.row(failed))
    assert (envelope["status"], envelope["error"], envelope["usage"], envelope["completed_at"]) == (
        "failed",
        error,
        None,
        None,
    )


async def test_input_and_output_are_the_responses_own(desk: Desk) -> None:
    first = await desk.turn(desk.chain(), "a", "1")
    second = await desk.turn(await desk.after(first), "b", "2")
    row = await desk.row(second)
    async with desk.database.reading() as connection:
        assert [item["content"] for item in await read_input(connection, row)] == ["b"]
        assert [item["content"] for item in await read_output(connection, row)] == ["2"]


async def test_the_input_of_a_running_response_can_be_read_and_its_output_is_empty(desk: Desk) -> None:
    running = await desk.begin(desk.chain(), input=b'[{"type":"message","content":"a"}]')
    row = await desk.row(running)
    async with desk.database.reading() as connection:
        assert await read_input(connection, row) == [{"type": "message", "content": "a"}]
        assert await read_output(connection, row) == []


async def test_a_client_that_sent_its_history_gets_all_of_it_as_input(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    second = await desk.turn(replace(await desk.session(), first=0), "b", "2")
    row = await desk.row(second)
    async with desk.database.reading() as connection:
        assert [item["content"] for item in await read_input(connection, row)] == ["a", "1", "b"]
        assert [item["content"] for item in await read_output(connection, row)] == ["2"]


async def test_expired_responses_come_whatever_their_tenant_and_store(desk: Desk) -> None:
    ids = {await desk.begin(desk.chain("me")), await desk.begin(await desk.session("s", "you"), store=False)}
    desk.clock.now += LEASE
    async with desk.database.reading() as connection:
        assert await find_expired(connection, desk.clock()) == []
        found = await find_expired(connection, desk.clock() + 1)
    assert {row.id for row in found} == ids
    assert {(row.tenant, row.store, row.epoch) for row in found} == {("me", True, 1), ("you", False, 1)}


# Deleting.


async def test_a_deleted_response_is_gone_with_its_items_and_its_journal(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement)
    await desk.journal(response_id, 0)
    await desk.end(response_id, placement, ["a"], ["1"], journaled=False)
    assert await rows(desk) == {"responses": 1, "items": 2, "journal": 1}
    assert await desk.delete(response_id) is True
    assert await desk.find(response_id) is None
    assert await rows(desk) == {"responses": 0, "items": 0, "journal": 0}
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
    await desk.database.submit(append_journal(running, desk.owner, "", (0, 1, b"[]")))
    with pytest.raises(InvalidRequest) as caught:
        await desk.delete(running)
    assert (caught.value.status, caught.value.message) == (400, "Cannot delete an in-flight response.")
    assert (await desk.row(running)).running
    async with desk.database.reading() as connection:
        assert await read_journal(connection, running) == [b"[]"]


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


async def test_the_last_turn_of_a_session_takes_its_items_with_it(desk: Desk) -> None:
    await desk.turn(await desk.session(), "a", "1")
    last = await desk.turn(await desk.session(), "b", "2")
    assert await desk.delete(last)
    thread = await desk.thread()
    assert thread is not None and thread.head == 2
    assert await desk.history() == ["a", "1"]
    await desk.turn(await desk.session(), "c", "3")
    assert await desk.history() == ["a", "1", "c", "3"]


async def test_a_middle_turn_of_a_session_leaves_its_items(desk: Desk) -> None:
    first = await desk.turn(await desk.session(), "a", "1")
    await desk.turn(await desk.session(), "b", "2", store=False)
    assert await desk.delete(first)
    assert await desk.history() == ["a", "1", "b", "2"]


async def test_two_that_delete_the_same_response_agree_that_it_is_gone(desk: Desk, other_desk: Desk) -> None:
    response_id = await desk.turn(desk.chain(), "a", "1")
    results = await asyncio.gather(desk.delete(response_id), other_desk.delete(response_id))
    assert True in results
    assert await rows(desk) == {"responses": 0, "items": 0, "journal": 0}
