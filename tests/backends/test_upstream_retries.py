"""Requests that the client of upstreams makes again, and whose certificates it trusts."""

import asyncio
import ssl
from pathlib import Path

import pytest

from responses_ingress.backends.upstream import Client, Retries, Upstream
from responses_ingress.errors import UpstreamUnreachable
from tests.backends.test_upstream import FINE, PATH, client_of
from tests.upstream import Drop, Reply
from tests.upstream import Upstream as Scripted

# Requests that are made again.


@pytest.mark.parametrize("status", [429, 503, 529])
async def test_a_refusal_for_now_is_waited_out(upstream: Scripted, status: int) -> None:
    upstream.script(Reply({}, status=status, headers={"retry-after": "0"}), Reply({}, status=status), FINE)
    async with client_of(upstream.url, retries=Retries(2, first=0.001)) as client:
        answer = await client.post(PATH, b"{}", None, {"x": "y"})
        assert (answer.status, len(upstream.calls)) == (200, 3)
        answer.close()
    assert [(call.body, call.headers["x"]) for call in upstream.calls] == [(b"{}", "y")] * 3


@pytest.mark.parametrize(
    ("refusal", "retries"),
    [
        (Reply({}, status=503), Retries(0)),
        (Reply({}, status=503, headers={"retry-after": "11"}), Retries(5, first=0.001)),
        *((Reply({}, status=status), Retries(5, first=0.001)) for status in (400, 401, 408, 500, 502, 504)),
    ],
)
async def test_other_refusals_stand(upstream: Scripted, refusal: Reply, retries: Retries) -> None:
    upstream.script(refusal)
    async with client_of(upstream.url, retries=retries) as client:
        answer = await client.post(PATH, b"{}")
        assert (answer.status, len(upstream.calls)) == (refusal.status, 1)
        answer.close()


async def test_the_last_refusal_is_the_answer(upstream: Scripted) -> None:
    upstream.script(*[Reply({"try": number}, status=503) for number in range(3)])
    async with client_of(upstream.url, retries=Retries(2, first=0.001)) as client:
        assert await (await client.post(PATH, b"{}")).read() == b'{"try":2}'


async def test_a_server_that_is_not_there_yet_is_waited_for(
    upstream: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "responses_ingress.backends.upstream")
    await upstream.stop()
    upstream.script(FINE)
    async with client_of(upstream.url, retries=Retries(8, first=0.02)) as client:
        asking = asyncio.create_task(client.post(PATH, b"{}"))
        while not caplog.records:  # noqa: ASYNC110 - a line in the log is all that tells of it
            await asyncio.sleep(0)
        async with upstream:
            answer = await asking
            assert answer.status == 200
            answer.close()


async def test_what_may_have_begun_is_not_asked_for_again(upstream: Scripted) -> None:
    upstream.script(Drop(), FINE)
    async with client_of(upstream.url, retries=Retries(5, first=0.001)) as client:
        with pytest.raises(UpstreamUnreachable):
            await client.post(PATH, b"{}")
    assert len(upstream.calls) == 1


async def test_without_kept_connections_nothing_is_asked_for_again(upstream: Scripted) -> None:
    upstream.script(Reply({}, status=503))
    client = Client(Upstream("scripted", upstream.url, retries=Retries(5, first=0.001)), keep=False)
    assert (await client.post(PATH, b"{}")).status == 503
    await client.close()


# Certificates.

CERTIFICATE = Path(__file__).with_name("certificate.pem")
"""Of 127.0.0.1, with its key; signed by itself, good until 2126, and known nowhere else."""


async def answered_over_tls(ca_file: Path | None) -> bytes:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi")
        await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with client_of(url, ca_file=ca_file, retries=Retries(5)) as client:
            return await (await client.post(PATH, b"{}")).read()


async def test_a_certificate_of_ones_own_can_be_trusted() -> None:
    assert await answered_over_tls(CERTIFICATE) == b"hi"


async def test_a_certificate_of_somebody_is_not_trusted() -> None:
    with pytest.raises(UpstreamUnreachable, match="a certificate that is not trusted"):
        await answered_over_tls(None)
