"""What becomes of a response that another process began: gone on with, begun again, or ended."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import orjson
import pytest

from responses_ingress.backends.base import Route
from responses_ingress.core.deltas import Accepted, Remember, Text
from responses_ingress.core.request import Caller
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ManualClock, ScriptedBackend, Step, ended, opened, spoken
from tests.invariants import check_stream
from tests.runs.stage import SESSION, Stage, output_text, staged, until

LEASE = 15.0
CAREFUL = Limits(flush_interval=0, lease=LEASE)
MEMORY = {"response_id": "upstream_1"}


@asynccontextmanager
async def survivor(url: str, *scripts: Sequence[Step], seed: int = 2) -> AsyncIterator[Stage]:
    """The process that finds what another left, when that one's leases have run out."""
    backend = ScriptedBackend(*scripts, resumable=True, goes_on=True)
    async with staged(url, CAREFUL, clock=ManualClock(1_760_000_000 + LEASE + 1), seed=seed, backend=backend) as stage:
        yield stage


@asynccontextmanager
async def dying(url: str) -> AsyncIterator[Stage]:
    """A process that stands still: its clock does, and nobody renews its leases."""
    async with staged(url, CAREFUL, backend=ScriptedBackend(resumable=True, goes_on=True)) as stage:
        yield stage


@pytest.mark.parametrize("background", [True, False])
async def test_what_its_backend_remembers_is_gone_on_with(migrated_database: str, background: bool) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play(
            [Accepted(), Remember(MEMORY)], asyncio.Event(), caller=SESSION, background=background, instructions="Hush."
        )
        await until(lambda: dead.journal(left.id))
        async with survivor(migrated_database, [opened()[1:], ended()]) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            (call,) = found.backend.calls
            assert (call.turn.resume, call.turn.response_id) == (MEMORY, left.id)
            assert call.turn.instructions == "Hush."


async def test_the_events_go_on_from_where_they_were(migrated_database: str) -> None:
    rest = [[*opened()[1:], Text(0, "the end")], ended()]
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event(), caller=SESSION)
        await until(lambda: dead.journal(left.id))
        async with survivor(migrated_database, rest) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            events = found.replayed(left.id)
            check_stream(events)
            assert output_text(events[-1]["response"]) == "the end"
            assert found.thread()["running"] is None
            assert found.rows("SELECT head FROM branches") == [{"head": 2}]


async def test_a_backend_that_cannot_go_on_is_not_asked_to(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event())
        await until(lambda: dead.journal(left.id))
        async with staged(migrated_database, CAREFUL, clock=ManualClock(dead.clock() + LEASE + 1), seed=2) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            assert found.backend.calls == []


async def test_it_goes_on_with_all_that_it_was_about(migrated_database: str) -> None:
    """A request that may have been lost on its way can only be repeated as it was."""
    async with dying(migrated_database) as dead:
        first = await dead.play(*spoken("one"), caller=SESSION)
        await first.ended
        left = await dead.play([Remember(MEMORY)], asyncio.Event(), caller=SESSION, background=True)
        await until(lambda: dead.journal(left.id))
        asked = dead.backend.calls[1].turn.items
        async with survivor(migrated_database, [opened(), ended()]) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            assert found.backend.calls[0].turn.items == asked
            assert [item["role"] for item in asked] == ["user", "assistant", "user"]


async def test_where_its_thread_has_been_taken_it_goes_on_beside(migrated_database: str) -> None:
    """It must not be begun a second time: its backend is at work on it."""
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event(), caller=SESSION, background=True)
        await until(lambda: dead.journal(left.id))
        await dead.change("UPDATE threads SET running = 'resp_x', lease_until = ?", dead.clock() + 3600)
        async with survivor(migrated_database, [opened()[1:], ended()]) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            (call,) = found.backend.calls
            assert call.turn.resume == MEMORY
            assert found.thread()["running"] == "resp_x"
            assert found.row(left.id)["branch_id"] != found.thread()["active_branch"]


async def test_it_goes_on_with_the_backend_that_began_it_wherever_its_model_leads_now(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event())
        await until(lambda: dead.journal(left.id))
        elsewhere = ScriptedBackend(name="elsewhere", resumable=True)

        def routes(backend: ScriptedBackend) -> Sequence[Route]:
            return [Route("scripted-model", elsewhere), Route("another", backend)]

        backend = ScriptedBackend([opened()[1:], ended()], resumable=True, goes_on=True)
        clock = ManualClock(dead.clock() + LEASE + 1)
        async with staged(migrated_database, CAREFUL, clock=clock, seed=2, routes=routes, backend=backend) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            assert (len(backend.calls), elsewhere.calls) == (1, [])


async def test_without_the_backend_that_began_it_it_fails_and_says_so(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event())
        await until(lambda: dead.journal(left.id))
        backend = ScriptedBackend(name="another", resumable=True)
        clock = ManualClock(dead.clock() + LEASE + 1)
        async with staged(migrated_database, CAREFUL, clock=clock, seed=2, backend=backend) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            assert "'scripted' of this response" in orjson.loads(found.row(left.id)["error"])["message"]
            assert (backend.calls, backend.cancelled) == ([], [])


async def test_what_nobody_has_seen_begins_again(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play(opened(), [Text(0, "half")], asyncio.Event(), background=True, stream=False)
        await until(lambda: len(dead.journal(left.id)) == 2)
        async with survivor(migrated_database, spoken("whole")) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")
            events = found.replayed(left.id)
            check_stream(events)
            assert output_text(events[-1]["response"]) == "whole"
            assert [len(found.rows(f"SELECT * FROM {table}")) for table in ("branches", "items")] == [1, 2]


async def test_what_somebody_has_seen_is_not_said_anew(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play(opened(), [Text(0, "half")], asyncio.Event(), background=True)
        await until(lambda: len(dead.journal(left.id)) == 2)
        async with survivor(migrated_database, spoken("whole")) as found:
            await until(lambda: found.row(left.id)["status"] == "failed")
            assert orjson.loads(found.row(left.id)["error"])["code"] == "server_restarted"
            assert found.backend.calls == []
            check_stream(found.replayed(left.id))


async def test_what_was_followed_but_had_said_nothing_begins_again(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted()], asyncio.Event(), background=True)
        await until(lambda: dead.journal(left.id))
        async with survivor(migrated_database, spoken("whole")) as found:
            await until(lambda: found.row(left.id)["status"] == "completed")


@pytest.mark.parametrize(("deaths", "ends"), [(3, "completed"), (4, "failed")])
async def test_what_takes_its_process_down_each_time_is_ended(migrated_database: str, deaths: int, ends: str) -> None:
    """The fifth process may still try; it is the next that is not to."""
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted()], asyncio.Event(), background=True)
        await until(lambda: dead.journal(left.id))
        await dead.change(f"UPDATE responses SET attempts = {deaths} WHERE id = ?", left.id)
        async with survivor(migrated_database, spoken("whole")) as found:
            await until(lambda: found.row(left.id)["status"] == ends)
            assert len(found.backend.calls) == (1 if ends == "completed" else 0)


async def test_a_cancel_that_its_process_did_not_live_to_see_is_done_upstream_too(migrated_database: str) -> None:
    async with dying(migrated_database) as dead:
        left = await dead.play([Accepted(), Remember(MEMORY)], asyncio.Event(), background=True)
        await until(lambda: dead.journal(left.id))
        # With its owner's name gone too: a process that stands still only by its clock would hear of the cancel.
        await dead.change("UPDATE responses SET asked = 'cancel', owner = 'dead' WHERE id = ?", left.id)
        async with survivor(migrated_database) as found:
            await until(lambda: found.row(left.id)["status"] == "cancelled")
            assert found.backend.cancelled == [MEMORY]
            check_stream(found.replayed(left.id))


async def test_what_cannot_be_read_fails_alone(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_background=1)) as full:
        await full.play(asyncio.Event(), background=True)
        broken, good = [await full.ask(background=True) for _ in range(2)]
        await full.change("UPDATE responses SET request = ? WHERE id = ?", b"{", broken.id)
        async with staged(migrated_database, seed=2) as found:
            found.backend.script(spoken("hi"))
            await until(lambda: found.row(good.id)["status"] == "completed")
            await until(lambda: found.row(broken.id)["status"] == "failed")


async def test_a_clients_own_key_is_not_kept_for_another_process(migrated_database: str) -> None:
    async with staged(migrated_database, Limits(max_background=1)) as full:
        await full.play(asyncio.Event(), background=True)
        waiting = await full.ask(background=True, caller=Caller(bearer="secret"))
        async with staged(migrated_database, seed=2) as found:
            found.backend.script(spoken("hi"))
            await until(lambda: found.row(waiting.id)["status"] == "completed")
            assert found.backend.calls[0].turn.bearer is None


# Handing over.


async def test_a_stopped_process_gives_back_what_nobody_has_seen(migrated_database: str) -> None:
    async with staged(migrated_database, CAREFUL) as stage:
        run = await stage.play(opened(), [Text(0, "half")], asyncio.Event(), background=True, stream=False)
        await until(lambda: len(stage.journal(run.id)) == 2)
        await stage.runner.close(0)
        row = stage.row(run.id)
        assert (row["status"], row["owner"], stage.journal(run.id)) == ("queued", None, [])
        assert run.handed_over
        assert stage.backend.calls[0].cut
        async with staged(migrated_database, seed=2) as next_one:
            next_one.backend.script(spoken("whole"))
            await until(lambda: next_one.row(run.id)["status"] == "completed")


async def test_a_stopped_process_closes_what_has_been_seen(migrated_database: str) -> None:
    async with staged(migrated_database, CAREFUL) as stage:
        run = await stage.play(opened(), [Text(0, "half")], asyncio.Event(), background=True)
        await until(lambda: len(stage.journal(run.id)) == 2)
        await stage.runner.close(0)
        assert orjson.loads(stage.row(run.id)["error"])["code"] == "server_restarted"
        check_stream(stage.replayed(run.id))


async def test_a_stopped_process_leaves_to_others_what_its_backend_remembers(migrated_database: str) -> None:
    async with dying(migrated_database) as stage:
        run = await stage.play([Accepted(), Remember(MEMORY)], asyncio.Event(), caller=SESSION)
        await until(lambda: stage.journal(run.id))
        await stage.runner.close(0)
        assert (stage.row(run.id)["status"], stage.row(run.id)["owner"]) == ("in_progress", None)
        assert stage.backend.cancelled == []
        backend = ScriptedBackend([[*opened()[1:]], ended()], resumable=True, goes_on=True)
        async with staged(migrated_database, CAREFUL, seed=2, backend=backend) as next_one:
            await until(lambda: next_one.row(run.id)["status"] == "completed")
            assert backend.calls[0].turn.resume == MEMORY
            assert next_one.thread()["running"] is None
