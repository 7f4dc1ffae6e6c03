"""What a backend remembers in the middle of its answer: it makes no event, and must not cost one."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from responses_ingress.core.deltas import Remember, Text
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ended, opened
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
