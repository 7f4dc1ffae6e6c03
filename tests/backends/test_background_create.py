"""The background backend when it creates a response, and when its turn is left."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from responses_ingress.backends.background import BackgroundBackend, BackgroundOptions, Pace
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Finish, Remember
from responses_ingress.errors import (
    IngressError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamUnreachable,
)
from tests.backends.test_background import (
    HI,
    LONG_AGO,
    QUEUED,
    RUNNING,
    STARTED,
    STATE,
    Hours,
    backend_of,
    batches_of,
    finish_of,
    played,
    turn,
)
from tests.core.shapes import text_item
from tests.responses_upstream import ID, Provider, response, streamed, whole
from tests.server import free_port
from tests.upstream import Drop, Reply, Stream


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
def hours() -> Hours:
    return Hours()


# Creating.

LOST = [
    Drop(),
    Reply({}, status=500),
    Reply({}, status=504),
    Stream([b'{"id":'], close="eof"),
    Reply(body=b"<html>"),
    Reply({"status": "queued"}),
    streamed(text_item("hi")),
]
LOST_IDS = ["dropped", "500", "504", "eof", "a page", "no id", "a stream"]


@pytest.mark.parametrize("lost", LOST, ids=LOST_IDS)
async def test_a_create_whose_answer_is_lost_is_not_sent_again(provider: Provider, hours: Hours, lost: Any) -> None:
    provider.script(lost, STARTED)
    with pytest.raises(UpstreamError) as failed:
        await played(provider, hours)
    assert failed.value.code == "upstream_create_unknown"
    assert (len(provider.calls), provider.unused) == (1, 1)


@pytest.mark.parametrize("lost", LOST, ids=LOST_IDS)
async def test_with_a_key_it_is_sent_again_once_with_the_same(provider: Provider, hours: Hours, lost: Any) -> None:
    provider.script(lost, STARTED)
    provider.looks(whole(text_item("hi")))
    assert finish_of(await played(provider, hours, idempotency=True)).status == "completed"
    first, second = (call.headers["idempotency-key"] for call in provider.calls)
    assert first == second
    assert first.startswith("resp_1")


@pytest.mark.parametrize("second", [Drop(), Reply({}, status=409), Reply({}, status=429)], ids=["drop", "409", "429"])
async def test_what_is_lost_twice_is_unknown(provider: Provider, hours: Hours, second: Any) -> None:
    provider.script(Drop(), second, STARTED)
    with pytest.raises(UpstreamError) as failed:
        await played(provider, hours, idempotency=True)
    assert (failed.value.code, provider.unused) == ("upstream_create_unknown", 1)


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (Reply({}, status=400), 400),
        (Reply({}, status=429), 429),
        (Reply({}, status=401), 401),
        (Reply({}, status=503), 503),
    ],
)
@pytest.mark.parametrize("idempotency", [True, False])
async def test_a_create_that_is_refused_is_refused(
    provider: Provider, hours: Hours, refusal: Reply, status: int, idempotency: bool
) -> None:
    provider.script(refusal, STARTED)
    with pytest.raises(IngressError) as failed:
        await played(provider, hours, idempotency=idempotency)
    assert (failed.value.status, len(provider.calls)) == (status, 1)


async def test_a_provider_that_cannot_be_reached_has_begun_nothing(hours: Hours) -> None:
    backend = BackgroundBackend(
        Settings("away", f"http://127.0.0.1:{free_port()}/v1"), BackgroundOptions(), hours.pace()
    )
    with pytest.raises(UpstreamUnreachable) as failed:
        await batches_of(backend)
    assert failed.value.code == "upstream_unreachable"
    await backend.close()


async def test_creates_share_no_connection_so_that_none_is_stale(provider: Provider, hours: Hours) -> None:
    provider.script(whole(), whole())
    async with backend_of(provider, hours.pace()) as backend:
        for _ in range(2):
            await batches_of(backend)
    assert [call.reused for call in provider.calls] == [False, False]


async def test_a_mended_request_is_another_one(provider: Provider, hours: Hours) -> None:
    refusal = Reply({"error": {"message": "Not with this model.", "param": "include"}}, status=400)
    provider.script(refusal, whole())
    await played(provider, hours, idempotency=True)
    assert len({call.headers["idempotency-key"] for call in provider.calls}) == 2
    assert ["include" in call.json for call in provider.calls] == [True, False]


@pytest.mark.parametrize("idempotency", [True, False])
async def test_a_create_that_was_begun_elsewhere_is_repeated_only_with_its_key(
    provider: Provider, hours: Hours, idempotency: bool
) -> None:
    async with backend_of(provider, hours.pace(), idempotency=idempotency) as backend:
        async with aclosing(backend.stream(turn())) as batches:
            (remembered,) = await anext(batches)
        assert isinstance(remembered, Remember)
        assert provider.calls == []
        await backend.cancel(remembered.state, None)
        assert provider.cancels == []
        provider.script(STARTED)
        provider.looks(whole())
        if idempotency:
            await batches_of(backend, turn(resume=remembered.state))
        else:
            with pytest.raises(UpstreamError) as failed:
                await batches_of(backend, turn(resume=remembered.state))
            assert failed.value.code == "upstream_create_unknown"
        with pytest.raises(UpstreamError):
            await batches_of(backend, turn(context=[HI], resume=remembered.state))
    assert len(provider.calls) == int(idempotency)


async def test_it_is_accepted_when_the_provider_works_on_it(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED, RUNNING)
    provider.looks(QUEUED, Reply({}), RUNNING, RUNNING, whole())
    async with backend_of(provider, hours.pace()) as backend, aclosing(backend.stream(turn())) as batches:
        assert [type(delta) for _ in range(2) for delta in await anext(batches)] == [Remember, Remember]
        assert await anext(batches) == [Accepted()]
        assert len(provider.polls) == 3
        assert isinstance((await anext(batches))[-1], Finish)
        _, created, *_ = await batches_of(backend)
    assert created[-1] == Accepted()


async def test_an_unknown_response_is_waited_for_a_minute_and_then_cancelled(provider: Provider, hours: Hours) -> None:
    provider.script(STARTED)
    provider.looks(Reply({}, status=404))
    with pytest.raises(UpstreamError) as failed:
        await played(provider, hours, longest_poll=10)
    assert failed.value.code == "upstream_response_gone"
    assert LONG_AGO + 60 <= hours.now < LONG_AGO + 75
    assert provider.cancels == [f"/v1/responses/{ID}/cancel"]


@pytest.mark.parametrize("id", [".", "..", "a/b"])
async def test_an_id_that_is_a_path_is_refused(provider: Provider, hours: Hours, id: str) -> None:
    provider.script(Reply({**response("queued"), "id": id}))
    with pytest.raises(UpstreamInvalid, match="cannot be asked for"):
        await played(provider, hours)
    assert provider.polls == []


# Leaving.


async def test_leaving_while_it_waits_leaves_the_provider_alone(provider: Provider) -> None:
    provider.script(STARTED)
    provider.looks(RUNNING)
    async with backend_of(provider, Pace(), first_poll=0.01) as backend:
        playing = asyncio.create_task(batches_of(backend))
        await provider.polled(2)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        assert playing.cancelled()
    assert provider.cancels == []


async def test_a_cancel_is_passed_on(provider: Provider, hours: Hours) -> None:
    async with backend_of(provider, hours.pace()) as backend:
        await backend.cancel({"response_id": "a/b?c"}, None)
    assert provider.cancels == ["/v1/responses/a%2Fb%3Fc/cancel"]


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_cancel_that_is_refused_is_only_logged(
    provider: Provider, hours: Hours, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    provider.on_cancel = Reply({}, status=status)
    async with backend_of(provider, hours.pace()) as backend:
        await backend.cancel(STATE, None)
    assert f"status {status}" in caplog.text


@pytest.mark.parametrize("answer", [Reply({}, hold=asyncio.Event()), Drop()], ids=["silent", "dropped"])
async def test_a_cancel_takes_only_so_long(
    provider: Provider, hours: Hours, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    provider.on_cancel = answer
    async with backend_of(provider, hours.pace(), cancel_timeout=0.05) as backend:
        await backend.cancel(STATE, None)
    assert "could not be told to cancel" in caplog.text


async def test_leaving_while_it_is_created_cancels_what_nobody_could_find(provider: Provider, hours: Hours) -> None:
    hold = asyncio.Event()
    provider.script(Reply(response("queued"), hold=hold))
    async with backend_of(provider, hours.pace()) as backend:
        playing = asyncio.create_task(batches_of(backend))
        await provider.called(1)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        assert playing.cancelled()
        hold.set()
        await provider.cancelled()
    assert provider.cancels == [f"/v1/responses/{ID}/cancel"]


async def test_leaving_what_has_ended_when_it_was_created_cancels_nothing(provider: Provider, hours: Hours) -> None:
    hold = asyncio.Event()
    provider.script(Reply(response("completed"), hold=hold))
    async with backend_of(provider, hours.pace()) as backend:
        playing = asyncio.create_task(batches_of(backend))
        await provider.called(1)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        hold.set()
    assert provider.cancels == []


async def test_closing_does_not_wait_long_for_what_is_being_left(provider: Provider, hours: Hours) -> None:
    provider.script(Reply(response("queued"), hold=asyncio.Event()))
    async with asyncio.timeout(10), backend_of(provider, hours.pace(), cancel_timeout=0.05) as backend:
        playing = asyncio.create_task(batches_of(backend))
        await provider.called(1)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
    assert provider.cancels == []


async def test_it_lists_the_providers_models(provider: Provider, hours: Hours) -> None:
    provider.models = ("a", "b")
    async with backend_of(provider, hours.pace()) as backend:
        assert await backend.models() == ["a", "b"]
