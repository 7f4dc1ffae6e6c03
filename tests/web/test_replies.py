import asyncio
from collections.abc import Mapping

import pytest

from responses_ingress.core.deltas import Accepted, Finish, Text
from responses_ingress.errors import UpstreamError
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ended, opened, spoken
from responses_ingress.web.replies import StreamOptions
from tests.invariants import check_stream
from tests.runs.stage import loop_turns, output_text, until
from tests.web.asgi import HASTY, Site, opened_site

SESSION = {"session-id": "a session"}
LIMITED = UpstreamError("Too many requests.", status=429, code="rate_limit_exceeded", retry_after=6.6)
COMMENT = b": keep-alive\n\n"
KEEPALIVE = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'


def frames(body: bytes) -> list[bytes]:
    return body.split(b"\n\n")[:-1]


# Streams.


async def test_a_stream_is_events_and_nothing_behind_them(site: Site) -> None:
    answer = await site.create(*spoken("one ", "two"), stream=True)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-length" not in answer.headers
    check_stream(answer.events)
    assert output_text(answer.events[-1]["response"]) == "one two"
    assert answer.body.rstrip().endswith(b"}")


async def test_a_stream_ends_with_done_where_that_is_set(migrated_database: str) -> None:
    async with opened_site(migrated_database, StreamOptions(done=True)) as site:
        answer = await site.create(*spoken("hi"), stream=True)
        assert frames(answer.body)[-1] == b"data: [DONE]"
        assert frames(answer.body)[-2].startswith(b"event: response.completed\n")
        failed = await site.create([Accepted()], UpstreamError("No."), stream=True)
        assert frames(failed.body)[-1] == b"data: [DONE]"


async def test_what_is_ready_leaves_in_one_write_up_to_a_cap_and_only_whole_events(site: Site) -> None:
    hold = asyncio.Event()
    visit = site.ask(opened(), hold, [Text(0, f"{number} ") for number in range(200)], ended(), stream=True)
    await visit.read_until(b"response.content_part.added")
    before = len(visit.writes)
    hold.set()
    answer = await visit.answer()
    check_stream(answer.events)
    writes = visit.writes[before:]
    assert all(write.endswith(b"\n\n") for write in writes if write)
    assert max(len(frames(write)) for write in writes) == 64
    assert len(writes) < 10


async def test_an_event_leaves_as_soon_as_it_may_be_seen(site: Site) -> None:
    hold = asyncio.Event()
    visit = site.ask(opened(), [Text(0, "one")], hold, [Text(0, "two")], ended(), stream=True)
    assert b'"delta":"one"' in await visit.read_until(b"response.output_text.delta")
    hold.set()
    check_stream((await visit.answer()).events)


# Headers.


async def test_headers_wait_until_the_backend_has_accepted(site: Site) -> None:
    hold = asyncio.Event()
    visit = site.ask(hold, *spoken("hi"), stream=True)
    await site.stage.backend.called(1)
    await until(lambda: site.stage.rows("SELECT id FROM responses"))
    await loop_turns()
    assert not visit.status
    hold.set()
    assert (await visit.answer()).status == 200


async def test_headers_wait_no_longer_than_is_set(migrated_database: str) -> None:
    async with opened_site(migrated_database, StreamOptions(accept_wait=0.01)) as site:
        visit = site.ask(asyncio.Event(), stream=True)
        await visit.read_until(b"response.created")
        assert visit.status == 200


async def test_a_refusal_before_acceptance_is_a_status_with_the_upstreams_patience(site: Site) -> None:
    answer = await site.create(LIMITED, stream=True)
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.headers["content-type"] == "application/json"
    assert (answer.error["code"], answer.error["message"]) == ("rate_limit_exceeded", "Too many requests.")


async def test_patience_is_at_least_a_second(site: Site) -> None:
    answer = await site.create(UpstreamError("Soon.", status=503, retry_after=0.2), stream=True)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


async def test_a_refusal_after_the_headers_is_a_failed_response(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY) as site:
        hold = asyncio.Event()
        visit = site.ask(hold, LIMITED, stream=True)
        await visit.read_until(b"response.created")
        hold.set()
        answer = await visit.answer()
        assert answer.status == 200
        check_stream(answer.events)
        assert answer.events[-1]["response"]["error"]["code"] == "rate_limit_exceeded"


async def test_a_failure_after_acceptance_is_a_failed_response_however_soon_it_comes(site: Site) -> None:
    answer = await site.create([Accepted()], LIMITED, stream=True)
    assert answer.status == 200
    check_stream(answer.events)
    assert answer.events[-1]["type"] == "response.failed"


# Silence.


@pytest.mark.parametrize(
    ("headers", "sign"),
    [
        ({}, COMMENT),
        ({"user-agent": "OpenAI/Python 2.54"}, COMMENT),
        ({"originator": "codex_cli_rs"}, KEEPALIVE),
        ({"user-agent": "codex_exec/0.169.0 (Debian)"}, KEEPALIVE),
    ],
    ids=["nobody", "the SDK", "codex's originator", "codex's agent"],
)
async def test_silence_is_broken_for_codex_by_an_event_and_else_by_a_comment(
    migrated_database: str, headers: Mapping[str, str], sign: bytes
) -> None:
    async with opened_site(migrated_database, StreamOptions(accept_wait=0, keepalive=0.02)) as site:
        hold = asyncio.Event()
        visit = site.ask(hold, *spoken("hi"), stream=True, headers=headers)
        await visit.read_until(sign + sign)
        hold.set()
        answer = await visit.answer()
        assert ({COMMENT, KEEPALIVE} - {sign}).isdisjoint(visit.writes)
        check_stream([event for event in answer.events if event["type"] != "keepalive"])


async def test_a_stream_that_is_not_silent_gets_no_sign_of_life(site: Site) -> None:
    answer = await site.create(*spoken(*["word "] * 300), stream=True)
    assert COMMENT not in answer.body


# JSON.


async def test_a_json_reply_is_the_response_when_it_has_ended(site: Site) -> None:
    hold = asyncio.Event()
    visit = site.ask(hold, *spoken("one ", "two"))
    await site.stage.backend.called(1)
    await loop_turns()
    assert not visit.status
    hold.set()
    answer = await visit.answer()
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["content-length"] == str(len(answer.body))
    assert (answer.json["status"], output_text(answer.json)) == ("completed", "one two")


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_failed_response_is_an_http_error_in_a_json_reply(site: Site, accepted: bool) -> None:
    answer = await site.create(*[[Accepted()]] * accepted, LIMITED)
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.error["code"] == "rate_limit_exceeded"


async def test_an_incomplete_response_is_a_response_in_a_json_reply(site: Site) -> None:
    answer = await site.create(opened(), [Text(0, "half"), Finish("incomplete", reason="max_output_tokens")])
    assert (answer.status, answer.json["status"]) == (200, "incomplete")


@pytest.mark.parametrize(
    ("code", "status"), [("server_error", 502), ("rate_limit_exceeded", 429), ("context_length_exceeded", 400)]
)
async def test_a_response_that_the_backend_ended_as_failed_is_an_http_error_too(
    site: Site, code: str, status: int
) -> None:
    answer = await site.create([Accepted(), Finish("failed", error={"code": code, "message": "It broke."})])
    assert answer.status == status
    assert (answer.error["code"], answer.error["message"]) == (code, "It broke.")


# Clients that leave.


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_only_stops_following(migrated_database: str, stream: bool) -> None:
    async with opened_site(migrated_database, limits=Limits(disconnect_grace=3600)) as site:
        hold = asyncio.Event()
        visit = site.ask(opened(), hold, [Text(0, "whole")], ended(), stream=stream)
        await site.stage.backend.called(1)
        await until(lambda: site.stage.rows("SELECT id FROM responses"))
        visit.left.set()
        await visit.task
        hold.set()
        (row,) = site.stage.rows("SELECT id FROM responses")
        await until(lambda: site.stage.row(row["id"])["status"] == "completed")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_run_whose_client_left_is_cancelled_after_the_grace_period(
    migrated_database: str, stream: bool
) -> None:
    async with opened_site(migrated_database, limits=Limits(disconnect_grace=0)) as site:
        visit = site.ask(opened(), asyncio.Event(), stream=stream)
        await until(lambda: site.stage.rows("SELECT id FROM responses"))
        visit.left.set()
        await visit.task
        await site.stage.backend.calls[0].over.wait()
        assert site.stage.backend.calls[0].cut


@pytest.mark.parametrize("stream", [True, False])
async def test_a_run_that_makes_way_for_the_next_turn_ends_without_a_word_to_the_client_that_left(
    migrated_database: str, stream: bool
) -> None:
    async with opened_site(migrated_database, limits=Limits(disconnect_grace=3600)) as site:
        visit = site.ask(opened(), asyncio.Event(), stream=stream, headers=SESSION)
        await until(lambda: site.stage.rows("SELECT id FROM responses"))
        visit.left.set()
        await visit.task
        sent = len(visit.writes)
        answer = await site.create(*spoken("next"), headers=SESSION)
        assert (answer.status, answer.json["status"]) == (200, "completed")
        assert len(visit.writes) == sent
