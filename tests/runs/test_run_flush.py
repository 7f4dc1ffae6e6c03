"""Law 2 of the pump where the database does not keep up: how far text may run ahead of its commit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from responses_ingress.core.deltas import Text
from responses_ingress.runs.run import Run
from responses_ingress.runs.runner import Limits
from responses_ingress.store.writer import Unit
from responses_ingress.testing import opened
from tests.runs.stage import Stage, locked, loop_turns, staged, taken, until

FLUSH = 0.01


@asynccontextmanager
async def behind(stage: Stage, *holds: asyncio.Event) -> AsyncIterator[Run]:
    """A run whose journal has one batch on its way for longer than a flush interval, and more to write."""
    first, second = asyncio.Event(), asyncio.Event()
    texts = [Text(0, word) for word in ("one ", "two ")]
    later = [step for hold in holds for step in (hold, [Text(0, "three")])]
    run = await stage.play(opened(), first, [texts[0]], second, [texts[1]], *later, asyncio.Event())
    await until(lambda: seen(run) == 0 and stage.journal(run.id))
    await stage.database.submit(Unit(lambda _: None))  # when this is written, the run has heard of its first batch
    async with locked(stage.url):
        first.set()
        await until(lambda: seen(run) == 1)
        await flush_timer()
        second.set()
        await until(lambda: seen(run) == 2)
        await flush_timer()
        yield run


def seen(run: Run) -> int:
    return [event.type for event in run.feed.events].count("response.output_text.delta")


async def flush_timer() -> None:
    """Return when the timers are over that were set before this was called."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(FLUSH * 1.5, over.set)
    await over.wait()


@pytest.fixture
async def slow(migrated_database: str) -> AsyncIterator[Stage]:
    async with staged(migrated_database, Limits(flush_interval=FLUSH)) as stage:
        yield stage


async def test_text_waits_for_its_commit_where_the_last_one_is_late(slow: Stage) -> None:
    hold = asyncio.Event()
    async with behind(slow, hold) as run:
        hold.set()
        await taken(run, "one two three")
        await loop_turns()
        assert seen(run) == 2
    await until(lambda: seen(run) == 3)
    assert sum(row["count"] for row in slow.journal(run.id)) == len(run.feed.events)


async def test_text_that_was_seen_is_committed_soon_though_nothing_follows_it(slow: Stage) -> None:
    async with behind(slow) as run:
        assert seen(run) == 2
    async with asyncio.timeout(10):
        await until(lambda: sum(row["count"] for row in slow.journal(run.id)) == len(run.feed.events))
