"""Two server processes on one PostgreSQL, as on two hosts: whatever runs on one can be reached on the other."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import pytest_asyncio
from sqlalchemy import URL

from tests.acceptance.calls import (
    ASK,
    BACKGROUND,
    STREAM,
    call,
    cancel,
    create,
    created,
    ended,
    followed,
    retrieve,
    says,
    streaming,
    text_of,
)
from tests.conftest import run_on, shown
from tests.invariants import check_stream
from tests.server import ServerProcess
from tests.stranger import stranger
from tests.upstream import Drop, Reply, Say, Stream, Upstream, chunk
from tests.wire import Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

GRACE, LEASE, IMPATIENCE = 2.0, 2.0, 1.0
HASTY = {**ASK, "model": "hasty-model"}
Pair = tuple[ServerProcess, ServerProcess]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def model() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(model: Upstream) -> Upstream:
    """The one upstream of both servers, as good as new."""
    model.requests.clear()
    model.answer = None
    assert model.unused == 0, "the test before this one has left answers"
    return model


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def database(postgres: URL, postgres_template: str) -> AsyncIterator[URL]:
    name = f"ingress_workers_{os.getpid()}"
    await run_on(postgres, f"CREATE DATABASE {name} TEMPLATE {postgres_template} STRATEGY file_copy")
    yield postgres.set(database=name)
    await run_on(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(model: Upstream, database: URL) -> AsyncIterator[Pair]:
    upstreams = {
        "patient": {"url": model.url},
        "hasty": {"url": model.url, "first_byte_timeout": IMPATIENCE, "read_timeout": IMPATIENCE},
    }
    environment = {
        "DATABASE_URL": shown(database.set(drivername="postgresql")),
        "UPSTREAMS": orjson.dumps(upstreams).decode(),
        "ROUTES": '[{"model": "hasty*", "upstream": "hasty"}]',
        "DEFAULT_UPSTREAM": "patient",
        "DISCONNECT_GRACE": str(GRACE),
        "LEASE": str(LEASE),
        "KEEPALIVE_INTERVAL": str(GRACE / 4),
        "SHUTDOWN_GRACE": "0.5",
    }
    environment = {f"RESPONSES_INGRESS_{name}": value for name, value in environment.items()}
    servers = ServerProcess(environment=environment), ServerProcess(environment=environment)
    try:
        await asyncio.gather(*(server.start() for server in servers))
        yield servers
    finally:
        await asyncio.gather(*(server.__aexit__(None, None, None) for server in servers))


def held(*texts: str) -> tuple[Stream, list[asyncio.Event]]:
    """An answer that says each of `texts` when the event before it is set, but for the first, and ends with the
    last event."""
    holds = [asyncio.Event() for _ in texts]
    chunks: list[Any] = []
    for text, hold in zip(texts, holds, strict=True):
        chunks += [chunk({"content": text}), hold]
    return Stream([*chunks, chunk(finish="stop")]), holds


def sent(upstream: Upstream) -> list[tuple[str, str]]:
    """What the newest call sent upstream."""
    return [(message["role"], message["content"]) for message in upstream.calls[-1].json["messages"]]


async def test_a_cancel_on_the_other_reaches_the_upstream(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    upstream.script(Stream([chunk({"content": "word "})], close="silent"))
    response = await created(here.url, BACKGROUND)
    assert response["status"] == "queued"
    await says(there.url, response["id"], "word ")
    cancelled = await cancel(there.url, response["id"])
    assert (cancelled["status"], cancelled["output"]) == ("cancelled", [])
    await asyncio.wait_for(upstream.closed(0), 5)
    assert await retrieve(here.url, response["id"]) == cancelled
    assert await cancel(here.url, response["id"]) == cancelled


async def test_what_is_not_in_the_background_is_not_cancelled_from_anywhere(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    answer, (hold,) = held("word ")
    upstream.script(answer)
    async with streaming(here.url, STREAM, "word ") as (wire, id):
        refused = await call(there.url, "POST", f"/{id}/cancel")
        assert (refused.status, refused.error["message"]) == (400, "Cannot cancel a synchronous response.")
        hold.set()
        check_stream((await wire.answer()).events)


async def test_a_stream_followed_on_both_is_the_same_stream(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    answer, (first, second) = held("one ", "two")
    upstream.script(answer)
    async with streaming(here.url, {**STREAM, "background": True}, "one ") as (wire, id):
        async with asyncio.TaskGroup() as followers:
            whole = [followers.create_task(followed(server.url, id)) for server in (here, there, there)]
            rest = [followers.create_task(followed(server.url, id, 4)) for server in pair]
            first.set()
            await says(there.url, id, "one two")
            late = followers.create_task(followed(there.url, id))
            second.set()
        events = (await wire.answer()).events
    check_stream(events)
    assert events[-1]["response"]["status"] == "completed"
    assert [task.result() for task in (*whole, late)] == [events] * 4
    assert [task.result() for task in rest] == [events[5:]] * 2
    assert await followed(there.url, id) == await followed(here.url, id) == events
    assert await followed(there.url, id, len(events) - 1) == []


async def test_the_output_so_far_is_seen_on_the_other(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    answer, (hold,) = held("half ")
    upstream.script(answer)
    async with streaming(here.url, STREAM, "half ") as (wire, id):
        so_far = await says(there.url, id, "half ")
        assert (so_far["status"], so_far["usage"], so_far["output"][0]["status"]) == (
            "in_progress",
            None,
            "in_progress",
        )
        hold.set()
        final = (await wire.answer()).events[-1]["response"]
    assert await retrieve(there.url, id) == final


async def test_a_turn_of_a_thread_is_waited_for_on_the_other(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    session = {"session-id": "waits"}
    answer, (hold,) = held("One.")
    upstream.script(answer, Say("Aside."), Say("Two."))
    async with streaming(here.url, {**STREAM, "input": "one?"}, "One.", session) as (wire, _):
        second = asyncio.create_task(created(there.url, {**ASK, "input": "two?"}, session))
        assert text_of(await created(there.url, {**ASK, "input": "aside?"})) == "Aside."
        assert not second.done()
        hold.set()
        await wire.answer()
        assert text_of(await second) == "Two."
    assert sent(upstream) == [("user", "one?"), ("assistant", "One."), ("user", "two?")]


async def test_a_child_of_what_runs_on_the_other_waits_for_it(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    answer, (hold,) = held("One.")
    upstream.script(answer, Say("Two."), Say("Three."))
    parent = await created(here.url, {**BACKGROUND, "input": "one?"})
    await says(there.url, parent["id"], "One.")
    in_front = asyncio.create_task(created(there.url, {**ASK, "input": "two?", "previous_response_id": parent["id"]}))
    hold.set()
    assert text_of(await in_front) == "Two."
    behind = await created(there.url, {**BACKGROUND, "input": "two!", "previous_response_id": parent["id"]})
    assert text_of(await ended(here.url, behind["id"])) == "Three."
    assert sent(upstream) == [("user", "one?"), ("assistant", "One."), ("user", "two!")]


async def test_a_run_that_nobody_follows_makes_way_on_the_other(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    session = {"session-id": "makes way"}
    upstream.script(Stream([chunk({"content": "word "})], close="silent"), Say("Two."))
    async with streaming(here.url, {**STREAM, "input": "one?"}, "word ", session) as (_, id):
        pass
    async with asyncio.timeout(GRACE * 0.9):
        assert text_of(await created(there.url, {**ASK, "input": "two?"}, session)) == "Two."
    assert sent(upstream) == [("user", "two?")]
    assert (await retrieve(here.url, id))["status"] == "cancelled"
    await asyncio.wait_for(upstream.closed(0), 5)


async def test_picked_up_on_the_other_within_the_grace_it_goes_on(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    answer, (hold,) = held("word ")
    upstream.script(answer)
    async with streaming(here.url, STREAM, "word ") as (_, id):
        pass
    async with Wire(there.url) as wire:
        await wire.start("GET", f"/v1/responses/{id}?stream=true&starting_after=4")
        silence = b": keep-alive\n\n"
        await wire.read_until(silence * 7)  # for longer than the grace, and than its pick-up is good for
        assert not upstream.calls[0].gone.is_set()
        hold.set()
        rest = (await wire.answer()).events
    assert rest[0]["sequence_number"] == 5
    assert (rest[-1]["type"], text_of(rest[-1]["response"])) == ("response.completed", "word ")


async def test_without_a_pick_up_the_cancel_reaches_the_upstream(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    upstream.script(Stream([chunk({"content": "word "})], close="silent"))
    async with streaming(here.url, STREAM, "word ") as (_, id):
        pass
    left = time.monotonic()
    await asyncio.wait_for(upstream.closed(0), GRACE + 5)
    assert time.monotonic() - left >= GRACE * 0.9
    assert (await ended(there.url, id))["status"] == "cancelled"


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (Drop(), 502, "upstream_unreachable"),
        (Stream([chunk({"content": "half"})], close="reset"), 200, "upstream_truncated"),
        (Drop(hold=asyncio.Event()), 504, "upstream_timeout"),
        (Stream([chunk({"content": "half"})], close="silent"), 200, "upstream_timeout"),
        (Reply({"error": {"message": "No."}}, status=400), 400, "upstream_refused"),
        (Reply({"error": {"message": "Slow down."}}, status=429, headers={"retry-after": "7"}), 429, None),
    ],
    ids=["dropped", "dropped later", "stalled", "stalled later", "refusing", "limiting"],
)
async def test_an_upstream_that_fails_is_seen_on_both(
    pair: Pair, upstream: Upstream, answer: Any, status: int, code: str | None
) -> None:
    here, there = pair
    upstream.script(answer, answer)
    behind = await created(here.url, {**HASTY, "background": True})
    async with Wire(there.url) as wire:
        in_front = await wire.post({**HASTY, "stream": True})
    failed = await ended(there.url, behind["id"])
    assert failed["status"] == "failed"
    events = await followed(here.url, behind["id"])
    assert events[-1]["response"]["error"] == failed["error"]
    if status == 200:
        check_stream(in_front.events)
        assert in_front.events[-1]["response"]["error"]["code"] == failed["error"]["code"] == code
        assert text_of(failed) == "half"
    elif status == 504:  # its headers did not wait so long
        assert in_front.events[-1]["response"]["error"]["code"] == failed["error"]["code"] == code
    else:
        assert in_front.status == status
        assert in_front.error["code"] == failed["error"]["code"]
        assert code in (None, in_front.error["code"])
        assert in_front.headers.get("retry-after") == ("7" if status == 429 else None)


# The database goes away.


@asynccontextmanager
async def cut_off(database: URL, postgres: URL) -> AsyncIterator[None]:
    """Nobody reaches the database, and who was connected is no more."""
    name = database.database
    await run_on(
        postgres,
        f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
    )
    try:
        yield
    finally:
        await run_on(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_without_the_database_requests_are_told_to_come_again_and_runs_wait(
    pair: Pair, upstream: Upstream, database: URL, postgres: URL
) -> None:
    here, there = pair
    session = {"session-id": "outage"}
    answer, (first, second) = held("one ", "two ")
    other, (hold,) = held("behind")
    upstream.script(answer, other, Say("Three."))
    async with streaming(here.url, {**STREAM, "input": "one?"}, "one ", session) as (wire, id):
        behind = await created(there.url, BACKGROUND)
        tail = asyncio.create_task(followed(there.url, id))
        await upstream.called(2)
        async with cut_off(database, postgres):
            for server in pair:
                asked = await create(server.url, ASK, {"session-id": "refused"})
                for refused in (asked, await call(server.url, "GET", f"/{id}")):
                    assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
                    assert int(refused.headers["retry-after"]) >= 1
                async with Wire(server.url) as probe:
                    assert (await probe.request("GET", "/readyz")).status == 503
                    assert (await probe.request("GET", "/healthz")).status == 200
            first.set()
            await wire.read_until(b"two ")  # text still leaves; its end waits for the database
            second.set()
            hold.set()
        events = (await wire.answer()).events
        check_stream(events)
        assert (events[-1]["type"], text_of(events[-1]["response"])) == ("response.completed", "one two ")
        assert await tail == events
    assert text_of(await ended(here.url, behind["id"])) == "behind"
    assert await retrieve(there.url, id) == events[-1]["response"]
    assert text_of(await created(there.url, {**ASK, "input": "three?"}, session)) == "Three."
    assert sent(upstream) == [("user", "one?"), ("assistant", "one two "), ("user", "three?")]
    assert len(upstream.calls) == 3


async def test_under_load_an_outage_costs_answers_and_no_history(
    pair: Pair, upstream: Upstream, database: URL, postgres: URL
) -> None:
    """Sessions that go on through two outages: who is refused asks again, and every history is whole."""
    upstream.answer = lambda request: Say(f"To {request.json['messages'][-1]['content']}")
    outages = asyncio.Event()

    async def talk(session: str) -> None:
        turn = 0
        while turn < 5 or not outages.is_set():
            answer = await create(pair[turn % 2].url, {**ASK, "input": f"{session} {turn}"}, {"session-id": session})
            if answer.status == 200:
                assert text_of(answer.json) == f"To {session} {turn}"
                turn += 1
            else:
                assert (answer.status, "retry-after" in answer.headers) == (503, True), answer
        told = [message["content"] for message in conversation(upstream, f"{session} {turn - 1}")]
        assert told == [text for at in range(turn) for text in (f"{session} {at}", f"To {session} {at}")][:-1]

    async with asyncio.TaskGroup() as talks:
        for name in "abcdef":
            talks.create_task(talk(name))
        for _ in range(2):
            await upstream.called(len(upstream.calls) + 20)
            async with cut_off(database, postgres):
                for server in pair:  # the talks may all be waiting for the ends of turns that had begun
                    while (await create(server.url, {**ASK, "input": "Still there?"})).status == 200:
                        pass
        outages.set()
    with stranger(shown(database)) as connection:
        for left in (
            "SELECT id FROM responses WHERE status IN ('queued', 'in_progress')",
            "SELECT id FROM threads WHERE running IS NOT NULL",
        ):
            while connection.rows(left):  # noqa: ASYNC110 - what nobody heard of ends with its lease
                await asyncio.sleep(0.02)


def conversation(upstream: Upstream, last: str) -> list[dict[str, Any]]:
    """The messages of the newest call that ended with `last`."""
    for request in reversed(upstream.calls):
        messages: list[dict[str, Any]] = request.json["messages"]
        if messages[-1]["content"] == last:
            return messages
    raise AssertionError(f"nobody asked {last!r}")


# A process is gone.


async def test_the_other_takes_over_what_a_killed_one_ran(pair: Pair, upstream: Upstream) -> None:
    here, there = pair
    session = {"session-id": "killed"}
    answer, _ = held("half ")
    upstream.script(Say("One."), Drop(hold=asyncio.Event()), answer)
    assert text_of(await created(here.url, {**ASK, "input": "one?"}, session)) == "One."
    behind = await created(here.url, {**BACKGROUND, "input": "in the background"})
    await upstream.called(2)
    async with streaming(here.url, {**STREAM, "input": "two?"}, "half ", session) as (_, id):
        await says(there.url, id, "half ")
        tail = asyncio.create_task(followed(there.url, id))
        upstream.answer = lambda call: Say(f"To {call.json['messages'][-1]['content']}")
        waiting = asyncio.create_task(created(there.url, {**ASK, "input": "three?"}, session))
        await here.kill()
    killed = time.monotonic()
    failed = await ended(there.url, id)
    again = await ended(there.url, behind["id"])
    third = await waiting
    assert time.monotonic() - killed < LEASE + 3
    assert (failed["status"], failed["error"]["code"], text_of(failed)) == ("failed", "server_restarted", "half ")
    assert (await tail)[-1]["response"] == failed
    assert again["status"] == third["status"] == "completed"
    assert text_of(again) == "To in the background"
    asked = [[(one["role"], one["content"]) for one in call.json["messages"]] for call in upstream.calls[3:]]
    assert sorted(asked, key=len) == [
        [("user", "in the background")],
        [("user", "one?"), ("assistant", "One."), ("user", "three?")],
    ]
    await here.start()
    assert await retrieve(here.url, id) == failed
