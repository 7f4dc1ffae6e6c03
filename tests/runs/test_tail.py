"""Following a response from outside its run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import Engine
from sqlalchemy.event import listen, remove

from responses_ingress.core.builder import Event
from responses_ingress.core.deltas import Close, Remember, Text
from responses_ingress.errors import (
    Busy,
    ContextLengthExceeded,
    CursorExpired,
    IngressError,
    ServerRestarted,
    StoreUnavailable,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from responses_ingress.runs.feed import Follower
from responses_ingress.runs.runner import Limits
from responses_ingress.runs.tail import Tail
from responses_ingress.store.responses import StoredResponse, load
from responses_ingress.store.retention import drop_journals
from responses_ingress.testing import ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import (
    SESSION,
    Stage,
    events_of,
    output_text,
    parsed,
    read_until,
    staged,
    taken,
    until,
)

QUICK = Limits(flush_interval=0.01)


@asynccontextmanager
async def two(url: str, limits: Limits = QUICK) -> AsyncIterator[tuple[Stage, Stage]]:
    """The process that runs, and the one that follows."""
    async with staged(url, limits) as there, staged(url, limits, seed=2) as here:
        yield there, here


async def row_of(stage: Stage, response_id: str) -> StoredResponse:
    async with stage.database.reading() as connection:
        (row,) = await load(connection, [response_id])
    return row


async def tail_of(stage: Stage, response_id: str, after: int | None = None) -> Tail:
    tail = await stage.runner.follow(await row_of(stage, response_id), after)
    assert isinstance(tail, Tail)
    return tail


async def test_another_process_sees_the_same_events_as_they_come(migrated_database: str) -> None:
    async with two(migrated_database) as (there, here):
        hold = asyncio.Event()
        run = await there.play(opened(), [Text(0, "so ")], hold, [Text(0, "far")], ended())
        with run.follow():
            await taken(run, "so ")
            tail = await tail_of(here, run.id)
            with tail.follow() as follower:
                await read_until(follower, "response.output_text.delta")
                assert not run.ended.done()
                hold.set()
                await follower.end()
            await run.ended
        assert parsed(tail.feed.events) == parsed(run.feed.events)
        assert tail.response() == run.response()


@pytest.mark.parametrize(
    "error",
    [
        UpstreamError("No."),
        UpstreamTimeout("No."),
        UpstreamRefused("No."),
        UpstreamError("No.", code="rate_limit_exceeded", status=429),
        UpstreamError("No.", code="server_is_overloaded", status=503),
        ContextLengthExceeded("No."),
        Busy("No."),
        ServerRestarted("No."),
        StoreUnavailable("No."),
    ],
    ids=lambda error: error.code,
)
async def test_another_process_tells_a_failure_as_the_same_http_error(
    migrated_database: str, error: IngressError
) -> None:
    async with two(migrated_database) as (there, here):
        run = await there.play(error)
        await run.ended
        tail = await tail_of(here, run.id)
        with tail.follow() as follower:
            await follower.end()
        failure = tail.failure()
    assert failure is not None and run.error is not None
    assert (failure.status, failure.code, failure.message) == (run.error.status, run.error.code, run.error.message)


async def test_another_process_is_woken_by_what_is_journaled(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite wakes no other process: there it looks each second."""
    monkeypatch.setattr("responses_ingress.runs.tail.POLL", 3600)
    async with two(postgres_database) as (there, here), asyncio.timeout(30):
        hold = asyncio.Event()
        run = await there.play(opened(), [Text(0, "so ")], hold, [Text(0, "far")], asyncio.Event(), background=True)
        with (await tail_of(here, run.id)).follow() as follower:
            await read_until(follower, "response.output_text.delta")
            hold.set()
            await read_until(follower, "response.output_text.delta")


async def test_a_follower_in_the_process_of_the_run_gets_text_before_it_is_journaled(unhurried: Stage) -> None:
    run = await unhurried.play(opened(), [Text(0, "so far")], asyncio.Event(), background=True)
    await taken(run, "so far")
    with (await unhurried.runner.follow(await row_of(unhurried, run.id), None)).follow() as follower:
        await read_until(follower, "response.output_text.delta")
    assert not any(b"so far" in entry["payload"] for entry in unhurried.journal(run.id))


async def test_a_tail_that_began_before_its_run_goes_on_with_it(migrated_database: str) -> None:
    """What waits in the queue is followed through the database; when it runs here, as it comes."""
    async with staged(migrated_database, Limits(max_background=1, flush_interval=3600)) as stage:
        hold, later = asyncio.Event(), asyncio.Event()
        await stage.play(hold, *spoken("1"), background=True)
        stage.backend.script([opened(), [Text(0, "live")], later, ended()])
        waiting = await stage.ask(background=True)
        assert isinstance(waiting, Tail)
        with waiting.follow() as follower:
            await read_until(follower, "response.queued")
            hold.set()
            await read_until(follower, "response.output_text.delta")
            assert not any(b"live" in entry["payload"] for entry in stage.journal(waiting.id))
            later.set()
            await follower.end()
        check_stream(parsed(waiting.feed.events))


async def test_many_followers_share_one_tail_and_each_gets_all(migrated_database: str) -> None:
    async with two(migrated_database) as (there, here):
        hold = asyncio.Event()
        run = await there.play(opened(), hold, *[[Text(0, str(number))] for number in range(50)], ended())
        with run.follow():
            await until(lambda: there.journal(run.id))
            tails = [await tail_of(here, run.id)]
            followers = [tails[0].follow()]
            tails += [await tail_of(here, run.id) for _ in range(20)]
            followers += [tail.follow() for tail in tails[1:]]
            assert len(set(map(id, tails))) == 1
            hold.set()
            seen = [[event async for event in _all(follower)] for follower in followers]
        assert all(events == seen[0] for events in seen)
        assert [event.number for event in seen[0]] == list(range(len(seen[0])))


async def _all(follower: Follower) -> AsyncIterator[Event]:
    while not follower.done:
        for event in await follower.next(7):
            yield event


async def test_a_tail_that_nobody_follows_any_more_ends_and_the_next_follower_begins_another(
    migrated_database: str,
) -> None:
    async with two(migrated_database) as (there, here):
        hold = asyncio.Event()
        run = await there.play(opened(), hold, ended(), background=True)
        await until(lambda: there.journal(run.id))
        first = await tail_of(here, run.id)
        with first.follow() as follower:
            await read_until(follower, "response.in_progress")
        await first.ended
        second = await tail_of(here, run.id)
        assert second is not first
        with second.follow() as follower:
            hold.set()
            await follower.end()
        check_stream(parsed(second.feed.events))


@pytest.mark.parametrize("after", [0, 3, 6])
async def test_a_follower_may_begin_anywhere(stage: Stage, after: int) -> None:
    run = await stage.play(*spoken("a", "b", "c"))
    await run.ended
    with (await stage.runner.follow(await row_of(stage, run.id), after)).follow(after + 1) as follower:
        seen = [event.number async for event in _all(follower)]
    assert seen == list(range(after + 1, len(run.feed.events)))


async def test_whoever_follows_elsewhere_keeps_a_run_going(migrated_database: str) -> None:
    async with two(migrated_database, Limits(flush_interval=0.01, disconnect_grace=0.2)) as (there, here):
        hold = asyncio.Event()
        run = await there.play(opened(), hold, [Text(0, "whole")], ended())
        left = run.follow()
        await until(lambda: there.journal(run.id))
        tail = await tail_of(here, run.id)
        with tail.follow() as follower:
            await until(lambda: there.row(run.id)["followed_until"])
            left.leave()
            await asyncio.wait((run.ended,), timeout=0.5)  # longer than the grace
            assert not run.ended.done()
            hold.set()
            await follower.end()
        assert output_text(tail.response()) == "whole"


async def test_what_was_not_streamed_can_be_followed_while_it_runs(migrated_database: str) -> None:
    async with staged(migrated_database, QUICK) as stage:
        hold = asyncio.Event()
        run = await stage.play(opened(), [Text(0, "so far")], hold, ended(), stream=False)
        with run.follow():
            await until(lambda: stage.journal(run.id))
            tail = await tail_of(stage, run.id)
            with tail.follow() as follower:
                await read_until(follower, "response.output_text.delta")
                hold.set()
                await follower.end()
        check_stream(parsed(tail.feed.events))
        assert tail.response() == run.response()


async def test_what_was_not_streamed_and_not_journaled_is_told_by_its_output(stage: Stage) -> None:
    run = await stage.play(*spoken("all at once"), stream=False)
    await run.ended
    assert stage.journal(run.id) == []
    tail = await tail_of(stage, run.id)
    with tail.follow() as follower:
        await follower.end()
    events = parsed(tail.feed.events)
    check_stream(events)
    assert events[-1]["response"] == run.response()


@pytest.mark.parametrize("cut", [False, True])
async def test_when_its_journal_is_gone_a_response_is_told_anew_but_from_no_number(stage: Stage, cut: bool) -> None:
    last = [[Close(0)], ValueError("broke")] if cut else [ended()]
    run = await stage.play(opened(), [Text(0, "hi")], *last)
    await run.ended
    stage.clock.advance(601)
    async with stage.database.transaction() as connection:
        assert await drop_journals(connection, stage.clock()) == 1
    tail = await tail_of(stage, run.id)
    with tail.follow() as follower:
        await follower.end()
    events = parsed(tail.feed.events)
    check_stream(events)
    assert events[-1]["response"] == run.response()
    with pytest.raises(CursorExpired):
        await tail_of(stage, run.id, after=2)


async def test_whether_numbers_are_kept_is_known_without_reading_what_was_said(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"))
    await run.ended
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    listen(Engine, "before_cursor_execute", note)
    try:
        await tail_of(stage, run.id, after=2)
    finally:
        remove(Engine, "before_cursor_execute", note)
    assert [statement for statement in seen if "FROM journal" in statement]
    assert not [statement for statement in seen if "journal.payload" in statement]


async def test_a_response_that_begins_again_elsewhere_is_followed_on(migrated_database: str) -> None:
    """Handed over before it had said anything: its first events are the same again, and come once."""
    async with staged(migrated_database, seed=3) as here:
        async with staged(migrated_database, QUICK) as there:
            run = await there.play([opened()[0]], asyncio.Event(), background=True)
            await until(lambda: there.journal(run.id))
            here.backend.script(spoken("in the end"))
            tail = await tail_of(here, run.id)
            with tail.follow() as follower:
                await read_until(follower, "response.in_progress")
                await there.runner.close(0)
                await follower.end()
        events = parsed(tail.feed.events)
        check_stream(events)
        assert output_text(events[-1]["response"]) == "in the end"
        assert run.handed_over


async def test_a_deleted_response_ends_its_tail(stage: Stage) -> None:
    run = await stage.play(*spoken("hi"), caller=SESSION)
    await run.ended
    tail = await tail_of(stage, run.id)
    assert await stage.runner.delete("", run.id)
    with tail.follow() as follower:
        await follower.end()
    assert tail.feed.ended


async def test_what_a_backend_remembers_is_written_before_it_goes_on(unhurried: Stage) -> None:
    hold = asyncio.Event()
    run = await unhurried.play([*opened()[:1], Remember({"id": "u1"})], hold, *spoken("hi")[1:])
    await until(lambda: unhurried.journal(run.id))
    hold.set()
    await events_of(run)


async def test_a_long_journal_is_told_in_portions_so_that_others_have_their_turn(migrated_database: str) -> None:
    words = [Text(0, str(number)) for number in range(1000)]
    async with two(migrated_database) as (there, here):
        run = await there.play(opened(), words, ended())
        await run.ended
        with (await tail_of(here, run.id)).follow() as follower:
            first = await follower.next(10_000)
            rest = [event async for event in _all(follower)]
        assert 0 < len(first) < 500
        assert parsed([*first, *rest]) == parsed(run.feed.events)
