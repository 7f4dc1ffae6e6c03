"""One group of tests per law of the pump, as they are numbered at the head of runs/run.py."""

import asyncio
from collections.abc import Sequence

import orjson
import pytest

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Open, Part, Remember, Text
from responses_ingress.core.replay import fold
from responses_ingress.errors import Cancelled, UpstreamError
from responses_ingress.runs.run import Run
from responses_ingress.runs.runner import Limits
from responses_ingress.store.database import Database
from responses_ingress.store.queue import claim_left_behind
from responses_ingress.store.responses import envelope_of, find_response
from responses_ingress.store.values import Owner
from responses_ingress.testing import MESSAGE, ManualClock, Step, ended, opened, spoken
from tests.invariants import TERMINAL, check_stream
from tests.runs.stage import (
    SESSION,
    Json,
    Stage,
    events_of,
    locked,
    loop_turns,
    output_text,
    parsed,
    read_until,
    staged,
    taken,
    types,
    until,
)

DELTA = "response.output_text.delta"
DONE = "response.output_item.done"


# 1. A run is driven by nobody who reads it.


async def test_law_1_a_run_that_nobody_follows_ends_all_the_same(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"))
    check_stream(await events_of(run))
    assert stage.row(run.id)["status"] == "completed"


async def test_law_1_a_follower_that_leaves_is_by_itself_no_cancel(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), [Text(0, "one ")], hold, [Text(0, "two")], ended())
    with run.feed.follow() as follower:
        await read_until(follower, DELTA)
    hold.set()
    events = await events_of(run)
    check_stream(events)
    assert output_text(events[-1]["response"]) == "one two"


async def test_law_1_a_follower_that_does_not_read_holds_up_nothing(stage: Stage) -> None:
    run = await stage.play(*spoken(*["word "] * 500))
    with run.feed.follow() as follower:
        await run.ended
        assert parsed(await follower.next(1))[0]["type"] == "response.created"


# 2. Commit before publish.


async def test_law_2_created_leaves_only_when_its_row_is_committed(stage: Stage) -> None:
    hold = asyncio.Event()
    async with locked(stage.url):
        run = await stage.play(hold, *spoken("hi"))
        await stage.backend.called(1)  # the backend does not wait for the commit
        await loop_turns()
        assert types(run) == []
    with run.feed.follow() as follower:
        await read_until(follower, "response.created")
        assert stage.row(run.id)["status"] == "in_progress"
    hold.set()
    await run.ended


async def test_law_2_text_may_run_ahead_of_its_commit(unhurried: Stage) -> None:
    hold = asyncio.Event()
    run = await unhurried.play(opened(), hold, [Text(0, "hi")], asyncio.Event())
    with run.feed.follow() as follower:
        await read_until(follower, "response.content_part.added")
        async with locked(unhurried.url):
            hold.set()
            await read_until(follower, DELTA)
        assert unhurried.journal(run.id) == []


async def test_law_2_text_is_committed_within_a_flush_interval(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(flush_interval=0.01)) as stage:
        run = await stage.play(opened(), [Text(0, "hi")], asyncio.Event())
        await until(lambda: types(run)[-1:] == [DELTA])
        await until(lambda: sum(row["count"] for row in stage.journal(run.id)) == len(run.feed.events))


async def test_law_2_the_end_of_an_item_leaves_only_when_it_is_committed(unhurried: Stage) -> None:
    hold = asyncio.Event()
    run = await unhurried.play(opened(), hold, [Text(0, "hi")], [Close(0)], asyncio.Event())
    with run.feed.follow() as follower:
        await read_until(follower, "response.content_part.added")
        async with locked(unhurried.url):
            hold.set()
            await until(lambda: run.response()["output"][0]["status"] == "completed")
            await loop_turns()
            assert types(run)[-1] == DELTA
        await read_until(follower, DONE)
    assert orjson.loads(unhurried.journal(run.id)[-1]["payload"])[-1] == ["c", 0, None]


async def test_law_2_nothing_slips_out_with_a_created_that_was_committed_already(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=SESSION)  # whose thread, and so whose row, it has by now
    async with locked(stage.url):
        await until(lambda: run.status == "completed" or run.response()["output"][:1])
        await loop_turns()
        assert not {DONE, *TERMINAL} & set(types(run))
    check_stream(await events_of(run))


@pytest.mark.parametrize(
    "last",
    [
        ended(),
        [Close(0), Finish("incomplete", reason="max_output_tokens")],
        [Finish("failed", error={"code": "server_error", "message": "It broke."})],
        UpstreamError("It broke."),
    ],
    ids=["completed", "incomplete", "failed", "raised"],
)
async def test_law_2_the_terminal_event_leaves_only_when_it_is_committed(unhurried: Stage, last: Step) -> None:
    hold = asyncio.Event()
    run = await unhurried.play(opened(), hold, last)
    await until(lambda: types(run)[-1:] == ["response.content_part.added"])
    async with locked(unhurried.url):
        hold.set()
        await until(lambda: run.status != "in_progress")
        await loop_turns()
        assert not set(TERMINAL) & set(types(run))
        assert unhurried.row(run.id)["status"] == "in_progress"
    with run.feed.follow() as follower:
        await read_until(follower, f"response.{run.status}")
        assert unhurried.row(run.id)["status"] == run.status


async def test_law_2_nothing_runs_ahead_where_the_flush_interval_is_zero(careful: Stage) -> None:
    hold = asyncio.Event()
    run = await careful.play(opened(), hold, [Text(0, "hi")], asyncio.Event())
    with run.feed.follow() as follower:
        await read_until(follower, "response.content_part.added")
        assert sum(row["count"] for row in careful.journal(run.id)) == len(run.feed.events)
        async with locked(careful.url):
            hold.set()
            await taken(run, "hi")
            await loop_turns()
            assert types(run)[-1] == "response.content_part.added"
        await read_until(follower, DELTA)
        assert sum(row["count"] for row in careful.journal(run.id)) == len(run.feed.events)


async def test_law_2_the_journal_tells_what_was_seen_event_for_event(careful: Stage) -> None:
    call = {"type": "function_call", "status": "in_progress", "name": "look", "call_id": "", "arguments": ""}
    run = await careful.play(
        opened(),
        [Text(0, "hi"), Close(0)],
        [Open(1, call), Text(1, "{"), Text(1, "}")],
        [Close(1)],
        asyncio.Event(),
        instructions="Be brief.",
    )
    await until(lambda: types(run).count(DONE) == 2)
    async with careful.database.reading() as connection:
        row = await find_response(connection, "", run.id, careful.clock())
    assert row is not None
    builder = fold(envelope_of(row), [entry["payload"] for entry in careful.journal(run.id)])
    assert parsed(builder.take()) == parsed(run.feed.events)
    assert run.response()["output"][1]["call_id"].startswith("call_")


@pytest.mark.parametrize(
    "flush_interval",
    [0.01, 0],
)
async def test_law_2_a_batch_that_makes_no_event_is_no_hindrance(migrated_database: str, flush_interval: float) -> None:
    async with staged(migrated_database, Limits(flush_interval=flush_interval)) as stage:
        hold = asyncio.Event()
        first, second = [Remember({"id": "u1"})], [Remember({"id": "u2"})]
        run = await stage.play(opened(), hold, first, second, [Text(0, "hi")], ended(), caller=SESSION)
        await until(lambda: stage.journal(run.id))
        hold.set()
        check_stream(await events_of(run))
        assert run.status == "completed"
        assert orjson.loads(stage.thread()["memory"]) == {"id": "u2"}


# 3. One ending.


async def test_law_3_the_ending_is_status_items_head_and_the_threads_release_at_once(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, [Text(0, "hi"), Remember({"id": "u1"}), *ended()], caller=SESSION)
    with run.feed.follow() as follower:
        await read_until(follower, "response.created")
        assert stage.thread()["running"] == run.id
        hold.set()
        await read_until(follower, "response.completed")
    row, thread = stage.row(run.id), stage.thread()
    assert (row["status"], row["completed_at"], row["owner"]) == ("completed", int(stage.clock()), None)
    assert (thread["running"], orjson.loads(thread["memory"])) == (None, {"id": "u1"})
    (branch,) = stage.rows("SELECT * FROM branches")
    assert (branch["id"], branch["head"]) == (thread["active_branch"], 2)
    items = [orjson.loads(item["payload"]) for item in stage.rows("SELECT payload FROM items ORDER BY position")]
    assert [item["role"] for item in items] == ["user", "assistant"]
    assert items[1] == run.response()["output"][0]
    assert stage.replayed(run.id) == parsed(run.feed.events)


async def test_law_3_an_ending_of_which_one_part_fails_leaves_nothing_of_itself(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(*spoken("hi")[:-1], hold, ended(), caller=SESSION)
    await taken(run, "hi")
    branch = stage.thread()["active_branch"]
    async with locked(stage.url) as connection:  # where the answer's own place is
        connection.execute("INSERT INTO items VALUES (?, 1, '', 'msg_x', 'message', ?, ?)", branch, b"0", b"0")
    hold.set()
    events = await events_of(run)
    assert [event["type"] for event in events if event["type"] in TERMINAL] == ["response.failed"]
    assert stage.row(run.id)["status"] == "in_progress"
    assert stage.thread()["running"] == run.id
    assert stage.rows("SELECT head FROM branches") == [{"head": 0}]


ENDINGS: Sequence[tuple[str, Sequence[Step], str, str | None]] = [
    ("completed", spoken("hi"), "completed", None),
    ("nothing said", [[Accepted()], [Finish("completed")]], "completed", None),
    ("incomplete", [opened(), [Finish("incomplete", reason="max_output_tokens")]], "incomplete", None),
    ("failed by the backend", [opened(), [Finish("failed", error={"code": "x", "message": "y"})]], "failed", "x"),
    ("refused", [UpstreamError("No.")], "failed", "upstream_error"),
    ("error after acceptance", [[Accepted()], UpstreamError("No.")], "failed", "upstream_error"),
    ("error inside a text", [opened(), [Text(0, "h")], UpstreamError("No.")], "failed", "upstream_error"),
    ("illegal delta", [opened(), [Text(7, "h")]], "failed", "upstream_invalid"),
    ("illegal beginning", [[Text(0, "h")]], "failed", "upstream_invalid"),
    ("illegal end", [opened(), [Finish("completed")]], "failed", "upstream_invalid"),
    ("truncated", [opened(), [Text(0, "h")]], "failed", "upstream_truncated"),
    ("silent", [], "failed", "upstream_truncated"),
    ("something unforeseen", [opened(), ValueError("secret")], "failed", "server_error"),
]


every_ending = pytest.mark.parametrize(
    ("script", "status", "code"), [case[1:] for case in ENDINGS], ids=[case[0] for case in ENDINGS]
)


@pytest.mark.parametrize("flush_interval", [0.1, 0])
@pytest.mark.parametrize("recorded", [True, False], ids=["stored", "not stored"])
@every_ending
async def test_law_3_every_path_has_exactly_one_terminal_event(
    migrated_database: str,
    script: Sequence[Step],
    status: str,
    code: str | None,
    recorded: bool,
    flush_interval: float,
) -> None:
    async with staged(migrated_database, Limits(flush_interval=flush_interval)) as stage:
        run = await stage.play(*script, store=recorded, caller=SESSION if recorded else None)
        events = await events_of(run)
        check_stream(events)
        response = events[-1]["response"]
        assert (response["status"], run.status) == (status, status)
        assert (response["error"] or {}).get("code") == code
        assert response == run.response()
        assert stage.backend.calls[0].over.is_set()
        assert_over(stage, run, recorded)


@every_ending
async def test_law_3_every_path_ends_a_response_that_nobody_streams(
    stage: Stage, script: Sequence[Step], status: str, code: str | None
) -> None:
    run = await stage.play(*script, stream=False, caller=SESSION)
    with run.feed.follow() as follower:
        await follower.end()
    await loop_turns()
    assert run.response()["status"] == status
    assert (run.response()["error"] or {}).get("code") == code
    assert_over(stage, run)


def assert_over(stage: Stage, run: Run, recorded: bool = True) -> None:
    """Nothing of the run is left but its response, and the journal that makes its events again."""
    assert stage.runner.get(run.id) is None
    assert stage.replayed(run.id) == (parsed(run.feed.events) if recorded else [])
    assert [row["running"] for row in stage.rows("SELECT running FROM threads")] == [None] * recorded
    assert [row["status"] for row in stage.rows("SELECT status FROM responses")] == [run.status] * recorded


CANCELLED = Cancelled("Enough.")


async def assert_cancelled(stage: Stage, run: Run) -> list[Json]:
    events = await events_of(run)
    check_stream(events)
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"], response["output"]) == ("response.failed", "cancelled", [])
    assert_over(stage, run)
    return events


async def test_law_3_a_run_cancelled_before_its_first_step_ends_and_calls_no_backend(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=SESSION)
    run.cancel(CANCELLED)
    await assert_cancelled(stage, run)
    assert stage.backend.calls == []


async def test_law_3_a_run_cancelled_before_acceptance_ends(stage: Stage) -> None:
    run = await stage.play(asyncio.Event(), caller=SESSION)
    call = await stage.backend.called(1)
    run.cancel(CANCELLED)
    await assert_cancelled(stage, run)
    assert call.cut
    assert not run.was_accepted


async def test_law_3_a_run_cancelled_in_the_middle_of_a_text_keeps_it_to_itself(stage: Stage) -> None:
    run = await stage.play(opened(), [Text(0, "half a")], asyncio.Event(), caller=SESSION)
    await taken(run, "half a")
    run.cancel(CANCELLED)
    events = await assert_cancelled(stage, run)
    assert DONE not in [event["type"] for event in events]
    assert stage.backend.calls[0].cut
    (item,) = orjson.loads(stage.row(run.id)["output"])
    assert item["content"][0]["text"] == "half a"
    assert stage.rows("SELECT head FROM branches") == [{"head": 0}]


async def test_law_3_a_run_cancelled_while_its_beginning_is_committed_ends(stage: Stage) -> None:
    async with locked(stage.url):
        run = await stage.play(opened(), asyncio.Event())
        await stage.backend.called(1)
        await loop_turns()
        run.cancel(CANCELLED)
        await loop_turns()
    events = await events_of(run)
    check_stream(events)
    assert events[-1]["response"]["status"] == "cancelled"
    assert stage.row(run.id)["status"] == "cancelled"


async def test_law_3_a_run_cancelled_while_an_item_is_committed_ends(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, [Text(0, "hi"), Close(0)], asyncio.Event(), caller=SESSION)
    await until(lambda: types(run)[-1:] == ["response.content_part.added"])
    async with locked(stage.url):
        hold.set()
        await until(lambda: run.response()["output"][0]["status"] == "completed")
        run.cancel(CANCELLED)
        await loop_turns()
        assert not run.ended.done()
    await assert_cancelled(stage, run)


async def test_law_3_a_cancel_while_the_ending_is_committed_comes_too_late(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, ended(), caller=SESSION)
    await until(lambda: types(run)[-1:] == ["response.content_part.added"])
    async with locked(stage.url):
        hold.set()
        await until(lambda: run.status == "completed")
        run.cancel(CANCELLED)
        await loop_turns()
        assert not run.ended.done()
    events = await events_of(run)
    check_stream(events)
    assert events[-1]["type"] == "response.completed"
    assert_over(stage, run)


async def test_law_3_nothing_stops_a_run_twice(stage: Stage) -> None:
    run = await stage.play(opened(), asyncio.Event(), caller=SESSION)
    await stage.backend.called(1)
    run.cancel(CANCELLED)
    run.cancel(UpstreamError("Another reason."))
    await assert_cancelled(stage, run)
    run.cancel(UpstreamError("Yet another reason."))
    assert run.error is CANCELLED


@pytest.mark.parametrize("stream", [True, False])
async def test_law_3_a_turn_that_is_not_stored_leaves_its_items_and_for_a_while_what_a_retry_needs(
    stage: Stage, stream: bool
) -> None:
    run = await stage.play(*spoken("hi"), caller=SESSION, store=False, stream=stream)
    await run.ended
    left = [(row["expires_at"], row["input"], row["output"]) for row in stage.rows("SELECT * FROM responses")]
    assert left == ([(stage.clock() + 600, None, None)] if stream else [])
    async with stage.database.reading() as connection:
        assert await find_response(connection, "", run.id, stage.clock()) is None
    assert len(stage.rows("SELECT * FROM items")) == 2
    assert stage.thread()["running"] is None


async def test_law_3_without_a_session_or_storage_nothing_is_written_at_all(careful: Stage) -> None:
    run = await careful.play(*spoken("hi"), store=False)
    assert not run.recorded
    check_stream(await events_of(run))
    for table in ("threads", "branches", "items", "responses", "journal", "preambles"):
        assert careful.rows(f"SELECT * FROM {table}") == []


# 4. Fencing.


async def taken_over(stage: Stage, run: Run) -> Json:
    """Another worker has the run; gives the row as it left it."""
    other = Database(stage.url, ManualClock(stage.clock() + 1000))
    try:
        async with other.transaction() as connection:
            (row,) = await claim_left_behind(connection, Owner("another", 1, 3600), other.clock())
        assert row.id == run.id
    finally:
        await other.close()
    return stage.row(run.id)


@pytest.mark.parametrize(
    "rest",
    [
        [[Text(0, "more")], asyncio.Event()],
        [[Close(0)], asyncio.Event()],
        [ended()],
        [UpstreamError("It broke.")],
    ],
    ids=["at a flush", "at the end of an item", "at its end", "at a failure"],
)
async def test_law_4_a_run_that_was_taken_over_writes_nothing_more_and_shows_no_ending_of_its_own(
    migrated_database: str, rest: Sequence[Step]
) -> None:
    async with staged(migrated_database, Limits(flush_interval=0.01)) as stage:
        hold = asyncio.Event()
        run = await stage.play(opened(), hold, *rest, caller=SESSION)
        await until(lambda: stage.journal(run.id))
        journal = stage.journal(run.id)
        row = await taken_over(stage, run)
        hold.set()
        events = await events_of(run)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["type"] for event in events if event["type"] in TERMINAL + (DONE,)] == []
        assert run.cut
        assert run.error is not None
        assert (run.error.status, run.error.retry_after) == (503, 1)
        assert stage.row(run.id) == row
        assert stage.journal(run.id) == journal
        assert stage.thread()["running"] == run.id  # the other worker's to release


async def test_law_4_a_run_that_was_taken_over_stops_its_backend(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(flush_interval=0.01)) as stage:
        hold = asyncio.Event()
        run = await stage.play(opened(), hold, [Text(0, "more")], asyncio.Event())
        await until(lambda: stage.journal(run.id))
        await taken_over(stage, run)
        hold.set()
        await stage.backend.calls[0].over.wait()
        await run.ended
        assert stage.backend.calls[0].cut


# 5. Illegal and truncated upstreams.


@pytest.mark.parametrize(
    "wrong",
    [
        Open(3, MESSAGE),
        Part(0, "output_text", {"type": "output_text", "text": "", "odd": {1}}),
        Text(1, "x"),
        Close(0, {"type": "function_call", "name": "x", "call_id": "y", "arguments": ""}),
        Finish("completed"),
        Finish("incomplete"),
        Finish("failed"),
    ],
    ids=repr,
)
async def test_law_5_an_illegal_delta_is_a_failed_response_and_a_good_stream(stage: Stage, wrong: Delta) -> None:
    run = await stage.play(opened(), [Text(0, "so far")], [wrong, *ended()])
    events = await events_of(run)
    check_stream(events, interleaved=True)
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "upstream_invalid")
    assert response["output"][0]["content"][0]["text"] == "so far"
    assert response["output"][0]["status"] == "incomplete"


async def test_law_5_a_stream_that_ends_without_a_finish_is_failed(stage: Stage) -> None:
    run = await stage.play(opened(), [Text(0, "so far")], [Close(0)])
    events = await events_of(run)
    check_stream(events)
    assert events[-1]["response"]["error"]["code"] == "upstream_truncated"
    assert output_text(events[-1]["response"]) == "so far"


async def test_law_5_what_comes_after_the_finish_is_not_asked_for(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), [Text(0, "more")])
    check_stream(await events_of(run))
    assert run.status == "completed"
    assert stage.backend.calls[0].cut


async def test_law_5_an_incomplete_answer_says_why_and_moves_the_branch(stage: Stage) -> None:
    last = Finish("incomplete", reason="content_filter")
    run = await stage.play(opened(), [Text(0, "so far"), last], caller=SESSION)
    events = await events_of(run)
    check_stream(events)
    assert events[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert stage.row(run.id)["incomplete"] == "content_filter"
    assert stage.rows("SELECT head FROM branches") == [{"head": 2}]


# 6. One path.


async def test_law_6_every_follower_sees_the_same_run(stage: Stage) -> None:
    async def stream() -> list[Json]:
        with run.feed.follow() as follower:
            return await read_until(follower, "response.completed")

    async def whole() -> Json:
        with run.feed.follow() as follower:
            await follower.end()
        return run.response()

    run = await stage.play(*spoken("one ", "two"))
    first, second, response = await asyncio.gather(stream(), stream(), whole())
    assert first == second == await stream()
    assert response == first[-1]["response"]
    assert len(stage.backend.calls) == 1


# 7. Nothing stays stuck.


@pytest.mark.parametrize("caller", [SESSION, None], ids=["session", "no session"])
async def test_law_7_whatever_is_raised_ends_the_response_and_tells_no_secret(
    stage: Stage, caller: object, caplog: pytest.LogCaptureFixture
) -> None:
    run = await stage.play(opened(), [Text(0, "h")], KeyError("sk-secret"), caller=SESSION if caller else None)
    events = await events_of(run)
    check_stream(events)
    error = events[-1]["response"]["error"]
    assert (error["code"], "sk-secret" in error["message"], "KeyError" in error["message"]) == (
        "server_error",
        False,
        True,
    )
    assert stage.row(run.id)["status"] == "failed"
    assert "KeyError" in caplog.text


async def test_law_7_a_run_that_is_killed_lets_its_followers_go(stage: Stage) -> None:
    run = await stage.play(opened(), asyncio.Event(), caller=SESSION)
    with run.feed.follow() as follower:
        await read_until(follower, "response.content_part.added")
        (task,) = (task for task in asyncio.all_tasks() if task.get_name() == run.id)
        task.cancel()
        await follower.end()
    assert run.ended.done()
    assert stage.row(run.id)["status"] == "in_progress"  # for the next process to close


async def test_law_7_a_thread_is_free_after_a_turn_that_failed(stage: Stage) -> None:
    run = await stage.play(UpstreamError("No."), caller=SESSION)
    await run.ended
    run = await stage.play(*spoken("hi"), caller=SESSION)
    await run.ended
    assert run.status == "completed"
    assert [item["role"] for item in stage.backend.calls[1].turn.items] == ["user"]


async def test_law_7_a_response_whose_row_is_refused_fails_at_once(stage: Stage) -> None:
    async with locked(stage.url) as connection:
        connection.execute("DROP TABLE preambles")
    run = await stage.play(*spoken("hi"), instructions="Be brief.")
    events = await events_of(run)
    check_stream(events)
    assert events[-1]["response"]["error"]["code"] == "store_unavailable"
    assert run.error is not None
    assert run.error.status == 503
