import asyncio
from collections.abc import Sequence

import pytest

from responses_ingress.backends.base import Backend, Route
from responses_ingress.core.deltas import Finish, Text
from responses_ingress.core.request import Caller, parse_request
from responses_ingress.errors import (
    Busy,
    Cancelled,
    InvalidRequest,
    ModelNotFound,
    PreviousNotCompleted,
    PreviousNotFound,
    UpstreamError,
)
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ScriptedBackend, ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import (
    SESSION,
    Stage,
    events_of,
    locked,
    loop_turns,
    output_text,
    staged,
    taken,
    types,
    until,
)

ELSEWHERE = Caller(thread_key="another session")


def roles(stage: Stage, call: int) -> list[str]:
    """Who said what the backend was given."""
    return [item["role"] for item in stage.backend.calls[call].turn.items]


# Routes.


async def test_a_route_leads_to_a_backend_and_the_name_it_knows_the_model_by(migrated_database: str) -> None:
    other = ScriptedBackend(spoken("from the other"), name="other")

    def routes(backend: Backend) -> Sequence[Route]:
        return [Route("small", other, "vendor/small-1"), Route("big-*", backend)]

    async with staged(migrated_database, routes=routes) as stage:
        small, big = await stage.create(model="small"), await stage.play(*spoken("hi"), model="big-2")
        await asyncio.gather(small.ended, big.ended)
        assert (other.calls[0].turn.model, stage.backend.calls[0].turn.model) == ("vendor/small-1", "big-2")
        assert (small.response()["model"], big.response()["model"]) == ("small", "big-2")
        assert [stage.row(run.id)["backend"] for run in (small, big)] == ["other", "scripted"]


async def test_a_model_without_a_route_is_refused_before_anything_is_written(migrated_database: str) -> None:
    async with staged(migrated_database, routes=lambda backend: [Route("big-*", backend)]) as stage:
        with pytest.raises(ModelNotFound) as refused:
            await stage.create(model="small", caller=SESSION)
        assert refused.value.param == "model"
        assert stage.backend.calls == []
        assert stage.rows("SELECT * FROM threads") == stage.rows("SELECT * FROM responses") == []


async def test_the_models_are_the_routed_names_and_what_the_backends_behind_patterns_know(
    migrated_database: str,
) -> None:
    silent = ScriptedBackend(name="silent", models=UpstreamError("It cannot be asked."))

    def routes(backend: ScriptedBackend) -> Sequence[Route]:
        known = ScriptedBackend(name="known", models=("b", "scripted-model", "c"))
        return [Route("a", silent), Route("big-*", known), Route("?", silent), Route("b", known), Route("*", backend)]

    async with staged(migrated_database, routes=routes) as stage:
        assert await stage.runner.models() == ["a", "b", "scripted-model", "c"]


async def test_the_backend_gets_the_turn_and_all_of_it(stage: Stage) -> None:
    tool = {"type": "function", "name": "look", "parameters": {}}
    caller = Caller(thread_key="a session", bearer="theirs")
    fields = {"instructions": "Be brief.", "tools": [tool], "tool_choice": "required", "temperature": 0.5, "odd": [1]}
    run = await stage.play(*spoken("hi"), caller=caller, **fields)
    await run.ended
    turn = stage.backend.calls[0].turn
    assert (turn.response_id, turn.thread_id, turn.bearer) == (run.id, run.thread_id, "theirs")
    assert (turn.instructions, turn.tools, turn.tool_choice) == ("Be brief.", [tool], "required")
    assert (turn.parameters["temperature"], turn.parameters["odd"], turn.stream) == (0.5, [1], True)


# Limits.


async def test_one_run_more_than_the_limit_is_refused_until_one_has_ended(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_runs=2)) as stage:
        hold = asyncio.Event()
        runs = [await stage.play(hold, *spoken("hi")) for _ in range(2)]
        with pytest.raises(Busy) as refused:
            await stage.create()
        assert refused.value.retry_after == 1
        hold.set()
        await asyncio.gather(*(run.ended for run in runs))
        run = await stage.play(*spoken("hi"))
        await run.ended
        assert run.status == "completed"


async def test_the_limit_holds_for_requests_that_come_together(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_runs=2)) as stage:
        stage.backend.script(*[[asyncio.Event()]] * 5)
        callers = [Caller(thread_key=f"session {number}") for number in range(5)]
        begun = await asyncio.gather(*(stage.create(caller=caller) for caller in callers), return_exceptions=True)
        assert [isinstance(result, Busy) for result in begun].count(True) == 3


# One turn at a time.


async def test_the_next_turn_of_a_session_waits_for_the_running_one_and_sees_what_it_said(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(opened(), hold, [Text(0, "one")], ended(), caller=SESSION)
    with first.feed.follow():
        second = asyncio.create_task(stage.play(*spoken("two"), caller=SESSION))
        elsewhere = await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)
        await elsewhere.ended
        assert not second.done()
        assert len(stage.backend.calls) == 2
        hold.set()
        await (await second).ended
    assert first.status == "completed"
    assert roles(stage, 2) == ["user", "assistant", "user"]


async def test_turns_of_one_session_that_come_together_run_one_after_the_other(stage: Stage) -> None:
    async def turn() -> None:
        run = await stage.create(caller=SESSION)
        with run.feed.follow() as follower:
            await follower.end()

    stage.backend.script(*[spoken("hi")] * 4)
    await asyncio.gather(*(turn() for _ in range(4)))
    assert [len(call.turn.items) for call in stage.backend.calls] == [1, 3, 5, 7]
    assert stage.rows("SELECT count(*) AS n FROM branches") == [{"n": 1}]


async def test_a_turn_that_read_its_thread_too_soon_reads_it_again(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(hold, *spoken("one"), caller=SESSION)
    await stage.backend.called(1)
    async with locked(stage.url):
        hold.set()
        await until(lambda: first.status == "completed")  # which nobody can read yet
        uses = stage.database.uses
        second = asyncio.create_task(stage.play(*spoken("two"), caller=SESSION))
        await until(lambda: stage.database.uses > uses and not stage.database.users)
    await (await second).ended
    assert roles(stage, 1) == ["user", "assistant", "user"]


async def test_a_run_that_nobody_follows_makes_way_for_the_next_turn(stage: Stage) -> None:
    first = await stage.play(opened(), [Text(0, "half")], asyncio.Event(), caller=SESSION)
    with first.feed.follow():
        await taken(first, "half")
    second = await stage.play(*spoken("two"), caller=SESSION)
    await second.ended
    assert (first.status, second.status) == ("cancelled", "completed")
    check_stream(await events_of(first))
    assert stage.backend.calls[0].cut
    assert roles(stage, 1) == ["user"]


async def test_who_waits_for_a_thread_has_it_as_soon_as_its_run_is_left(
    migrated_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.runs.runner.POLL", 3600)
    async with staged(migrated_database, Limits(disconnect_grace=3600)) as stage:
        first = await stage.play(opened(), asyncio.Event(), caller=SESSION)
        with first.follow():
            second = asyncio.create_task(stage.play(*spoken("two"), caller=SESSION))
            await (await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
            assert not second.done()
        async with asyncio.timeout(20):
            await (await second).ended
        assert first.status == "cancelled"


async def test_who_waits_for_a_run_does_not_look_again_whenever_it_journals(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(flush_interval=0)) as stage:
        hold, going_on = asyncio.Event(), asyncio.Event()
        first = await stage.play(opened(), hold, *[[Text(0, "word ")]] * 60, going_on, ended(), caller=SESSION)
        with first.follow():
            second = asyncio.create_task(stage.play(*spoken("two"), caller=SESSION))
            await (await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
            uses = stage.database.uses
            hold.set()
            await until(lambda: len(stage.journal(first.id)) > 60)
            assert stage.database.uses - uses < 30  # some, should this take seconds
            going_on.set()
            await (await second).ended


async def test_a_background_run_makes_way_for_nobody(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(hold, *spoken("one"), caller=SESSION, background=True)
    second = asyncio.create_task(stage.play(*spoken("two"), caller=SESSION))
    await (await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
    assert not second.done()
    hold.set()
    await (await second).ended
    assert first.status == "completed"


async def test_turns_that_wait_for_their_thread_come_in_the_order_they_came(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(hold, *spoken("0"), caller=SESSION)
    stage.backend.script(*[spoken("hi")] * 3)
    waiting = []
    with first.feed.follow():
        for number in ("1", "2", "3"):
            waiting.append(asyncio.create_task(stage.create(number, caller=SESSION)))
            await loop_turns()
        await stage.backend.called(1)
        hold.set()
        await first.ended
    for task in waiting:
        await (await task).ended
    asked = [output_text({"output": call.turn.new}) for call in stage.backend.calls]
    assert asked[1:] == ["1", "2", "3"]


async def test_a_request_whose_client_leaves_while_it_waits_begins_nothing(stage: Stage) -> None:
    hold, gone = asyncio.Event(), asyncio.Event()

    async def leaving() -> None:
        await gone.wait()

    first = await stage.play(hold, *spoken("one"), caller=SESSION)
    request = parse_request({"model": "scripted-model", "input": "two"})
    with first.feed.follow():
        waiting = asyncio.create_task(stage.runner.create(request, SESSION, leaving))
        await (await stage.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
        gone.set()
        with pytest.raises(Cancelled):
            await waiting
        hold.set()
        await first.ended
    last = await stage.play(*spoken("three"), caller=SESSION)
    await last.ended
    assert roles(stage, 2) == ["user", "assistant", "user"]


@pytest.mark.parametrize("wait", [0, 0.02])
async def test_a_turn_that_has_waited_long_enough_is_told_to_come_again(migrated_database: str, wait: float) -> None:
    async with staged(migrated_database, Limits(thread_wait=wait)) as stage:
        first = await stage.play(asyncio.Event(), caller=SESSION)
        with first.feed.follow():
            with pytest.raises(Busy) as refused:
                await stage.create(caller=SESSION)
            assert (refused.value.status, refused.value.retry_after) == (503, 2)
            assert first.status == "in_progress"
        assert len(stage.rows("SELECT id FROM responses")) == 1


async def test_a_thread_that_another_process_is_at_is_waited_for(migrated_database: str) -> None:
    async with staged(migrated_database) as there, staged(migrated_database, seed=2) as here:
        hold = asyncio.Event()
        first = await there.play(hold, *spoken("one"), caller=SESSION)
        with first.follow():  # else it would make way
            second = asyncio.create_task(here.play(*spoken("two"), caller=SESSION))
            await (await here.play(*spoken("meanwhile"), caller=ELSEWHERE)).ended
            assert not second.done()
            hold.set()
            await (await second).ended
        assert first.status == "completed"
        assert len(here.backend.calls[1].turn.items) == 3


async def test_the_same_session_of_two_tenants_is_two_threads(stage: Stage) -> None:
    first = await stage.play(asyncio.Event(), caller=Caller(tenant="a", thread_key="a session"))
    second = await stage.play(*spoken("hi"), caller=Caller(tenant="b", thread_key="a session"))
    await second.ended
    assert first.thread_id != second.thread_id
    assert first.status == "in_progress"


# Clients that leave.


async def test_a_run_that_was_left_is_cancelled_after_the_grace_period(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(disconnect_grace=0.01)) as stage:
        run = await stage.play(opened(), [Text(0, "half")], asyncio.Event(), caller=SESSION)
        with run.feed.follow():
            await taken(run, "half")
        await run.ended
        assert run.status == "cancelled"
        assert stage.row(run.id)["status"] == "cancelled"
        assert stage.thread()["running"] is None
        assert stage.backend.calls[0].cut


async def test_a_run_that_is_picked_up_in_time_goes_on(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(disconnect_grace=0)) as stage:
        hold = asyncio.Event()
        run = await stage.play(opened(), hold, [Text(0, "whole")], ended())
        with run.feed.follow():
            await stage.backend.called(1)
        with run.feed.follow() as follower:
            await loop_turns()  # in which the grace period ends
            hold.set()
            await follower.end()
        assert output_text(run.response()) == "whole"


async def test_every_time_a_run_is_left_it_has_the_whole_grace_period(migrated_database: str) -> None:
    grace = 0.1
    async with staged(migrated_database, Limits(disconnect_grace=grace)) as stage:
        hold = asyncio.Event()
        run = await stage.play(hold, *spoken("whole"))
        await stage.backend.called(1)
        loop = asyncio.get_running_loop()
        left = loop.time()
        run.feed.follow().leave()
        again = run.feed.follow()
        loop.call_at(left + 0.8 * grace, again.leave)
        back = asyncio.Event()

        def come_back() -> None:  # when the first grace period is over and the second is not
            run.feed.follow()
            back.set()

        loop.call_at(left + 1.2 * grace, come_back)
        await back.wait()
        hold.set()
        await run.ended
        assert run.status == "completed"


async def test_a_background_run_goes_on_without_anyone(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(disconnect_grace=0)) as stage:
        hold = asyncio.Event()
        run = await stage.play(hold, *spoken("whole"), background=True)
        with run.feed.follow():
            await stage.backend.called(1)
        await loop_turns()
        hold.set()
        check_stream(await events_of(run))
        assert run.status == "completed"


# Chains.


async def test_a_request_that_builds_on_a_running_response_waits_for_it(stage: Stage) -> None:
    hold = asyncio.Event()
    first = await stage.play(hold, *spoken("one"))
    await until(lambda: types(first))
    second = asyncio.create_task(stage.play(*spoken("two"), previous_response_id=first.id))
    await (await stage.play(*spoken("meanwhile"))).ended
    assert not second.done()
    hold.set()
    await (await second).ended
    assert first.status == "completed"  # though nobody followed it: it does not make way for its own child
    assert roles(stage, 2) == ["user", "assistant", "user"]


async def test_a_request_that_builds_on_a_response_that_runs_too_long_is_told_to_come_again(
    migrated_database: str,
) -> None:
    async with staged(migrated_database, Limits(thread_wait=0.02)) as stage:
        first = await stage.play(asyncio.Event())
        await until(lambda: types(first))
        with pytest.raises(Busy):
            await stage.create(previous_response_id=first.id)


async def test_children_of_one_response_that_come_together_do_not_wait_for_one_another(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(thread_wait=0.01)) as stage:
        parent = await stage.play(*spoken("one"))
        await parent.ended
        stage.backend.script(*[spoken("child")] * 3)
        children = await asyncio.gather(*(stage.create(previous_response_id=parent.id) for _ in range(3)))
        await asyncio.gather(*(child.ended for child in children))
        assert [child.status for child in children] == ["completed"] * 3


async def test_two_children_of_one_response_run_side_by_side(stage: Stage) -> None:
    parent = await stage.play(*spoken("one"))
    await parent.ended
    holds = asyncio.Event(), asyncio.Event()
    left = await stage.play(holds[0], *spoken("left"), previous_response_id=parent.id)
    right = await stage.play(holds[1], *spoken("right"), previous_response_id=parent.id)
    await stage.backend.called(3)
    holds[1].set()
    await right.ended
    holds[0].set()
    await left.ended
    assert [len(call.turn.items) for call in stage.backend.calls[1:]] == [3, 3]
    grandchild = await stage.play(*spoken("last"), previous_response_id=left.id)
    await grandchild.ended
    said = [output_text({"output": [item]}) for item in stage.backend.calls[3].turn.items]
    assert [text for text in said if text in ("one", "left", "right")] == ["one", "left"]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_response_that_failed_or_was_cancelled_cannot_be_built_on(
    migrated_database: str, cancelled: bool
) -> None:
    async with staged(migrated_database, Limits(disconnect_grace=0)) as stage:
        run = await stage.play(opened(), asyncio.Event() if cancelled else UpstreamError("No."))
        with run.feed.follow():
            await until(lambda: types(run))
        await run.ended
        assert run.status == ("cancelled" if cancelled else "failed")
        with pytest.raises(PreviousNotCompleted) as refused:
            await stage.create(previous_response_id=run.id)
        assert refused.value.param == "previous_response_id"


async def test_an_incomplete_response_can_be_built_on(stage: Stage) -> None:
    last = Finish("incomplete", reason="max_output_tokens")
    first = await stage.play(opened(), [Text(0, "one"), last])
    await first.ended
    second = await stage.play(*spoken("two"), previous_response_id=first.id)
    await second.ended
    assert roles(stage, 1) == ["user", "assistant", "user"]


async def test_a_previous_response_that_is_not_there_is_refused_before_anything_is_written(stage: Stage) -> None:
    run = await stage.play(*spoken("one"), caller=Caller(tenant="a"))
    await run.ended
    for id in ("resp_none", run.id):
        with pytest.raises(PreviousNotFound) as refused:
            await stage.create(caller=Caller(tenant="b"), previous_response_id=id)
        assert refused.value.message == f"Previous response with id '{id}' not found."
    assert len(stage.rows("SELECT id FROM responses")) == 1


async def test_an_ended_response_is_deleted_once_and_a_running_one_not_at_all(stage: Stage) -> None:
    run = await stage.play(*spoken("one"))
    await run.ended
    assert not await stage.runner.delete("another tenant", run.id)
    assert await stage.runner.delete("", run.id)
    assert not await stage.runner.delete("", run.id)
    running = await stage.play(asyncio.Event())
    await until(lambda: types(running))
    with pytest.raises(InvalidRequest, match="in-flight"):
        await stage.runner.delete("", running.id)
