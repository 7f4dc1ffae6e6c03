"""Responses in the background: begun at once, waiting in the queue, run by whoever has room."""

import asyncio
from typing import Any

import orjson
import pytest

from responses_ingress.core.deltas import Accepted, Text
from responses_ingress.core.request import Caller
from responses_ingress.errors import InvalidRequest, PreviousNotFound, QueueFull, UpstreamError
from responses_ingress.runs.run import Run
from responses_ingress.runs.runner import Limits
from responses_ingress.runs.tail import Tail
from responses_ingress.testing import ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import SESSION, Stage, events_of, output_text, parsed, staged, until

CROWDED = Limits(max_background=1, max_queued=1)


async def queued(stage: Stage, text: str = "waits", **fields: Any) -> Tail:
    """Ask for a background response that cannot begin at once."""
    waiting = await stage.ask(text, background=True, **fields)
    assert isinstance(waiting, Tail)
    return waiting


async def test_a_background_response_begins_at_once_and_is_queued_until_its_backend_has_accepted(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(hold, *spoken("hi"), background=True)
    assert (run.response()["status"], run.response()["output"]) == ("queued", [])
    await stage.backend.called(1)
    hold.set()
    events = await events_of(run)
    check_stream(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]


async def test_what_another_process_would_need_is_kept_until_the_end_and_no_key_with_it(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(hold, *spoken("hi"), background=True, caller=Caller(bearer="their key"), temperature=0.5)
    packed = stage.row(run.id)["request"]
    assert orjson.loads(packed)["body"]["temperature"] == 0.5
    assert b"their key" not in packed
    hold.set()
    await run.ended
    assert stage.row(run.id)["request"] is None


async def test_a_background_run_goes_on_when_nobody_follows(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(disconnect_grace=0)) as stage:
        hold = asyncio.Event()
        run = await stage.play(opened(), hold, [Text(0, "whole")], ended(), background=True)
        with run.follow():
            await stage.backend.called(1)
        hold.set()
        await run.ended
        assert output_text(run.response()) == "whole"


async def test_more_than_a_process_runs_at_a_time_wait_and_run_in_their_order(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_background=1)) as stage:
        hold = asyncio.Event()
        first = await stage.play(hold, *spoken("1"), background=True)
        stage.backend.script(spoken("2"), spoken("3"))
        waiting = [await queued(stage, text) for text in ("two", "three")]
        assert [stage.row(one.id)["status"] for one in waiting] == ["queued", "queued"]
        assert [stage.row(one.id)["owner"] for one in waiting] == [None, None]
        hold.set()
        await first.ended
        await until(lambda: all(stage.row(one.id)["status"] == "completed" for one in waiting))
        asked = [call.turn.new[0]["content"][0]["text"] for call in stage.backend.calls]
        assert asked == ["hi", "two", "three"]


async def test_one_that_waits_is_followed_from_its_creation_to_its_end(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_background=1)) as stage:
        hold = asyncio.Event()
        await stage.play(hold, *spoken("1"), background=True)
        stage.backend.script(spoken("two"))
        waiting = await queued(stage)
        with waiting.follow() as follower:
            hold.set()
            await follower.end()
        events = parsed(waiting.feed.events)
        check_stream(events)
        assert events == stage.replayed(waiting.id)
        assert output_text(events[-1]["response"]) == "two"


async def test_a_full_queue_refuses_and_leaves_no_row(migrated_database: str) -> None:
    async with staged(migrated_database, CROWDED) as stage:
        await stage.play(asyncio.Event(), background=True)
        await queued(stage)
        with pytest.raises(QueueFull) as refused:
            await stage.ask(background=True)
        assert (refused.value.status, refused.value.retry_after) == (429, 5)
        assert len(stage.rows("SELECT id FROM responses")) == 2


async def test_a_child_of_a_running_response_waits_for_it(stage: Stage) -> None:
    hold = asyncio.Event()
    parent = await stage.play(opened(), hold, [Text(0, "first")], ended(), background=True)
    stage.backend.script(spoken("second"))
    child = await queued(stage, previous_response_id=parent.id)
    assert child.row.thread_id == parent.thread_id
    hold.set()
    await until(lambda: stage.row(child.id)["status"] == "completed")
    assert [item["role"] for item in stage.backend.calls[1].turn.items] == ["user", "assistant", "user"]


async def test_a_child_whose_parent_failed_fails_and_says_why(stage: Stage) -> None:
    hold = asyncio.Event()
    parent = await stage.play(hold, UpstreamError("No."), background=True)
    child = await queued(stage, previous_response_id=parent.id)
    hold.set()
    await until(lambda: stage.row(child.id)["status"] == "failed")
    assert orjson.loads(stage.row(child.id)["error"])["code"] == "previous_response_not_completed"
    check_stream(stage.replayed(child.id))


async def test_a_child_of_nothing_is_refused_before_it_waits(migrated_database: str) -> None:
    async with staged(migrated_database, CROWDED) as stage:
        await stage.play(asyncio.Event(), background=True)
        with pytest.raises(PreviousNotFound):
            await stage.ask(background=True, previous_response_id="resp_none")


async def test_a_turn_of_a_busy_session_waits_for_the_thread(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(hold, *spoken("one"), caller=SESSION)
    with first.follow():
        stage.backend.script(spoken("two"))
        second = await queued(stage, caller=SESSION)
        hold.set()
        await until(lambda: stage.row(second.id)["status"] == "completed")
    assert [item["role"] for item in stage.backend.calls[1].turn.items] == ["user", "assistant", "user"]
    assert stage.thread()["running"] is None


async def test_another_process_runs_what_waits(migrated_database: str) -> None:
    async with staged(migrated_database, CROWDED) as full, staged(migrated_database, seed=2) as free:
        await full.play(asyncio.Event(), background=True)
        free.backend.script(spoken("done elsewhere"))
        waiting = await queued(full, instructions="Be brief.", temperature=0.5)
        with waiting.follow() as follower:
            await follower.end()
        turn = free.backend.calls[0].turn
        assert (turn.response_id, turn.instructions, turn.parameters["temperature"]) == (waiting.id, "Be brief.", 0.5)
        events = parsed(waiting.feed.events)
        check_stream(events)
        assert output_text(waiting.response()) == "done elsewhere"


async def test_of_two_processes_with_room_one_runs_it(migrated_database: str) -> None:
    async with (
        staged(migrated_database, Limits(max_background=1)) as full,
        staged(migrated_database, seed=2) as one,
        staged(migrated_database, seed=3) as other,
    ):
        await full.play(asyncio.Event(), background=True)
        for stage in (one, other):
            stage.backend.script(*[spoken("hi")] * 8)
        waiting = [await queued(full) for _ in range(8)]
        await until(lambda: all(full.row(tail.id)["status"] == "completed" for tail in waiting))
        assert len(one.backend.calls) + len(other.backend.calls) == 8


async def test_input_items_keep_their_ids_from_the_queue_to_the_branch(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_background=1)) as stage:
        hold = asyncio.Event()
        await stage.play(hold, *spoken("1"), background=True)
        stage.backend.script(spoken("2"))
        waiting = await queued(stage)
        before = [item["id"] for item in orjson.loads(stage.row(waiting.id)["input"])]
        hold.set()
        await until(lambda: stage.row(waiting.id)["status"] == "completed")
        branch = stage.row(waiting.id)["branch_id"]
        after = stage.rows("SELECT item_id FROM items WHERE branch_id = ? ORDER BY position", branch)
        assert [row["item_id"] for row in after][:1] == before


# Cancelling.


async def test_a_running_one_is_cancelled_and_its_backend_with_it(stage: Stage) -> None:
    run = await stage.play(opened(), asyncio.Event(), background=True)
    await stage.backend.called(1)
    row = await stage.runner.cancel("", run.id)
    assert row is not None and row.status == "cancelled"
    assert stage.backend.calls[0].cut
    events = await events_of(run)
    check_stream(events)
    assert (events[-1]["type"], events[-1]["response"]["output"]) == ("response.failed", [])
    again = await stage.runner.cancel("", run.id)
    assert again is not None and again.status == "cancelled"


async def test_one_that_waits_is_cancelled_and_never_runs(migrated_database: str) -> None:
    async with staged(migrated_database, CROWDED) as stage:
        hold = asyncio.Event()
        first = await stage.play(hold, *spoken("hi"), background=True)
        waiting = await queued(stage)
        row = await stage.runner.cancel("", waiting.id)
        assert row is not None and row.status == "cancelled"
        check_stream(stage.replayed(waiting.id))
        hold.set()
        await first.ended
        assert len(stage.backend.calls) == 1
        assert orjson.loads(stage.row(waiting.id)["input"])[0]["content"][0]["text"] == "waits"


async def test_one_that_another_process_runs_is_cancelled_there(migrated_database: str) -> None:
    async with staged(migrated_database) as there, staged(migrated_database, seed=2) as here:
        run = await there.play([Accepted()], asyncio.Event(), background=True)
        await there.backend.called(1)
        row = await here.runner.cancel("", run.id)
        assert row is not None and row.status == "cancelled"
        assert run.status == "cancelled"
        assert there.backend.calls[0].cut


async def test_what_is_over_is_not_cancelled_any_more(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), background=True)
    await run.ended
    row = await stage.runner.cancel("", run.id)
    assert row is not None and row.status == "completed"


async def test_what_is_not_in_the_background_cannot_be_cancelled(stage: Stage) -> None:
    run = await stage.play(asyncio.Event())
    await until(lambda: run.feed.events)
    with pytest.raises(InvalidRequest, match="Cannot cancel a synchronous response"):
        await stage.runner.cancel("", run.id)
    assert not run.ended.done()


async def test_another_tenants_response_cannot_be_cancelled(stage: Stage) -> None:
    run = await stage.play(asyncio.Event(), background=True, caller=Caller(tenant="a"))
    assert await stage.runner.cancel("b", run.id) is None
    assert isinstance(run, Run) and not run.ended.done()
