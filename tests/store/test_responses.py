"""Reading responses: for their tenant alone, and as they were made."""

import asyncio
from dataclasses import replace
from typing import Any

import orjson
import pytest
from sqlalchemy import select, update

from responses_ingress.core.deltas import Accepted, Delta, Open, Part, Text, encode
from responses_ingress.core.envelope import open_envelope, reduce, split_repeated
from responses_ingress.core.replay import PORTION, fold
from responses_ingress.core.request import parse_request
from responses_ingress.errors import NotFound
from responses_ingress.store.responses import (
    envelope_at_creation,
    envelope_of,
    fold_journal,
    load,
    read_input,
    read_output,
)
from responses_ingress.store.tables import items
from responses_ingress.store.turns import end
from responses_ingress.store.values import Ending, Entry
from tests.store.desk import NOW, Desk


async def test_a_response_is_found_by_its_tenant_and_by_nobody_else(desk: Desk) -> None:
    mine = await desk.turn(desk.chain("me"), "a", "1")
    assert (await desk.row(mine, "me")).tenant == "me"
    for tenant in ("you", "", "ME"):
        assert await desk.find(mine, tenant) is None
        assert await desk.find("resp_unknown", tenant) is None


async def test_the_same_session_name_is_another_thread_for_another_tenant(desk: Desk) -> None:
    await desk.turn(await desk.session("s", "me"), "mine", "1")
    await desk.turn(await desk.session("s", "you"), "yours", "2")
    assert await desk.history("s", "me") == ["mine", "1"]
    assert await desk.history("s", "you") == ["yours", "2"]


@pytest.mark.parametrize("lingers", [False, True])
@pytest.mark.parametrize("status", ["completed", "failed", "in_progress"])
async def test_what_is_not_stored_is_never_found(desk: Desk, status: str, lingers: bool) -> None:
    placement = await desk.session()
    response_id = await desk.begin(placement, store=False)
    if status != "in_progress":
        await desk.end(response_id, placement, ["a"], ["1"], status=status, store=False, lingers=lingers)
    assert await desk.find(response_id) is None
    assert await desk.delete(response_id) is False


async def test_what_ran_in_the_background_is_found_until_it_expires_though_it_is_not_stored(desk: Desk) -> None:
    placement = desk.chain("me")
    response_id = await desk.begin(placement, store=False, background=True)
    assert (await desk.row(response_id, "me")).running
    await desk.end(response_id, placement, ["a"], ["1"], store=False, lingers=True)
    assert (await desk.row(response_id, "me")).status == "completed"
    assert await desk.find(response_id, "you") is None


async def test_the_program_itself_finds_any_response(desk: Desk) -> None:
    stored = await desk.turn(desk.chain("me"), "a", "1")
    unstored = await desk.begin(await desk.session("s", "you"), store=False)
    async with desk.database.reading() as connection:
        found = await load(connection, [stored, "resp_unknown", unstored])
        assert await load(connection, []) == []
    assert {(row.id, row.tenant, row.status) for row in found} == {
        (stored, "me", "completed"),
        (unstored, "you", "in_progress"),
    }


async def test_an_id_that_no_database_can_hold_is_unknown(desk: Desk) -> None:
    assert await desk.find("resp_\0") is None


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
    assert envelope_of(await desk.row(new.id)) == envelope_at_creation(await desk.row(new.id)) == made
    usage = {"input_tokens": 1}
    ending = Ending(
        "incomplete",
        desk.items("a"),
        [desk.item("1", "assistant")],
        echo=orjson.dumps({"service_tier": "flex"}),
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
    assert envelope_at_creation(await desk.row(new.id)) == made


@pytest.mark.parametrize(("background", "status"), [(True, "queued"), (False, "in_progress")])
async def test_a_response_was_created_in_the_status_its_stream_begins_with(
    desk: Desk, background: bool, status: str
) -> None:
    running = await desk.begin(desk.chain(), background=background)
    row = await desk.row(running)
    assert (envelope_at_creation(row)["status"], envelope_of(row)["status"]) == (status, "in_progress")


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


IDS = ["x", "y", "x", "z", "x"]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("after", "most", "oldest", "newest"),
    [
        (None, None, "abcde", "edcba"),
        (None, 2, "ab", "ed"),
        (None, 9, "abcde", "edcba"),
        ("y", None, "cde", "a"),
        ("y", 2, "cd", "a"),
        ("z", 2, "e", "cb"),
        ("x", None, "", ""),
    ],
)
async def test_input_is_read_in_pages_and_behind_the_last_item_of_an_id(
    desk: Desk, ended: bool, after: str | None, most: int | None, oldest: str, newest: str
) -> None:
    before = await desk.turn(desk.chain(), "before", "1")
    placement = await desk.after(before)
    given = [{"id": id, "type": "message", "content": text} for id, text in zip(IDS, "abcde", strict=True)]
    response_id = await desk.begin(placement, input=orjson.dumps(given))
    if ended:
        await desk.end(response_id, placement, list("abcde"), ["2"])
        row = await desk.row(response_id)
        async with desk.database.transaction() as connection:
            for number, id in enumerate(IDS):
                here = (items.c.branch_id == row.branch_id) & (items.c.position == row.first + number)
                await connection.execute(update(items).where(here).values(item_id=id))
    row = await desk.row(response_id)
    async with desk.database.reading() as connection:
        for newest_first, expected in ((False, oldest), (True, newest)):
            found = await read_input(connection, row, after=after, most=most, newest_first=newest_first)
            assert [item["content"] for item in found] == list(expected)
        for unknown in ("w", "", "\0"):
            with pytest.raises(NotFound):
                await read_input(connection, row, after=unknown)


async def test_of_the_input_no_more_is_read_than_the_page(desk: Desk) -> None:
    placement = desk.chain()
    response_id = await desk.begin(placement)
    await desk.end(response_id, placement, list("abcde"), ["1"])
    async with desk.database.transaction() as connection:
        await connection.execute(update(items).where(items.c.position.not_in([1, 2])).values(payload=b"no JSON"))
    row = await desk.row(response_id)
    async with desk.database.reading() as connection:
        (item_id,) = (await connection.execute(select(items.c.item_id).where(items.c.position == 3))).scalars()
        found = await read_input(connection, row, after=item_id, most=2, newest_first=True)
    assert [item["content"] for item in found] == ["c", "b"]


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


async def test_a_long_journal_is_folded_in_turn_with_everybody_else(desk: Desk) -> None:
    row = await desk.row(await desk.begin(desk.chain()))
    deltas: list[Delta] = [
        Accepted(),
        Open(0, {"id": "msg_1", "type": "message", "content": []}),
        Part(0, "output_text"),
    ]
    entries = [Entry(0, 5, encode(deltas)), Entry(5, 10 * PORTION, encode([Text(0, "a")] * (10 * PORTION)))]
    folding = asyncio.create_task(fold_journal(row, entries))
    turns = 0
    while not folding.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    builder = folding.result()
    assert builder.response() == fold(envelope_at_creation(row), [entry.payload for entry in entries]).response()
    assert builder.output[0]["content"][0]["text"] == "a" * 10 * PORTION
