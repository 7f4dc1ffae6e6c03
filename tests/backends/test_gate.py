"""The gate: who passes, who waits, who is refused, and what is told of it."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest

from responses_ingress.backends.gate import Gate
from responses_ingress.core.deltas import Delta, Finish
from responses_ingress.core.turn import Turn
from responses_ingress.errors import (
    Busy,
    ContextLengthExceeded,
    IngressError,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from responses_ingress.testing import ManualClock, ScriptedBackend, Step, ended, opened, spoken


def turn(name: str = "a", **fields: Any) -> Turn:
    return Turn(name, "thread", "model", **fields)


async def played(gate: Gate, given: Turn | None = None) -> list[Delta]:
    return [delta async for batch in gate.stream(given or turn()) for delta in batch]


def held(hold: asyncio.Event) -> list[Step]:
    return [opened(), hold, ended()]


def names(backend: ScriptedBackend) -> Sequence[str]:
    return [call.turn.response_id for call in backend.calls]


async def waiting(gate: Gate, count: int) -> None:
    while gate.fare.waiting < count:  # noqa: ASYNC110 - nothing else tells of it
        await asyncio.sleep(0)


async def test_without_a_limit_everything_passes_and_is_counted() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(*[held(hold)] * 3)
    gate = Gate(backend)
    playing = [asyncio.create_task(played(gate)) for _ in range(3)]
    await backend.called(3)
    assert (gate.fare.in_flight, gate.fare.waiting) == (3, 0)
    hold.set()
    assert [type(deltas[-1]) for deltas in await asyncio.gather(*playing)] == [Finish] * 3
    assert gate.fare.in_flight == 0


async def test_what_finds_no_room_waits_its_turn() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(held(hold), *[spoken("hi")] * 3)
    gate = Gate(backend, 1, 3)
    playing = []
    for name in "abcd":
        playing.append(asyncio.create_task(played(gate, turn(name))))
        await asyncio.sleep(0)
    await waiting(gate, 3)
    assert names(backend) == ["a"]
    assert (gate.fare.in_flight, gate.fare.waiting) == (1, 3)
    hold.set()
    await asyncio.gather(*playing)
    assert names(backend) == ["a", "b", "c", "d"]
    assert (gate.fare.in_flight, gate.fare.waiting) == (0, 0)


async def test_one_more_than_may_wait_is_refused_at_once() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(held(hold), spoken("hi"))
    gate = Gate(backend, 1, 1)
    playing = [asyncio.create_task(played(gate)) for _ in range(2)]
    await waiting(gate, 1)
    with pytest.raises(Busy, match="'scripted' is at its limit") as refused:
        gate.stream(turn())
    assert refused.value.status == 503 and refused.value.retry_after
    hold.set()
    await asyncio.gather(*playing)
    assert len(backend.calls) == 2


async def test_of_turns_that_come_at_once_no_more_than_may_wait_are_let_in() -> None:
    hold = asyncio.Event()
    gate = Gate(ScriptedBackend(*[held(hold)] * 2), 1, 1)
    batches = [gate.stream(turn()) for _ in range(5)]  # there is room while nobody has begun
    playing = [asyncio.ensure_future(anext(one)) for one in batches]
    await waiting(gate, 1)
    refused = await asyncio.gather(*playing[2:], return_exceptions=True)
    assert [type(one) for one in refused] == [Busy] * 3
    hold.set()
    for one, beginning in zip(batches[:2], playing, strict=False):
        await beginning
        await one.aclose()
    assert (gate.fare.in_flight, gate.fare.waiting) == (0, 0)


async def test_what_runs_in_the_background_always_waits() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(held(hold), spoken("hi"))
    gate = Gate(backend, 1, 0)
    first = asyncio.create_task(played(gate))
    await backend.called(1)
    second = asyncio.create_task(played(gate, turn("b", parameters={"background": True})))
    await waiting(gate, 1)
    hold.set()
    await asyncio.gather(first, second)
    assert names(backend) == ["a", "b"]


async def test_what_another_process_has_begun_does_not_wait() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(held(hold), spoken("hi"))
    gate = Gate(backend, 1, 0)
    first = asyncio.create_task(played(gate))
    await backend.called(1)
    assert isinstance((await played(gate, turn("b", resume={"id": 1})))[-1], Finish)
    hold.set()
    await first


async def test_one_that_leaves_while_it_waits_leaves_no_trace() -> None:
    hold = asyncio.Event()
    backend = ScriptedBackend(held(hold), spoken("hi"))
    gate = Gate(backend, 1, 5)
    first, second, third = (asyncio.create_task(played(gate, turn(name))) for name in "abc")
    await waiting(gate, 2)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert gate.fare.waiting == 1
    hold.set()
    await asyncio.gather(first, third)
    assert names(backend) == ["a", "c"]


@pytest.mark.parametrize("leaving", ["cancelled", "closed"])
async def test_one_that_leaves_makes_room(leaving: str) -> None:
    backend = ScriptedBackend([opened(), asyncio.Event()], spoken("hi"))
    gate = Gate(backend, 1, 0)
    if leaving == "closed":
        async with aclosing(gate.stream(turn())) as batches:
            await anext(batches)
    else:
        playing = asyncio.create_task(played(gate))
        await backend.called(1)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
    assert backend.calls[0].cut and gate.fare.in_flight == 0
    assert isinstance((await played(gate))[-1], Finish)
    assert gate.fare.last_error is None


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (UpstreamTimeout("Slow."), "upstream_timeout"),
        (UpstreamRefused("No.", status=401), "upstream_refused"),
        (UpstreamRefused("No.", status=429, code="rate_limit_exceeded"), "rate_limit_exceeded"),
        ([Finish("failed", error={"code": "server_error", "message": "secret"})], "server_error"),
        (UpstreamRefused("No.", status=400), None),
        (ContextLengthExceeded("Too long."), None),
        ([Finish("failed", error={"code": "context_length_exceeded", "message": "secret"})], None),
        ([Finish("cancelled")], None),
    ],
    ids=repr,
)
async def test_the_last_failure_is_told_but_for_those_of_the_request(end: Step, code: str | None) -> None:
    clock = ManualClock(100.5)
    gate = Gate(ScriptedBackend([opened(), end], spoken("hi")), clock=clock)
    try:
        await played(gate)
    except IngressError as error:
        assert error is end
    assert gate.fare.last_error == (None if code is None else (code, 100.5))
    assert gate.fare.last_success is None
    clock.advance(1)
    await played(gate)
    assert gate.fare.last_success == 101.5


async def test_an_incomplete_answer_is_a_success_too() -> None:
    gate = Gate(ScriptedBackend([[Finish("incomplete", reason="max_output_tokens")]]), clock=ManualClock(7))
    await played(gate)
    assert gate.fare.last_success == 7


async def test_the_rest_is_the_backends() -> None:
    backend = ScriptedBackend(name="slow", resumable=True, goes_on=True, models=["m"])
    gate = Gate(backend, 1)
    assert (gate.name, gate.resumable, gate.goes_on, await gate.models()) == ("slow", True, True, ["m"])
    await gate.cancel({"id": 1}, None)
    await gate.close()
    assert backend.cancelled == [{"id": 1}] and backend.closed


@pytest.mark.parametrize("code", ["sk-secret", "words of theirs", "a" * 65, ""])
async def test_codes_that_may_be_words_are_not_shown(code: str) -> None:
    gate = Gate(ScriptedBackend([UpstreamError("No.", code=code or "Ä")]), clock=ManualClock())
    with pytest.raises(UpstreamError):
        _ = [batch async for batch in gate.stream(Turn("resp", "thread", "model"))]
    assert gate.fare.last_error is not None
    assert gate.fare.last_error[0] == "upstream_error"
