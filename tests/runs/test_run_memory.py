"""What a backend remembers in the middle of its answer: it makes no event, and must not cost one."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from responses_ingress.core.deltas import Accepted, Remember, Text
from responses_ingress.core.replay import fold
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ManualClock, ScriptedBackend, ended, opened
from tests.core.shapes import QUEUED
from tests.runs.stage import Stage, staged, until


@pytest.fixture
async def stage(migrated_database: str) -> AsyncIterator[Stage]:
    async with staged(migrated_database, Limits(flush_interval=0)) as stage:
        yield stage


async def test_what_is_remembered_between_two_texts_leaves_the_journal_whole(stage: Stage) -> None:
    hold = asyncio.Event()
    states: list[Remember] = [Remember({"step": step}) for step in (1, 2)]
    run = await stage.play(opened(), [states[0]], [states[1]], hold, [Text(0, "Hello")], ended(), background=True)
    await until(lambda: any(b'"step":2' in row["payload"] for row in stage.journal(run.id)))
    hold.set()
    await run.ended
    replayed = stage.replayed(run.id)
    assert [event["sequence_number"] for event in replayed] == list(range(len(run.feed.events)))
    assert replayed[-1]["response"] == run.response()


async def test_what_goes_on_keeps_what_was_remembered(migrated_database: str) -> None:
    """It is in a row without events; the process that goes on says nothing of it again."""
    state = {"response_id": "upstream_1"}
    limits = Limits(flush_interval=0.01, lease=15)
    first = ScriptedBackend(resumable=True)
    async with staged(migrated_database, limits, backend=first) as dead:
        hold = asyncio.Event()
        left = await dead.play([Accepted()], hold, [Remember(state)], asyncio.Event(), background=True)
        await until(lambda: dead.journal(left.id))
        hold.set()
        await until(lambda: [row["count"] for row in dead.journal(left.id)][1:] == [0])
        second = ScriptedBackend([opened()[1:], asyncio.Event()], resumable=True)
        clock = ManualClock(dead.clock() + 16)
        async with staged(migrated_database, limits, clock=clock, seed=2, backend=second) as found:
            await until(lambda: len(found.journal(left.id)) == 2 and found.journal(left.id)[1]["count"])
            assert second.calls[0].turn.resume == state
            builder = fold(QUEUED, [row["payload"] for row in found.journal(left.id)], silent=True)
            assert builder.memory == state and builder.output
