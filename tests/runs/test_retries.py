"""The same request again means the response that it made the first time."""

import asyncio
from dataclasses import replace

import pytest

from responses_ingress.core.deltas import Text
from responses_ingress.core.request import Caller, Retry
from responses_ingress.errors import KeyReused, UpstreamError
from responses_ingress.runs.run import Run
from responses_ingress.runs.tail import Tail
from responses_ingress.testing import ended, opened, spoken
from tests.runs.stage import SESSION, Stage, output_text, parsed, staged, until

AGAIN = Caller(retry=Retry(b"n" * 16, attaches=True))
FIRST = Caller(retry=Retry(b"n" * 16))
CODEX = replace(SESSION, turn_id="turn 1")
KEYED = Caller(retry=Retry(b"k" * 16, b"b" * 16, attaches=True))


async def test_a_repeat_attaches_to_the_run_under_way(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, [Text(0, "hi")], ended(), caller=FIRST)
    await until(lambda: run.feed.events)
    again = await stage.ask(caller=AGAIN)
    assert again is run
    hold.set()
    await run.ended
    assert len(stage.backend.calls) == 1


async def test_a_repeat_gets_all_events_of_what_has_just_ended(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=FIRST)
    await run.ended
    again = await stage.ask(caller=AGAIN)
    assert isinstance(again, Tail)
    with again.follow() as follower:
        await follower.end()
    assert parsed(again.feed.events) == parsed(run.feed.events)
    assert again.response() == run.response()
    assert len(stage.backend.calls) == 1


async def test_a_repeat_of_what_nobody_streamed_gets_the_response(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=FIRST, stream=False)
    await run.ended
    again = await stage.ask(caller=AGAIN, stream=False)
    with again.follow() as follower:
        await follower.end()
    assert again.response() == run.response()
    assert len(stage.backend.calls) == 1


async def test_a_repeat_finds_the_run_of_another_process(migrated_database: str) -> None:
    async with staged(migrated_database) as there, staged(migrated_database, seed=2) as here:
        hold = asyncio.Event()
        run = await there.play(opened(), hold, [Text(0, "hi")], ended(), caller=FIRST)
        await until(lambda: run.feed.events)
        again = await here.ask(caller=AGAIN)
        assert isinstance(again, Tail)
        with again.follow() as follower:
            hold.set()
            await follower.end()
        assert parsed(again.feed.events) == parsed(run.feed.events)
        assert here.backend.calls == []


async def test_two_repeats_at_once_on_two_workers_make_one_response(migrated_database: str) -> None:
    async with staged(migrated_database) as one, staged(migrated_database, seed=2) as other:
        for stage in (one, other):
            stage.backend.script(*[spoken("hi")] * 8)
        made = await asyncio.gather(*(stage.ask(caller=KEYED) for stage in (one, other) * 4))
        assert len({run.id for run in made}) == 1
        await asyncio.gather(*(run.ended for run in made if isinstance(run, Run)))
        assert len(one.backend.calls) + len(other.backend.calls) == 1


async def test_what_failed_is_no_answer_to_a_repeat(stage: Stage) -> None:
    run = await stage.play(UpstreamError("No."), caller=FIRST)
    await run.ended
    again = await stage.play(*spoken("hi"), caller=AGAIN)
    await again.ended
    assert (again.id != run.id, again.status) == (True, "completed")


async def test_what_ended_long_ago_is_not_meant(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=FIRST)
    await run.ended
    stage.clock.advance(601)
    again = await stage.play(*spoken("hi"), caller=AGAIN)
    await again.ended
    assert again.id != run.id


async def test_a_first_try_is_never_taken_for_a_repeat(stage: Stage) -> None:
    runs = []
    for _ in range(2):
        runs.append(await stage.play(*spoken("hi"), caller=FIRST))
        await runs[-1].ended
        stage.clock.advance(1)
    assert len(stage.backend.calls) == 2
    again = await stage.ask(caller=AGAIN)
    assert again.id == runs[1].id


async def test_a_key_with_another_body_is_refused(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=KEYED)
    await run.ended
    other = replace(KEYED, retry=Retry(b"k" * 16, b"c" * 16, attaches=True))
    with pytest.raises(KeyReused):
        await stage.ask("something else", caller=other)
    assert len(stage.backend.calls) == 1


@pytest.mark.parametrize("store", [True, False])
async def test_codex_asking_the_same_of_the_same_turn_attaches(stage: Stage, store: bool) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, [Text(0, "hi")], ended(), caller=CODEX, store=store)
    with run.follow():
        assert await stage.ask(caller=CODEX, store=store) is run
        hold.set()
        await run.ended
    again = await stage.ask(caller=CODEX, store=store)
    with again.follow() as follower:
        await follower.end()
    assert parsed(again.feed.events) == parsed(run.feed.events)
    assert len(stage.backend.calls) == 1
    assert len(stage.rows("SELECT * FROM items")) == 2


@pytest.mark.parametrize("changes", [{"turn_id": "turn 2"}, {"thread_key": "another"}, {"tenant": "other"}])
async def test_codex_asking_it_in_another_turn_thread_or_tenant_means_something_new(
    stage: Stage, changes: dict[str, str]
) -> None:
    run = await stage.play(*spoken("hi"), caller=CODEX)
    await run.ended
    again = await stage.play(*spoken("hi"), caller=replace(CODEX, **changes))  # type: ignore[arg-type]
    await again.ended
    assert len(stage.backend.calls) == 2


async def test_the_next_step_of_a_codex_turn_is_no_repeat(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=CODEX, store=False)
    await run.ended
    more = [*run.response()["output"], {"role": "user", "content": "and now?"}]
    given = [{"role": "user", "content": "hi"}, *more]
    again = await stage.play(*spoken("that"), caller=CODEX, store=False, input=given)
    await again.ended
    assert output_text(again.response()) == "that"


async def test_a_repeat_of_what_is_written_nowhere_attaches_while_it_runs(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, [Text(0, "hi")], ended(), caller=FIRST, store=False)
    assert not run.recorded
    assert await stage.ask(caller=AGAIN, store=False) is run
    hold.set()
    await run.ended
    again = await stage.play(*spoken("anew"), caller=AGAIN, store=False)
    await again.ended
    assert len(stage.backend.calls) == 2
