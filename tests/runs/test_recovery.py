"""What a process does about those that ended before their runs did, and about its own end."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import Engine
from sqlalchemy.event import listen, remove

from responses_ingress.core.deltas import Accepted, Close, Remember, Text
from responses_ingress.core.request import Caller
from responses_ingress.errors import (
    Busy,
    PreviousNotCompleted,
)
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ManualClock, ScriptedBackend, ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import (
    SESSION,
    Stage,
    events_of,
    locked,
    loop_turns,
    staged,
    taken,
    types,
    until,
)

ELSEWHERE = Caller(thread_key="another session")


def roles(stage: Stage, call: int) -> list[str]:
    """Who said what the backend was given."""
    return [item["role"] for item in stage.backend.calls[call].turn.items]


# What another process left behind.

LEASE = 30.0


@asynccontextmanager
async def two_processes(url: str) -> AsyncIterator[tuple[Stage, ManualClock]]:
    """A process that stands still (its clock does, and nobody renews its leases), and a clock for the one
    that finds what it left behind."""
    async with staged(url, Limits(flush_interval=0, lease=LEASE)) as dead:
        yield dead, ManualClock(dead.clock() + LEASE + 1)


@pytest.mark.parametrize("session", [True, False])
async def test_what_a_dead_process_left_behind_is_closed_as_failed_with_all_it_had_said(
    migrated_database: str, session: bool
) -> None:
    async with two_processes(migrated_database) as (dead, later):
        left = await dead.play(
            opened(), [Text(0, "half a")], asyncio.Event(), caller=SESSION if session else None, instructions="Hush."
        )
        await until(lambda: len(dead.journal(left.id)) == 2)
        async with staged(migrated_database, clock=later, seed=2) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            row = found.row(left.id)
            assert (row["owner"], row["lease_until"], row["completed_at"]) == (None, None, None)
            assert orjson.loads(row["error"])["code"] == "server_restarted"
            assert orjson.loads(row["input"])[0]["content"][0]["text"] == "hi"
            (item,) = orjson.loads(row["output"])
            assert (item["content"][0]["text"], item["status"]) == ("half a", "incomplete")
            events = found.replayed(left.id)
            check_stream(events)
            assert events[-1]["response"]["error"]["code"] == "server_restarted"
            assert orjson.loads(row["echo"]) == {"service_tier": events[-1]["response"]["service_tier"]}
            with pytest.raises(PreviousNotCompleted):
                await found.create(previous_response_id=left.id)


async def test_the_journal_of_what_was_left_behind_is_read_once(migrated_database: str) -> None:
    reads: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT journal."):
            reads.append(statement)

    async with two_processes(migrated_database) as (dead, later):
        left = await dead.play(opened(), [Text(0, "half a")], asyncio.Event())
        await until(lambda: len(dead.journal(left.id)) == 2)
        listen(Engine, "before_cursor_execute", note)
        try:
            async with staged(migrated_database, clock=later, seed=2) as found:
                await until(lambda: found.row(left.id)["status"] == "failed")
        finally:
            remove(Engine, "before_cursor_execute", note)
        assert len(reads) == 1


async def test_the_thread_of_what_was_left_behind_can_be_used_again(migrated_database: str) -> None:
    async with two_processes(migrated_database) as (dead, later):
        left = await dead.play(opened(), [Text(0, "half a")], asyncio.Event(), caller=SESSION)
        await taken(left, "half a")
        async with staged(migrated_database, clock=later, seed=2) as found:
            await until(lambda: found.thread()["running"] is None)
            run = await found.play(*spoken("again"), caller=SESSION)
            await run.ended
            assert run.status == "completed"
            assert roles(found, 0) == ["user"]


async def test_a_thread_whose_lease_ran_out_is_free_before_anyone_has_closed_its_response(
    migrated_database: str,
) -> None:
    async with staged(migrated_database) as stage:
        left = await stage.play(asyncio.Event(), caller=SESSION, background=True)
        await stage.backend.called(1)
        await stage.change("UPDATE threads SET lease_until = 0")
        run = await stage.play(*spoken("hi"), caller=SESSION)
        await run.ended
        assert (run.status, left.status) == ("completed", "queued")
        assert stage.thread()["running"] is None


async def test_what_was_left_behind_unstored_leaves_a_free_thread_and_goes_soon(migrated_database: str) -> None:
    async with two_processes(migrated_database) as (dead, later):
        left = await dead.play(opened(), asyncio.Event(), caller=SESSION, store=False)
        await until(lambda: dead.journal(left.id))
        async with staged(migrated_database, clock=later, seed=2) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            assert found.row(left.id)["expires_at"] == later() + 600
            assert found.thread()["running"] is None
            assert found.rows("SELECT * FROM items") == []


async def test_a_process_that_was_only_slow_shows_no_ending_of_its_own(migrated_database: str) -> None:
    async with two_processes(migrated_database) as (slow, later):
        hold = asyncio.Event()
        left = await slow.play(opened(), hold, [Text(0, "late")], ended())
        await until(lambda: slow.journal(left.id))
        async with staged(migrated_database, clock=later, seed=2) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            row = found.row(left.id)
            hold.set()
            events = await events_of(left)
            assert not any(event["type"].endswith((".failed", ".completed")) for event in events)
            assert left.cut
            assert found.row(left.id) == row


async def test_a_response_whose_lease_is_good_is_left_alone(migrated_database: str) -> None:
    async with two_processes(migrated_database) as (alive, later):
        run = await alive.play(asyncio.Event())
        await until(lambda: types(run))
        later.advance(-2)
        async with staged(migrated_database, clock=later, seed=2) as other:
            await other.play(*spoken("hi"))
        assert alive.row(run.id)["status"] == "in_progress"
        assert alive.row(run.id)["epoch"] == 1


async def test_of_two_processes_that_find_the_same_response_one_closes_it(
    migrated_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with two_processes(migrated_database) as (dead, later), AsyncExitStack() as processes:
        left = await dead.play(opened(), asyncio.Event(), caller=SESSION)
        await until(lambda: dead.journal(left.id))
        async with locked(migrated_database):
            for seed in (2, 3):
                await processes.enter_async_context(staged(migrated_database, clock=later, seed=seed))
        await until(lambda: dead.row(left.id)["status"] == "failed")
        await until(lambda: "is closed as failed" in caplog.text)
        assert dead.row(left.id)["epoch"] == 2
        assert caplog.text.count("is closed as failed") == 1


async def test_the_upkeep_outlives_a_database_that_does_not_answer(
    migrated_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_processes(migrated_database) as (dead, later):
        left = await dead.play(opened(), asyncio.Event())
        await until(lambda: dead.journal(left.id))
        async with locked(dead.url) as connection:
            connection.execute("ALTER TABLE preambles RENAME COLUMN payload TO away")
        async with staged(migrated_database, Limits(lease=0.3), clock=later, seed=2) as found:
            await until(lambda: "upkeep is put off" in caplog.text)
            await found.change("ALTER TABLE preambles RENAME COLUMN away TO payload")
            await until(lambda: found.row(left.id)["status"] == "failed")


async def test_one_response_that_cannot_be_closed_is_not_in_the_way_of_others(migrated_database: str) -> None:
    async with two_processes(migrated_database) as (dead, later):
        broken, good = await dead.play(opened(), asyncio.Event()), await dead.play(opened(), asyncio.Event())
        await until(lambda: dead.journal(broken.id) and dead.journal(good.id))
        async with locked(dead.url) as connection:
            connection.execute("UPDATE journal SET payload = ? WHERE response_id = ?", b"0", broken.id)
        async with (
            staged(migrated_database, Limits(lease=0.3), clock=later, seed=2) as found,
            asyncio.timeout(10),
        ):
            await until(lambda: found.row(good.id)["status"] == "failed")


async def test_the_leases_of_what_runs_are_renewed(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(lease=0.3)) as stage:
        hold = asyncio.Event()
        run = await stage.play(hold, *spoken("hi"), caller=SESSION)
        await stage.backend.called(1)
        stage.clock.advance(1000)
        renewed = stage.clock() + 0.3
        await until(lambda: stage.row(run.id)["lease_until"] == stage.thread()["lease_until"] == renewed)
        assert (stage.row(run.id)["epoch"], run.status) == (1, "in_progress")
        hold.set()
        await run.ended


class Deaf(ScriptedBackend):
    """Its upstream takes a cancel, and does not answer."""

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        await super().cancel(state, bearer)
        await asyncio.Event().wait()


async def test_leases_are_renewed_while_seeing_to_what_was_left_behind_takes_long(migrated_database: str) -> None:
    resumable = ScriptedBackend(resumable=True)
    async with staged(migrated_database, Limits(flush_interval=0, lease=LEASE), backend=resumable) as dead:
        left = await dead.play([Remember({"id": "theirs"})], opened(), asyncio.Event(), background=True)
        await until(lambda: dead.journal(left.id))
        await dead.change("UPDATE responses SET asked = 'cancel', owner = 'dead' WHERE id = ?", left.id)
        later, deaf = ManualClock(dead.clock() + LEASE + 1), Deaf(resumable=True)
        async with staged(migrated_database, Limits(lease=0.3), clock=later, seed=2, backend=deaf) as found:
            await until(lambda: deaf.cancelled)
            run = await found.play(opened(), asyncio.Event())
            await until(lambda: types(run))
            later.advance(1000)
            await until(lambda: found.row(run.id)["lease_until"] == later() + 0.3)


# The end of a process.


async def test_closing_lets_running_turns_finish(migrated_database: str) -> None:
    async with staged(migrated_database) as stage:
        hold = asyncio.Event()
        run = await stage.play(hold, *spoken("hi"))
        await stage.backend.called(1)
        closing_down = asyncio.create_task(stage.runner.close(60))
        await loop_turns()
        with pytest.raises(Busy):
            await stage.create()
        hold.set()
        await closing_down
        assert run.status == "completed"
        assert stage.row(run.id)["status"] == "completed"


async def test_closing_ends_what_does_not_finish_in_time_as_failed(migrated_database: str) -> None:
    async with staged(migrated_database) as stage:
        run = await stage.play(opened(), [Text(0, "half a")], asyncio.Event(), caller=SESSION)
        unwritten = await stage.play([Accepted()], asyncio.Event(), store=False)
        await taken(run, "half a")
        await stage.runner.close(0.01)
        for left in (run, unwritten):
            events = await events_of(left)
            check_stream(events)
            assert events[-1]["response"]["error"]["code"] == "server_restarted"
        assert stage.row(run.id)["status"] == "failed"
        assert stage.thread()["running"] is None
        assert [call.cut for call in stage.backend.calls] == [True, True]


async def test_closing_with_nothing_under_way_is_immediate(stage: Stage) -> None:
    run = await stage.play(opened(), [Close(0)], ended()[1:])
    await run.ended
    await stage.runner.close(60)


async def test_a_request_that_waits_for_its_thread_begins_nothing_after_the_close(migrated_database: str) -> None:
    async with staged(migrated_database) as stage:
        run = await stage.play(asyncio.Event(), caller=SESSION)
        with run.feed.follow():
            uses = stage.database.uses
            waiting = asyncio.create_task(stage.create(caller=SESSION))
            await until(lambda: stage.database.uses > uses and not stage.database.users)
            await (await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
            await stage.runner.close(0)
            with pytest.raises(Busy):
                await waiting


CLOSES = """
import asyncio, sys
from responses_ingress.ids import Ids
from responses_ingress.runs.metrics import Metrics
from responses_ingress.runs.runner import Limits, Runner
from responses_ingress.store.database import Database

async def open_and_close(turns):
    database = Database(sys.argv[1], lambda: 1.0)
    runner = Runner(database, [], Limits(), Metrics(), Ids())
    for _ in range(turns):
        await asyncio.sleep(0)
    await runner.close(0)
    await database.close()

for turns in range(12):
    asyncio.run(open_and_close(turns))
"""


async def test_closing_at_any_moment_leaves_no_connection_open(migrated_database: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLOSES, migrated_database),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")
