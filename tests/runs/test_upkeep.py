"""What a process does again and again: leases, what others ask, what is left behind, what is past."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from responses_ingress.core.deltas import Accepted
from responses_ingress.core.request import Caller
from responses_ingress.ids import named_thread
from responses_ingress.runs.runner import Limits
from responses_ingress.runs.upkeep import Retention, Upkeep
from responses_ingress.store.values import Keep
from responses_ingress.testing import opened, spoken
from tests.runs.stage import SESSION, Stage, locked, staged, until

DAY = 86_400.0


@asynccontextmanager
async def tidy(url: str, retention: Retention, keep: Keep) -> AsyncIterator[Stage]:
    """A process that sweeps all the time."""
    async with staged(url, Limits(keep=keep)) as stage:
        upkeep = Upkeep(stage.database, stage.runner, retention)
        try:
            yield stage
        finally:
            await upkeep.close()


async def test_a_host_that_was_asleep_renews_its_leases_before_it_looks_for_others(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(lease=15)) as stage:
        run = await stage.play([Accepted()], asyncio.Event(), caller=SESSION, background=True)
        await until(lambda: run.status == "in_progress")
        stage.clock.advance(3600)
        await until(lambda: stage.row(run.id)["lease_until"] == stage.clock() + 15)
        assert (stage.row(run.id)["epoch"], stage.thread()["lease_until"]) == (1, stage.clock() + 15)


async def test_a_clock_that_is_set_back_does_not_keep_leases_from_being_renewed(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(lease=15)) as stage:
        run = await stage.play([Accepted()], asyncio.Event(), background=True)
        await until(lambda: run.status == "in_progress")
        stage.clock.advance(-3600)
        await until(lambda: stage.row(run.id)["lease_until"] == stage.clock() + 15)


async def test_a_run_that_nobody_follows_makes_way_for_the_next_turn_in_another_process(
    migrated_database: str,
) -> None:
    async with staged(migrated_database) as there, staged(migrated_database, seed=2) as here:
        first = await there.play([Accepted()], asyncio.Event(), caller=SESSION)
        with first.follow():
            await there.backend.called(1)
        second = await here.play(*spoken("two"), caller=SESSION)
        await second.ended
        assert (first.status, second.status) == ("cancelled", "completed")


async def test_a_run_that_somebody_follows_makes_no_way_for_another_process(migrated_database: str) -> None:
    async with staged(migrated_database) as there, staged(migrated_database, seed=2) as here:
        hold = asyncio.Event()
        first = await there.play(hold, *spoken("one"), caller=SESSION)
        with first.follow():
            second = asyncio.create_task(here.play(*spoken("two"), caller=SESSION))
            await until(lambda: there.row(first.id)["asked"] == "yield")
            assert not second.done()
            hold.set()
            await (await second).ended
        assert first.status == "completed"


async def test_after_an_outage_everybody_may_renew_before_anybody_takes_over(
    migrated_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever comes back first must not take what the others could not renew; what waits is run at once."""
    async with (
        staged(migrated_database, Limits(max_background=1, lease=15)) as owner,
        staged(migrated_database, Limits(lease=3600), seed=2) as other,
    ):
        run = await owner.play(opened(), asyncio.Event(), background=True)
        await until(lambda: owner.journal(run.id))
        async with locked(owner.url) as stranger:
            stranger.execute("ALTER TABLE responses RENAME COLUMN lease_until TO away")
        await until(lambda: "upkeep is put off" in caplog.text)
        await other.upkeep._chores()
        other.clock.advance(1000)
        async with locked(owner.url) as stranger:
            stranger.execute("ALTER TABLE responses RENAME COLUMN away TO lease_until")
        other.backend.script(spoken("hi"))
        waiting = await owner.ask(background=True)
        await until(lambda: owner.row(waiting.id)["status"] == "completed")
        assert len(other.backend.calls) == 1
        assert owner.row(run.id)["epoch"] == 1


async def test_what_is_past_is_swept_away(migrated_database: str) -> None:
    keep = Keep(journal=10, response=DAY)
    async with tidy(migrated_database, Retention(threads=2 * DAY, interval=0.02), keep) as stage:
        run = await stage.play(*spoken("hi"), caller=SESSION)
        await run.ended
        stage.clock.advance(11)
        await until(lambda: stage.journal(run.id) == [])
        assert stage.row(run.id)["journal_until"] is None
        stage.clock.advance(DAY)
        await until(lambda: stage.rows("SELECT id FROM responses") == [])
        assert len(stage.rows("SELECT * FROM items")) == 2  # the session's own
        stage.clock.advance(DAY)
        await until(lambda: stage.rows("SELECT id FROM threads") == [])
        assert stage.rows("SELECT * FROM items") == stage.rows("SELECT * FROM branches") == []


async def test_what_is_used_is_kept(migrated_database: str) -> None:
    async with tidy(migrated_database, Retention(interval=0.02), Keep(journal=10, response=DAY)) as stage:
        read, built_on, forgotten = [await stage.play(*spoken("hi")) for _ in range(3)]
        for run in (read, built_on, forgotten):
            await run.ended
        stage.clock.advance(DAY / 2)
        row = await stage.runner._find("", read.id)
        assert row is not None
        await stage.runner.seen(row)
        child = await stage.play(*spoken("more"), previous_response_id=built_on.id)
        await child.ended
        await until(lambda: stage.row(read.id)["expires_at"] == stage.clock() + DAY)
        stage.clock.advance(DAY / 2)
        await until(lambda: len(stage.rows("SELECT id FROM responses")) == 3)
        assert stage.rows("SELECT id FROM responses WHERE id = ?", forgotten.id) == []


async def test_of_more_than_a_tenant_may_keep_the_least_used_go(migrated_database: str) -> None:
    keep = Keep(journal=10, response=1e11)
    async with tidy(migrated_database, Retention(most_responses=2, interval=0.02), keep) as stage:
        ids = []
        for _ in range(4):
            run = await stage.play(*spoken("hi"), caller=Caller(tenant="a"))
            await run.ended
            ids.append(run.id)
            stage.clock.advance(1)
        other = await stage.play(*spoken("hi"), caller=Caller(tenant="b"))
        await other.ended
        await until(lambda: len(stage.rows("SELECT id FROM responses")) == 3)
        assert {row["id"] for row in stage.rows("SELECT id FROM responses")} == {*ids[2:], other.id}


async def test_a_sweep_goes_on_until_nothing_is_left(migrated_database: str) -> None:
    """However many transactions that takes: histories as long as these are deleted one by one."""
    async with tidy(migrated_database, Retention(interval=0.3), Keep(response=900)) as stage:
        given = [{"role": "user", "content": str(number)} for number in range(1500)]
        for _ in range(3):
            await (await stage.play(*spoken("hi"), input=given)).ended
        stage.clock.advance(1000)
        await until(lambda: len(stage.rows("SELECT id FROM responses")) < 3)
        stage.clock.advance(-1000)  # for the next sweep nothing is past
        await until(lambda: not stage.rows("SELECT id FROM responses"))


async def test_a_sweep_that_fails_is_tried_again(migrated_database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with tidy(migrated_database, Retention(interval=0.02), Keep(journal=10, response=DAY)) as stage:
        run = await stage.play(*spoken("hi"))
        await run.ended
        async with locked(stage.url) as stranger:
            stranger.execute("ALTER TABLE branches RENAME COLUMN head TO away")
        stage.clock.advance(2 * DAY)
        await until(lambda: "a sweep is put off" in caplog.text)
        async with locked(stage.url) as stranger:
            stranger.execute("ALTER TABLE branches RENAME COLUMN away TO head")
        await until(lambda: stage.rows("SELECT id FROM responses") == [])


async def test_a_thread_that_runs_is_not_idle(migrated_database: str) -> None:
    async with tidy(migrated_database, Retention(threads=DAY, interval=0.02), Keep(10, DAY)) as stage:
        run = await stage.play([Accepted()], asyncio.Event(), caller=SESSION)
        with run.follow():
            await stage.backend.called(1)
            stage.clock.advance(2 * DAY)
            await until(lambda: stage.thread()["lease_until"] > stage.clock())
            async with locked(stage.url):
                pass
            assert stage.thread()["id"] == named_thread("", "a session")
