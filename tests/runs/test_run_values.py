"""What a run adds to what its backend says: ids, times, what it counts, and when it tells of acceptance."""

import asyncio

from responses_ingress.core.deltas import Accepted, Close, Finish, Open
from responses_ingress.errors import UpstreamError
from responses_ingress.ids import partition_of
from responses_ingress.testing import ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import Stage, events_of, loop_turns


async def test_ids_carry_the_threads_partition_and_unnamed_calls_get_a_name(stage: Stage) -> None:
    call = {"type": "function_call", "status": "in_progress", "name": "look", "call_id": "", "arguments": ""}
    named = {**call, "id": "theirs", "call_id": "call_theirs"}
    run = await stage.play([Accepted(), Open(0, call), Close(0), Open(1, named), Close(1), Finish("completed")])
    check_stream(await events_of(run))
    first, second = run.response()["output"]
    assert (
        partition_of(first["id"]) == partition_of(second["id"]) == partition_of(run.id) == partition_of(run.thread_id)
    )
    assert second["id"] != "theirs"
    assert first["call_id"].startswith("call_")
    assert second["call_id"] == "call_theirs"
    assert list(first)[0] == "id"


async def test_a_completed_response_tells_when(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(opened(), hold, ended())
    await stage.backend.called(1)
    stage.clock.advance(7)
    hold.set()
    response = (await events_of(run))[-1]["response"]
    assert response["completed_at"] - response["created_at"] == 7


async def test_a_run_knows_that_its_backend_gave_no_usage(stage: Stage) -> None:
    given, missing = await stage.play(*spoken("hi")), await stage.play([Finish("completed")])
    await asyncio.gather(given.ended, missing.ended)
    assert (given.usage_missing, missing.usage_missing) == (False, True)
    assert missing.response()["usage"]["total_tokens"] == 0


async def test_acceptance_is_told_when_the_backend_accepts_or_the_run_is_over(stage: Stage) -> None:
    hold = asyncio.Event()
    run = await stage.play(hold, *spoken("hi"))
    await stage.backend.called(1)
    await loop_turns()
    assert not run.accepted.done()
    hold.set()
    await run.accepted
    assert run.was_accepted
    refused = await stage.play(UpstreamError("No."))
    await refused.accepted
    assert (refused.was_accepted, refused.error is not None) == (False, True)
