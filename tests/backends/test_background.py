"""The background backend against a scripted provider: creating once, polling, going on, ending."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from responses_ingress.backends.background import BackgroundBackend, BackgroundOptions, Pace
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Delta, Finish, Remember
from responses_ingress.core.items import user_message
from responses_ingress.core.turn import Turn
from responses_ingress.errors import (
    UpstreamError,
    UpstreamInvalid,
    UpstreamRefused,
    UpstreamTimeout,
)
from tests.core.shapes import ERROR, Json, build, call, reasoning, text_item
from tests.responses_upstream import ID, Provider, response, whole
from tests.upstream import Drop, Reply, Stream

HI = user_message("hi")
CALLED: Json = {**call(), "arguments": '{"at":1}', "status": "completed"}
OUTPUT: list[Json] = [{**reasoning(), "encrypted_content": "gAAA="}, text_item("It is sunny.", "msg_2"), CALLED]
QUEUED, RUNNING = Reply(response("queued")), Reply(response("in_progress"))
STARTED = Reply(response("queued"), status=202)
LONG_AGO = 1_000.0
STATE: Json = {"response_id": ID, "until": LONG_AGO + 90_000}


@dataclass
class Hours:
    """A clock that moves only by the waits that are asked for."""

    now: float = LONG_AGO
    waits: list[float] = field(default_factory=list)
    slept: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        async with self.slept:
            self.slept.notify_all()

    async def waited(self, times: int) -> None:
        """Wait until it was slept so often."""
        async with self.slept:
            await self.slept.wait_for(lambda: len(self.waits) >= times)

    def pace(self, chance: Callable[[], float] = lambda: 0.0) -> Pace:
        return Pace(lambda: self.now, self.sleep, chance)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
def hours() -> Hours:
    return Hours()


@asynccontextmanager
async def backend_of(provider: Provider, pace: Pace, **options: Any) -> AsyncIterator[BackgroundBackend]:
    backend = BackgroundBackend(Settings("slow", provider.url), BackgroundOptions(**options), pace)
    try:
        yield backend
    finally:
        await backend.close()


def turn(**fields: Any) -> Turn:
    return Turn("resp_1", "thread_1", "their-model", new=[HI], **fields)


async def batches_of(backend: BackgroundBackend, given: Turn | None = None) -> list[Sequence[Delta]]:
    return [batch async for batch in backend.stream(given or turn())]


async def played(provider: Provider, hours: Hours, given: Turn | None = None, **options: Any) -> list[Delta]:
    """All deltas of one turn."""
    async with backend_of(provider, hours.pace(), **options) as backend:
        return [delta for batch in await batches_of(backend, given) for delta in batch]


def finish_of(deltas: Sequence[Delta]) -> Finish:
    last = deltas[-1]
    assert isinstance(last, Finish)
    return last


# The usual way.


async def test_it_is_created_once_remembered_polled_and_given_in_one_batch(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(QUEUED, RUNNING, RUNNING, whole(*OUTPUT, service_tier="flex", metadata={"a": "b"}))
    async with backend_of(provider, hours.pace()) as backend:
        about, first, accepted, last = await batches_of(backend)
        assert (backend.name, backend.resumable, backend.goes_on) == ("slow", True, True)
    assert about == [Remember({"creating": True, "items": 1, "until": LONG_AGO + 90_000})]
    assert first == [Remember({"response_id": ID, "until": LONG_AGO + 90_000, "since": LONG_AGO})]
    assert accepted == [Accepted()]
    assert build([*first, *last]).response()["output"] == [
        {**OUTPUT[0], "encrypted_content": "slow:gAAA="},
        *OUTPUT[1:],
    ]
    assert (finish_of(last).status, finish_of(last).echo) == ("completed", {"service_tier": "flex"})
    assert (len(provider.calls), len(provider.polls), provider.cancels) == (1, 4, [])
    sent = provider.calls[0].json
    assert (sent["background"], sent["store"], sent["stream"], sent["input"]) == (True, True, False, [HI])
    assert "metadata" not in sent and "idempotency-key" not in provider.calls[0].headers


async def test_it_does_not_poll_before_its_memory_was_taken(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(whole())
    async with backend_of(provider, hours.pace()) as backend, aclosing(backend.stream(turn())) as batches:
        assert [type(delta) for delta in await anext(batches)] == [Remember]
        assert provider.calls == []
        assert [type(delta) for delta in await anext(batches)] == [Remember]
        assert (provider.polls, hours.waits) == ([], [])
        await anext(batches)
        assert len(provider.polls) == 1


async def test_an_answer_that_is_there_at_once_is_not_polled(provider: Provider, hours: Hours) -> None:
    provider.script(whole(text_item("hi")))
    deltas = await played(provider, hours)
    assert (finish_of(deltas).status, provider.polls) == ("completed", [])


async def test_another_process_goes_on_with_the_same_response(provider: Provider, hours: Hours) -> None:
    provider.looks(RUNNING, whole(text_item("hi")))
    deltas = await played(provider, hours, turn(resume=STATE))
    assert deltas[:2] == [Remember(STATE), Accepted()]
    assert (finish_of(deltas).status, provider.calls, len(provider.polls)) == ("completed", [], 2)
    assert hours.waits[0] == 0


async def test_chance_keys_and_the_clients_bearer_are_used_for_polls_too(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(whole())
    backend = BackgroundBackend(
        Settings("slow", provider.url, key="ours", pass_bearer=True), BackgroundOptions(), hours.pace()
    )
    await batches_of(backend, turn(bearer="theirs"))
    await backend.close()
    assert {request.headers["authorization"] for request in provider.requests} == {"Bearer theirs"}


# Waiting.


async def test_waits_grow_and_have_a_limit(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(*[RUNNING] * 6, whole())
    await played(provider, hours, first_poll=2, longest_poll=8)
    assert hours.waits == [2, 3, 4.5, 6.75, 8, 8, 8]


async def test_chance_shortens_a_wait(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(RUNNING, whole())
    async with backend_of(provider, hours.pace(lambda: 1.0), first_poll=4) as backend:
        await batches_of(backend)
    assert hours.waits == [3, 4.5]


@pytest.mark.parametrize("status", [200, 429, 503])
async def test_a_provider_may_ask_for_longer_waits(provider: Provider, hours: Hours, status: int) -> None:
    provider.script(STARTED)
    provider.looks(Reply(response("queued"), status=status, headers={"retry-after": "700"}), whole())
    await played(provider, hours)
    assert hours.waits == [1, 700]


@pytest.mark.parametrize(
    "trouble",
    [
        Reply({}, status=500),
        Reply(body=b"<html>", status=502),
        Reply({}, status=429),
        Reply({}, status=408),
        Reply({}, status=401),
        Reply({}, status=403),
        Reply({}, status=404),
        Reply(body=b"<html>"),
        Reply([]),
        Reply({}),
        Reply(response("pending")),
        Stream([b'{"id":'], close="eof"),
        Stream([b'{"id":'], close="reset"),
        Drop(),
    ],
    ids=[
        "500",
        "502",
        "429",
        "408",
        "401",
        "403",
        "404",
        "a page",
        "a list",
        "nothing",
        "pending",
        "eof",
        "reset",
        "dropped",
    ],
)
async def test_trouble_that_may_pass_is_waited_out(provider: Provider, hours: Hours, trouble: Any) -> None:
    provider.script(STARTED)
    provider.looks(trouble, trouble, trouble, whole(text_item("hi")))
    assert finish_of(await played(provider, hours)).status == "completed"
    assert len(provider.calls) == 1


async def test_a_provider_that_is_away_for_a_while_is_waited_for(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(whole(text_item("hi")))
    async with backend_of(provider, hours.pace()) as backend, aclosing(backend.stream(turn())) as batches:
        await anext(batches)
        await anext(batches)
        await provider.stop()
        polling = asyncio.ensure_future(anext(batches))
        await hours.waited(5)
        async with provider:
            assert finish_of(list(await polling)).status == "completed"


async def test_a_poll_that_hangs_is_given_up_and_asked_again(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(Reply({}, hold=asyncio.Event()), whole(text_item("hi")))
    assert finish_of(await played(provider, hours, poll_timeout=0.05)).status == "completed"


@pytest.mark.parametrize("status", [404, 410])
async def test_a_response_that_is_gone_has_failed(provider: Provider, hours: Hours, status: int) -> None:
    provider.script(STARTED)
    provider.looks(RUNNING, Reply({}, status=status))
    with pytest.raises(UpstreamError) as failed:
        await played(provider, hours)
    assert failed.value.code == "upstream_response_gone"


async def test_a_poll_that_is_refused_for_good_ends_the_response(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(Reply({}, status=400))
    with pytest.raises(UpstreamRefused):
        await played(provider, hours)
    assert len(provider.polls) == 1
    assert provider.cancels == [f"/v1/responses/{ID}/cancel"]


# Windows.


@pytest.mark.parametrize("look", [RUNNING, Reply({}, status=500)], ids=["running", "failing"])
@pytest.mark.parametrize(
    ("window", "seconds"), [("15m", 900), ("1h", 3_600), ("30s", 30), ("2d", 172_800), ("flex", 50), (None, 50)]
)
async def test_when_its_time_is_up_it_is_given_up_and_cancelled(
    provider: Provider, hours: Hours, look: Reply, window: str | None, seconds: int
) -> None:
    provider.script(STARTED)
    provider.looks(look)
    options: Json = {"completion_window": window, "patience": 50, "margin": 7, "longest_poll": 10_000}
    with pytest.raises(UpstreamTimeout) as failed:
        await played(provider, hours, **options)
    assert failed.value.code == "upstream_timeout"
    assert hours.now == LONG_AGO + seconds + 7
    assert provider.cancels == [f"/v1/responses/{ID}/cancel"]


async def test_time_goes_on_while_no_process_waits(provider: Provider, hours: Hours) -> None:
    hours.now = STATE["until"] - 1
    provider.looks(RUNNING)
    with pytest.raises(UpstreamTimeout):
        await played(provider, hours, turn(resume=STATE))
    assert hours.waits == [0, 1]


@pytest.mark.parametrize(
    ("parameters", "options", "expected"),
    [
        ({}, {}, {}),
        ({"metadata": {"mine": "x"}}, {}, {}),
        ({}, {"completion_window": "24h"}, {"metadata": {"completion_window": "24h"}}),
        (
            {"metadata": {"completion_window": "1h", "mine": "x"}},
            {"completion_window": "24h"},
            {"metadata": {"completion_window": "1h"}},
        ),
        (
            {"background_options": {"odd": 1}},
            {"completion_window": "8h", "window_in": "background_options"},
            {"background_options": {"odd": 1, "completion_window": "8h"}},
        ),
        (
            {"background_options": {"completion_window": "2h"}},
            {"completion_window": "8h", "window_in": "background_options"},
            {"background_options": {"completion_window": "2h"}},
        ),
    ],
)
async def test_the_window_goes_where_the_provider_takes_it(
    provider: Provider, hours: Hours, parameters: Json, options: Json, expected: Json
) -> None:
    provider.script(STARTED)
    provider.looks(whole())
    await played(provider, hours, turn(parameters=parameters), **options)
    sent = provider.calls[0].json
    assert {key: sent[key] for key in ("metadata", "background_options") if key in sent} == expected


# Endings.


@pytest.mark.parametrize(
    ("ended", "status", "code"),
    [
        (response("completed", *OUTPUT), "completed", None),
        (response("incomplete", *OUTPUT[:2], incomplete_details={"reason": "max_output_tokens"}), "incomplete", None),
        (response("failed", error=ERROR), "failed", "server_error"),
        (response("failed", error=ERROR, output=None), "failed", "server_error"),
        (response("cancelled"), "cancelled", None),
        (response("expired"), "failed", "upstream_expired"),
        (response("expired", output=None, error={"code": "x", "message": "y"}), "failed", "upstream_expired"),
        ({"error": {"code": "odd", "message": "It broke."}}, "failed", "odd"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_every_ending_is_told(
    provider: Provider, hours: Hours, ended: Json, status: str, code: str | None, at_once: bool
) -> None:
    provider.script(Reply(ended) if at_once else STARTED)
    provider.looks(Reply(ended))
    deltas = await played(provider, hours)
    assert build(deltas).status == status
    assert (finish_of(deltas).error or {}).get("code") == code


async def test_half_a_call_is_not_told_as_done(provider: Provider, hours: Hours) -> None:
    half = {**CALLED, "arguments": '{"a', "status": "incomplete"}
    provider.script(STARTED)
    provider.looks(Reply(response("incomplete", half, incomplete_details={"reason": "max_output_tokens"})))
    events = build(await played(provider, hours)).take()
    assert not [event for event in events if event.type.endswith(".done")]


async def test_a_completed_response_without_output_is_the_upstreams_fault(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(Reply(response("completed", output=None)))
    with pytest.raises(UpstreamInvalid):
        await played(provider, hours)


junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "message", "completed", "in_progress", "id"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "id", "content", "text", "status", "role", "error"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
answers = st.fixed_dictionaries(
    {},
    optional={
        "id": junk,
        "status": st.sampled_from(["queued", "completed", "incomplete", "failed", "cancelled", "expired"]) | junk,
        "output": junk,
        "error": junk,
        "incomplete_details": junk,
        "usage": junk,
        "completed_at": junk,
    },
)


@settings(max_examples=60, deadline=None)
@given(answers)
async def test_whatever_a_poll_brings_is_legal_or_the_upstreams_fault(answer: Json) -> None:
    hours = Hours()
    async with Provider() as provider:
        provider.looks(Reply(answer))
        try:
            deltas = await played(provider, hours, turn(resume={**STATE, "until": LONG_AGO + 3}))
        except UpstreamError:
            return
    assert build(deltas).ended
    assert answer.get("status") == "completed" or build(deltas).status != "completed"
