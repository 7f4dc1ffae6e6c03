import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import pytest

from responses_ingress.backends.upstream import Client, Timeouts, Upstream, may_have_begun, parse_json
from responses_ingress.errors import (
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from tests.backends.environment import proxies
from tests.server import free_port
from tests.upstream import Drop, Reply, Stream
from tests.upstream import Upstream as Scripted

PATH = "/chat/completions"
FINE = Reply({"fine": True})


@asynccontextmanager
async def client_of(url: str, **fields: Any) -> AsyncIterator[Client]:
    client = Client(Upstream("scripted", url, **fields))
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
async def client(upstream: Scripted) -> AsyncIterator[Client]:
    async with client_of(upstream.url) as client:
        yield client


async def ask(client: Client, bearer: str | None = None) -> bytes:
    """The whole body of an answer."""
    answer = await client.post(PATH, b"{}", bearer)
    try:
        return await answer.read()
    finally:
        answer.close()


# What is sent.


async def test_a_post_brings_its_body_and_gives_the_answer_whatever_its_status(
    upstream: Scripted, client: Client
) -> None:
    upstream.script(Reply({"error": "no"}, status=418, headers={"retry-after": "7"}))
    answer = await client.post(PATH, b'{"a":1}')
    assert (answer.status, answer.is_stream, answer.retry_after) == (418, False, 7.0)
    assert parse_json(client.upstream, await answer.read()) == {"error": "no"}
    assert upstream.calls[0].json == {"a": 1}
    assert upstream.calls[0].headers["content-type"] == "application/json"
    assert "authorization" not in upstream.calls[0].headers


async def test_a_request_may_have_headers_of_its_own(upstream: Scripted, client: Client) -> None:
    upstream.script(FINE, FINE)
    for headers in ({"idempotency-key": "k"}, None):
        answer = await client.post(PATH, b"{}", None, headers)
        answer.close()
    assert [call.headers.get("idempotency-key") for call in upstream.calls] == ["k", None]


async def test_a_get_gives_the_answer_whatever_its_status(upstream: Scripted) -> None:
    upstream.script(Reply({"error": "no"}, status=418, headers={"retry-after": "7"}))
    async with client_of(upstream.url, key="ours", pass_bearer=True) as client:
        answer = await client.get(PATH, "theirs")
        assert (answer.status, answer.retry_after, await answer.read()) == (418, 7.0, b'{"error":"no"}')
        answer.close()
    assert (upstream.calls[0].method, upstream.calls[0].headers["authorization"]) == ("GET", "Bearer theirs")


@pytest.mark.parametrize("value", ["", "soon", "1.5", "-1", "9" * 400, "1000000", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_patience_that_is_no_number_is_none(upstream: Scripted, client: Client, value: str) -> None:
    upstream.script(Reply({}, headers={"retry-after": value}))
    answer = await client.post(PATH, b"{}")
    assert answer.retry_after is None
    answer.close()


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
async def test_a_patience_may_be_a_date(upstream: Scripted, client: Client, zone: str) -> None:
    date = formatdate(time.time() + 60).removesuffix("-0000") + zone
    upstream.script(Reply({}, headers={"retry-after": date}))
    answer = await client.post(PATH, b"{}")
    assert answer.retry_after == pytest.approx(60, abs=2)
    answer.close()


@pytest.mark.parametrize(
    ("fields", "bearer", "sent"),
    [
        ({}, None, None),
        ({}, "theirs", None),
        ({"key": "ours"}, None, "Bearer ours"),
        ({"key": "ours"}, "theirs", "Bearer ours"),
        ({"key": "ours", "pass_bearer": True}, "theirs", "Bearer theirs"),
        ({"key": "ours", "pass_bearer": True}, None, "Bearer ours"),
        ({"pass_bearer": True}, None, None),
        ({"key": "ours", "headers": {"authorization": "Key x"}}, None, "Key x"),
    ],
    ids=str,
)
async def test_the_clients_bearer_is_passed_on_only_where_that_is_set(
    upstream: Scripted, fields: Mapping[str, Any], bearer: str | None, sent: str | None
) -> None:
    upstream.script(FINE)
    async with client_of(upstream.url, **fields) as client:
        await ask(client, bearer)
    assert upstream.calls[0].headers.get("authorization") == sent


@pytest.mark.parametrize(
    ("fields", "bearer", "sent"),
    [
        ({}, None, None),
        ({"key": "ours"}, "theirs", "ours"),
        ({"key": "ours", "pass_bearer": True}, "theirs", "theirs"),
        ({"pass_bearer": True}, None, None),
    ],
    ids=str,
)
async def test_a_key_can_go_into_a_header_of_its_own(
    upstream: Scripted, fields: Mapping[str, Any], bearer: str | None, sent: str | None
) -> None:
    upstream.script(FINE)
    async with client_of(upstream.url, authorization="x-api-key", **fields) as client:
        await ask(client, bearer)
    headers = upstream.calls[0].headers
    assert (headers.get("x-api-key"), headers.get("authorization")) == (sent, None)


async def test_a_list_of_models_is_asked_for_with_our_own_key_only(upstream: Scripted) -> None:
    async with client_of(upstream.url, key="ours", pass_bearer=True, headers={"x-org": "us"}) as client:
        assert (await client.get_json("/models"))["data"][0]["id"] == "test-model"
    headers = upstream.requests[0].headers
    assert (headers["authorization"], headers["x-org"]) == ("Bearer ours", "us")


async def test_extra_headers_are_sent(upstream: Scripted) -> None:
    upstream.script(FINE)
    async with client_of(upstream.url, headers={"api-key": "k", "x-org": "us"}) as client:
        await ask(client)
    headers = upstream.calls[0].headers
    assert (headers["api-key"], headers["x-org"]) == ("k", "us")


async def test_no_cookie_of_one_exchange_is_sent_with_another(upstream: Scripted, client: Client) -> None:
    upstream.script(Reply({}, headers={"set-cookie": "session=secret; Path=/"}), FINE)
    await ask(client)
    await ask(client)
    assert "cookie" not in upstream.calls[1].headers


def test_secrets_are_not_in_what_a_log_would_show() -> None:
    shown = repr(Upstream("a", "http://a/v1", key="sk-1", headers={"api-key": "sk-2"}))
    assert "sk-" not in shown


# Times.


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that answers nobody who wants to connect: its backlog is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for sock in waiting:
            sock.close()


async def test_connecting_takes_only_so_long(deaf_port: int) -> None:
    async with client_of(f"http://127.0.0.1:{deaf_port}/v1", timeouts=Timeouts(connect=0.05)) as client:
        with pytest.raises(UpstreamUnreachable, match="connecting took too long") as failed:
            await ask(client)
        assert failed.value.status == 502


async def test_the_first_byte_takes_only_so_long(upstream: Scripted) -> None:
    upstream.script(Reply({}, hold=asyncio.Event()))
    async with client_of(upstream.url, timeouts=Timeouts(first_byte=0.05)) as client:
        with pytest.raises(UpstreamTimeout) as failed:
            await ask(client)
        assert failed.value.status == 504
        await upstream.closed(0)


async def test_each_later_byte_takes_only_so_long(upstream: Scripted) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([hold, b"one", asyncio.Event()]))
    async with client_of(upstream.url, timeouts=Timeouts(read=0.05)) as client:
        answer = await client.post(PATH, b"{}")
        hold.set()
        read = []
        with pytest.raises(UpstreamTimeout):
            async for chunk in answer.chunks():
                read.append(chunk)
        assert read == [b"one"]
        answer.close()
        await upstream.closed(0)


async def test_the_first_byte_behind_the_headers_takes_no_longer_than_later_ones(upstream: Scripted) -> None:
    upstream.script(Stream([asyncio.Event()]), Stream([b"one", asyncio.Event()]))
    async with client_of(upstream.url, timeouts=Timeouts(read=0.05)) as client, asyncio.timeout(10):
        for _ in range(2):
            with pytest.raises(UpstreamTimeout):
                await ask(client)


async def test_the_limit_for_the_headers_does_not_cut_a_stream_that_is_slow_to_begin(upstream: Scripted) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([hold, b"one"], close="end"))
    async with client_of(upstream.url, timeouts=Timeouts(first_byte=0.05)) as client:
        answer = await client.post(PATH, b"{}")
        asyncio.get_running_loop().call_later(0.1, hold.set)
        assert await answer.read() == b"one"
        answer.close()


async def test_a_live_stream_is_cut_by_no_limit(upstream: Scripted) -> None:
    upstream.script(Stream([b"x"] * 20, pace=0.01, close="end"))
    async with client_of(upstream.url, timeouts=Timeouts(connect=0.15, first_byte=0.15, read=0.15)) as client:
        assert await ask(client) == b"x" * 20


# Connections.


async def test_a_refused_connection_is_an_upstream_that_cannot_be_reached() -> None:
    port = free_port()
    async with client_of(f"http://127.0.0.1:{port}/v1") as client:
        with pytest.raises(UpstreamUnreachable, match="cannot be reached") as failed:
            await ask(client)
        assert (failed.value.status, failed.value.code) == (502, "upstream_unreachable")
        assert "127.0.0.1" not in failed.value.message


async def test_connections_are_kept_and_used_again(upstream: Scripted, client: Client) -> None:
    upstream.script(*[FINE] * 3)
    for _ in range(3):
        await ask(client)
    assert [call.reused for call in upstream.calls] == [False, True, True]


async def test_a_connection_that_was_stale_is_tried_once_more_on_another(upstream: Scripted, client: Client) -> None:
    upstream.script(FINE, Drop(), Reply({"fine": "again"}))
    await ask(client)
    assert await ask(client) == b'{"fine":"again"}'
    assert [call.reused for call in upstream.calls] == [False, True, False]
    assert upstream.calls[1].body == upstream.calls[2].body == b"{}"


async def test_a_used_connection_that_breaks_late_is_not_tried_again(
    upstream: Scripted, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.upstream._STALE", 0.02)
    hold = asyncio.Event()
    upstream.script(FINE, Drop(hold=hold), FINE)
    await ask(client)
    asyncio.get_running_loop().call_later(0.05, hold.set)
    with pytest.raises(UpstreamUnreachable):
        await ask(client)
    assert (len(upstream.calls), upstream.unused) == (2, 1)


async def test_without_kept_connections_none_is_stale(upstream: Scripted) -> None:
    upstream.script(FINE, Drop(), FINE)
    client = Client(Upstream("scripted", upstream.url), keep=False)
    await ask(client)
    with pytest.raises(UpstreamUnreachable) as failed:
        await ask(client)
    await client.close()
    assert may_have_begun(failed.value)
    assert [call.reused for call in upstream.calls] == [False, False]


async def test_what_found_no_server_has_not_begun() -> None:
    for url in (f"http://127.0.0.1:{free_port()}/v1", "http://"):
        async with client_of(url) as client:
            with pytest.raises(UpstreamUnreachable) as failed:
                await ask(client)
            assert not may_have_begun(failed.value)


async def test_a_fresh_connection_that_is_dropped_is_not_tried_again(upstream: Scripted, client: Client) -> None:
    upstream.script(Drop(), FINE)
    with pytest.raises(UpstreamUnreachable, match="closed the connection without an answer"):
        await ask(client)
    assert (len(upstream.calls), upstream.unused) == (1, 1)


async def test_a_second_stale_connection_is_the_last_one(upstream: Scripted, client: Client) -> None:
    hold = asyncio.Event()
    upstream.script(*[Reply({}, hold=hold)] * 3)
    asking = [asyncio.create_task(ask(client)) for _ in range(3)]
    await upstream.called(3)
    hold.set()
    await asyncio.gather(*asking)  # three connections are kept now
    upstream.script(Drop(), Drop(), FINE)
    with pytest.raises(UpstreamUnreachable):
        await ask(client)
    assert [call.reused for call in upstream.calls[3:]] == [True, True]
    assert upstream.unused == 1


async def test_a_timeout_on_a_used_connection_is_not_tried_again(upstream: Scripted) -> None:
    upstream.script(FINE, Reply({}, hold=asyncio.Event()), FINE)
    async with client_of(upstream.url, timeouts=Timeouts(first_byte=0.05)) as client:
        await ask(client)
        with pytest.raises(UpstreamTimeout):
            await ask(client)
        assert (len(upstream.calls), upstream.calls[1].reused) == (2, True)


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 200 OK\r\n", b"H"])
async def test_a_used_connection_that_breaks_inside_an_answer_is_not_tried_again(begun: bytes) -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    answers = [whole, begun, whole]
    given: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"{}" in await reader.read(2**16):
            given.append(answers[len(given)])
            writer.write(given[-1])
            if given[-1] is begun:
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        async with client_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as client:
            assert await ask(client) == b"{}"
            with pytest.raises(UpstreamError):
                await ask(client)
        assert given == [whole, begun]


async def test_an_answer_that_is_left_half_read_takes_its_connection_with_it(
    upstream: Scripted, client: Client
) -> None:
    upstream.script(Stream([b"one", asyncio.Event()]), FINE)
    answer = await client.post(PATH, b"{}")
    answer.close()
    await upstream.closed(0)
    await ask(client)
    assert not upstream.calls[1].reused


async def test_cancelling_closes_the_connection_at_once(upstream: Scripted, client: Client) -> None:
    upstream.script(Reply({}, hold=asyncio.Event()), Stream([b"one", asyncio.Event()]))
    for call in range(2):
        asking = asyncio.create_task(ask(client))
        await upstream.called(call + 1)
        asking.cancel()
        await upstream.closed(call)
        assert asking.cancelled() or asking.cancelling()
        await asyncio.gather(asking, return_exceptions=True)


async def test_an_answer_that_is_over_gives_its_connection_back_if_it_ends_at_once(
    upstream: Scripted, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.upstream._REST", 5)
    hold = asyncio.Event()
    upstream.script(Stream([b"one", hold], close="end"), FINE)
    answer = await client.post(PATH, b"{}")
    assert await anext(answer.chunks()) == b"one"
    answer.leave()
    hold.set()
    await asyncio.sleep(0.02)
    await ask(client)
    assert upstream.calls[1].reused


async def test_an_answer_that_is_over_and_does_not_end_is_closed(upstream: Scripted, client: Client) -> None:
    upstream.script(Stream([b"one", asyncio.Event()]))
    answer = await client.post(PATH, b"{}")
    answer.leave()
    async with asyncio.timeout(10):
        await upstream.closed(0)


async def test_closing_the_client_closes_what_is_being_left(upstream: Scripted) -> None:
    upstream.script(Stream([b"one", asyncio.Event()]))
    async with client_of(upstream.url) as client:
        answer = await client.post(PATH, b"{}")
        answer.leave()
    assert answer.response.connection is None


# Answers that break.


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(upstream: Scripted, client: Client, status: int) -> None:
    upstream.script(Reply({}, status=status, headers={"location": upstream.url + "/models"}))
    with pytest.raises(UpstreamError, match=f"a redirect .status {status}.") as failed:
        await client.post(PATH, b"{}")
    assert (failed.value.status, len(upstream.requests)) == (502, 1)
    assert "http" not in failed.value.message


@pytest.mark.parametrize("url", ["http://", "ftp://u:secret@host/v1", "http://a b:x/v1"])
async def test_a_url_that_is_none_is_an_upstream_that_cannot_be_asked(url: str) -> None:
    async with client_of(url) as client:
        with pytest.raises(UpstreamUnreachable, match="cannot be asked") as failed:
            await client.post(PATH, b"{}")
        assert "secret" not in failed.value.message


async def test_a_header_that_is_none_is_not_sent(upstream: Scripted) -> None:
    async with client_of(upstream.url, headers={"x": "a\nb"}) as client:
        with pytest.raises(UpstreamUnreachable, match="cannot be asked"):
            await client.post(PATH, b"{}")
    assert not upstream.requests


async def test_a_stream_over_the_limit_is_given_up(
    upstream: Scripted, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.upstream._MOST", 5)
    hold = asyncio.Event()
    upstream.script(Stream([b"one", hold, b"two", asyncio.Event()]))
    answer = await client.post(PATH, b"{}")
    read = []
    with pytest.raises(UpstreamInvalid, match="more than 5 bytes"):
        async for chunk in answer.chunks():
            read.append(chunk)
            hold.set()
    assert read == [b"one"]
    answer.close()


@pytest.mark.parametrize("close", ["eof", "reset"])
async def test_what_arrived_before_a_break_is_given_and_then_the_break(
    upstream: Scripted, client: Client, close: Any
) -> None:
    upstream.script(Stream([b"one", b"two"], close=close))
    answer = await client.post(PATH, b"{}")
    read = []
    with pytest.raises(UpstreamTruncated):
        async for chunk in answer.chunks():
            read.append(chunk)
    answer.close()
    assert b"".join(read) == b"onetwo"


async def test_a_whole_body_that_breaks_off_is_truncated(upstream: Scripted, client: Client) -> None:
    upstream.script(Stream([b"{"], close="eof"))
    with pytest.raises(UpstreamTruncated):
        await ask(client)


async def test_a_body_over_the_limit_is_not_read_to_its_end(upstream: Scripted, client: Client) -> None:
    upstream.script(Stream([b"x" * 100, asyncio.Event()]))
    answer = await client.post(PATH, b"{}")
    with pytest.raises(UpstreamInvalid, match="more than 99 bytes"):
        await answer.read(99)
    answer.close()
    await upstream.closed(0)


async def test_an_errors_body_is_given_whole(upstream: Scripted, client: Client) -> None:
    upstream.script(Reply(body=b"x" * 65_536, status=500))
    assert await (await client.post(PATH, b"{}")).read_refusal() == b"x" * 65_536


@pytest.mark.parametrize("rest", [[b"x" * 100_000, asyncio.Event()], []], ids=["huge", "broken"])
async def test_of_a_huge_or_broken_error_the_beginning_is_given(
    upstream: Scripted, client: Client, rest: list[bytes | asyncio.Event]
) -> None:
    upstream.script(Stream([b"It broke. ", *rest], close="eof", status=500))
    answer = await client.post(PATH, b"{}")
    body = await answer.read_refusal()
    answer.close()
    assert body.startswith(b"It broke. ")
    assert len(body) <= 65_536


async def test_of_a_huge_error_no_more_than_needed_is_read(upstream: Scripted, client: Client) -> None:
    upstream.script(Stream([b"x" * 100_000, asyncio.Event()], status=500))
    answer = await client.post(PATH, b"{}")
    assert len(await answer.read_refusal()) <= 65_536
    answer.close()
    await upstream.closed(0)


@pytest.mark.parametrize(
    "answer",
    [Reply(body=b"<html>"), Reply({}, status=500), Reply(body=b"")],
    ids=["no JSON", "a failure", "nothing"],
)
async def test_json_that_is_none_is_an_upstream_error(upstream: Scripted, answer: Reply) -> None:
    upstream.answer = lambda _: answer
    async with client_of(upstream.url) as client:
        with pytest.raises(UpstreamError):
            await client.get_json("/chat/completions")


# Proxies. The scripted server takes any path's end for its own, so it can stand for a proxy.


async def asked_through(named: Mapping[str, str], url: str) -> None:
    with proxies(**named):
        client = Client(Upstream("scripted", url))
    try:
        await ask(client)
    finally:
        await client.close()


@pytest.mark.parametrize("name", ["http_proxy", "all_proxy", "ALL_PROXY"])
async def test_the_environments_proxy_is_used(upstream: Scripted, name: str) -> None:
    upstream.script(FINE)
    await asked_through({name: upstream.url.removesuffix("/v1")}, "http://nowhere.invalid/v1")
    assert upstream.calls[0].headers["host"] == "nowhere.invalid"


async def test_the_proxy_for_a_scheme_goes_before_the_one_for_all(upstream: Scripted) -> None:
    upstream.script(FINE)
    named = {"http_proxy": upstream.url.removesuffix("/v1"), "all_proxy": f"http://127.0.0.1:{free_port()}"}
    await asked_through(named, "http://nowhere.invalid/v1")
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*"])
async def test_what_the_environment_exempts_is_reached_without_it(upstream: Scripted, exempt: str) -> None:
    upstream.script(FINE)
    await asked_through({"http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": exempt}, upstream.url)
    assert len(upstream.calls) == 1


async def test_a_proxy_for_another_scheme_is_none(upstream: Scripted) -> None:
    upstream.script(FINE)
    await asked_through({"https_proxy": f"http://127.0.0.1:{free_port()}"}, upstream.url)
    assert len(upstream.calls) == 1


async def test_a_proxy_that_is_none_of_ours_is_left_aside_with_a_warning(
    upstream: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.script(FINE)
    await asked_through({"all_proxy": "socks5://me:secret@127.0.0.1:1"}, upstream.url)
    assert len(upstream.calls) == 1
    assert "proxies of type socks5 are not supported" in caplog.text
    assert "secret" not in caplog.text


async def test_a_proxy_may_be_named_without_a_scheme(upstream: Scripted) -> None:
    upstream.script(FINE)
    proxy = upstream.url.removesuffix("/v1").removeprefix("http://")
    await asked_through({"http_proxy": proxy}, "http://nowhere.invalid/v1")
    assert len(upstream.calls) == 1


async def test_the_environment_is_read_once(upstream: Scripted, client: Client) -> None:
    upstream.script(FINE)
    with proxies(http_proxy=f"http://127.0.0.1:{free_port()}"):
        await ask(client)
    assert len(upstream.calls) == 1


def test_a_password_in_an_address_is_not_shown() -> None:
    assert "hidden" not in repr(Upstream("a", "http://me:hidden@a/v1"))
