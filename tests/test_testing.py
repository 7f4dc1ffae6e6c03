import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from responses_ingress.backends.base import Backend
from responses_ingress.core.deltas import Accepted, Delta, Open, Text
from responses_ingress.core.turn import Turn
from responses_ingress.errors import UpstreamError, UpstreamTimeout
from responses_ingress.ids import Clock
from responses_ingress.testing import ManualClock, ScriptedBackend, ended, opened, spoken
from tests.core.shapes import events_of, message
from tests.invariants import check_stream

TURN = Turn("resp_1", "thread_1", "some-model")


async def played(backend: ScriptedBackend, turn: Turn = TURN) -> list[Sequence[Delta]]:
    return [deltas async for deltas in backend.stream(turn)]


async def test_the_fakes_are_what_they_stand_for() -> None:
    backend: Backend = ScriptedBackend()
    clock: Clock = ManualClock()
    assert backend.name == "scripted"
    assert clock() == clock()


async def test_each_turn_plays_the_next_script() -> None:
    backend = ScriptedBackend([[Accepted()]])
    backend.script([[Text(0, "a")], [Text(0, "b")]])
    assert await played(backend) == [[Accepted()]]
    assert await played(backend) == [[Text(0, "a")], [Text(0, "b")]]


async def test_a_turn_that_no_script_foresees_fails_and_says_so() -> None:
    with pytest.raises(UpstreamError, match="No script"):
        await played(ScriptedBackend())


async def test_an_error_in_a_script_is_raised_after_what_stands_before_it() -> None:
    backend = ScriptedBackend([[Accepted()], UpstreamTimeout("Too slow.")])
    seen = []
    with pytest.raises(UpstreamTimeout, match="Too slow"):
        async for deltas in backend.stream(TURN):
            seen.append(deltas)
    assert seen == [[Accepted()]]
    assert backend.calls[0].over.is_set()
    assert not backend.calls[0].cut


async def test_a_hold_point_keeps_back_what_follows() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend([[Accepted()], hold, [Text(0, "a")]])
    async with aclosing(backend.stream(TURN)) as batches:
        assert await anext(batches) == [Accepted()]
        waiting = asyncio.ensure_future(anext(batches))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        hold.set()
        assert await waiting == [Text(0, "a")]


async def test_it_records_the_turns_it_was_given_and_tells_when_one_begins() -> None:
    backend = ScriptedBackend(spoken("hi"))
    begun = asyncio.create_task(backend.called(1))
    await played(backend)
    call = await begun
    assert call is backend.calls[0]
    assert call.turn is TURN
    assert call.over.is_set()
    assert not call.cut


async def test_it_knows_that_a_turn_was_cancelled_at_a_hold_point() -> None:
    backend = ScriptedBackend([[Accepted()], asyncio.Event()])
    playing = asyncio.create_task(played(backend))
    call = await backend.called(1)
    playing.cancel()
    await call.over.wait()
    assert call.cut


async def test_it_knows_that_a_turn_was_left_with_steps_to_come() -> None:
    backend = ScriptedBackend(spoken("hi"), spoken("hi"))
    async with aclosing(backend.stream(TURN)) as batches:
        await anext(batches)
    assert backend.calls[0].cut
    async with aclosing(backend.stream(TURN)) as batches:
        async for deltas in batches:
            if deltas == ended():
                break
    assert not backend.calls[1].cut


async def test_it_tells_its_models_or_that_it_cannot_and_knows_that_it_was_closed() -> None:
    backend = ScriptedBackend(models=("a", "b"))
    assert await backend.models() == ("a", "b")
    with pytest.raises(UpstreamError):
        await ScriptedBackend(models=UpstreamError("Away.")).models()
    assert not backend.closed
    await backend.close()
    assert backend.closed


def test_what_is_spoken_makes_a_good_stream() -> None:
    deltas = [delta for batch in spoken("one ", "two") for delta in batch]
    assert deltas[: len(opened())] == opened()
    events = events_of(Open(0, message()) if isinstance(delta, Open) else delta for delta in deltas)
    events[-1]["response"]["completed_at"] = 9  # the run's to set
    check_stream(events)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "one two"


def test_a_manual_clock_stands_still_until_it_is_told_to_go_on() -> None:
    clock = ManualClock(100.0)
    assert (clock(), clock()) == (100.0, 100.0)
    clock.advance(2.5)
    assert clock() == 102.5
