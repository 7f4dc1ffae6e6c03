"""Responses apart from the request that made them: in the background, followed again, cancelled."""

import asyncio
from typing import Any

import pytest

from responses_ingress.core.deltas import Text
from responses_ingress.errors import UpstreamError
from responses_ingress.runs.runner import Limits
from responses_ingress.store.retention import delete_expired, drop_journals
from responses_ingress.testing import ended, opened, spoken
from responses_ingress.web.callers import Keyring
from tests.invariants import check_stream
from tests.runs.stage import output_text, until
from tests.web.asgi import HASTY, Site, opened_site
from tests.wire import Answer, parse_events


def path(response_id: str, query: str = "") -> str:
    return f"/v1/responses/{response_id}{query}"


async def streamed(site: Site, response_id: str, after: int | None = None) -> Answer:
    query = "?stream=true" + (f"&starting_after={after}" if after is not None else "")
    return await site.get(path(response_id, query))


async def polled(site: Site, response_id: str) -> dict[str, Any]:
    """The response when it has ended, as a client sees it that asks again and again."""
    await until(lambda: site.stage.row(response_id)["status"] not in ("queued", "in_progress"))
    found: dict[str, Any] = (await site.get(path(response_id))).json
    return found


# In the background.


async def test_a_background_response_is_answered_at_once_and_found_when_it_is_there(site: Site) -> None:
    hold = asyncio.Event()
    created = await site.create(hold, *spoken("in the end"), background=True)
    assert (created.status, created.json["status"], created.json["background"]) == (200, "queued", True)
    assert (created.json["output"], created.json["usage"], created.json["completed_at"]) == ([], None, None)
    await site.stage.backend.called(1)
    assert (await site.get(path(created.json["id"]))).json == created.json
    hold.set()
    found = await polled(site, created.json["id"])
    assert (found["status"], output_text(found)) == ("completed", "in the end")


async def test_while_it_runs_its_output_so_far_is_shown(site: Site) -> None:
    created = await site.create(opened(), [Text(0, "so far")], asyncio.Event(), background=True)
    await until(lambda: site.stage.journal(created.json["id"]))
    found = (await site.get(path(created.json["id"]))).json
    assert (found["status"], output_text(found)) == ("in_progress", "so far")
    assert site.stage.row(created.json["id"])["followed_until"] is not None


async def test_a_background_stream_can_be_left_and_taken_up_again(site: Site) -> None:
    hold = asyncio.Event()
    visit = site.ask(opened(), [Text(0, "so ")], hold, [Text(0, "far")], ended(), background=True, stream=True)
    await visit.read_until(b'"delta":"so "')
    begun = parse_events(b"".join(visit.writes))
    visit.left.set()
    await visit.task
    id = begun[0]["response"]["id"]
    rest = site.visit("GET", path(id, f"?stream=true&starting_after={begun[-1]['sequence_number']}"))
    hold.set()
    events = [*begun, *(await rest.answer()).events]
    check_stream(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert output_text(events[-1]["response"]) == "so far"


async def test_a_refusal_of_the_backend_is_a_failed_response_where_it_runs_in_the_background(site: Site) -> None:
    answer = await site.create(UpstreamError("No."), background=True, stream=True)
    check_stream(answer.events)
    assert answer.events[-1]["response"]["error"]["code"] == "upstream_error"


async def test_over_the_limit_is_429_and_when_to_come_again(migrated_database: str) -> None:
    async with opened_site(migrated_database, limits=Limits(max_background=1, max_queued=1)) as site:
        for _ in range(2):
            assert (await site.create(asyncio.Event(), background=True)).status == 200
        refused = await site.create(background=True)
        assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "queue_full", "5")
        assert len(site.stage.rows("SELECT id FROM responses")) == 2


async def test_what_is_not_stored_is_there_for_ten_minutes_after_its_end(site: Site) -> None:
    created = await site.create(*spoken("hi"), background=True, store=False)
    id = created.json["id"]
    found = await polled(site, id)
    assert (found["store"], output_text(found)) == (False, "hi")
    assert (await site.create(previous_response_id=id)).error["code"] == "previous_response_not_found"
    site.stage.clock.advance(601)
    assert (await site.get(path(id))).status == 404  # its time is over, whether or not it was swept away
    async with site.stage.database.transaction() as connection:
        await delete_expired(connection, site.stage.clock())
    assert all(site.stage.rows(f"SELECT * FROM {table}") == [] for table in ("items", "branches", "preambles"))


# Followed again.


async def test_an_ended_stream_is_told_again_to_the_letter(site: Site) -> None:
    first = await site.create(*spoken("a", "b"), stream=True)
    id = first.events[0]["response"]["id"]
    assert (await streamed(site, id)).events == first.events
    for after in (0, 4, len(first.events) - 2):
        assert (await streamed(site, id, after)).events == first.events[after + 1 :]


@pytest.mark.parametrize("past", [0, 1, 1000])
async def test_behind_the_last_event_there_is_nothing(site: Site, past: int) -> None:
    first = await site.create(*spoken("a"), stream=True)
    answer = await streamed(site, first.events[0]["response"]["id"], len(first.events) - 1 + past)
    assert (answer.status, answer.events) == (200, [])


async def test_who_has_seen_more_than_a_crash_left_gets_the_end(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY) as site:
        visit = site.ask(opened(), [Text(0, "seen")], asyncio.Event(), stream=True)
        id = parse_events(await visit.read_until(b"response.output_text.delta"))[0]["response"]["id"]
        await until(lambda: site.stage.journal(id))
        async with opened_site(migrated_database, HASTY, limits=Limits(lease=1), seed=2) as other:
            other.stage.clock.advance(1000)
            await until(lambda: other.stage.row(id)["status"] == "failed")
            events = (await streamed(other, id, 500)).events
        assert [event["type"] for event in events] == ["response.failed"]
        assert events[0]["response"]["error"]["code"] == "server_restarted"


async def test_a_running_stream_is_followed_beside_the_one_who_asked(site: Site) -> None:
    hold = asyncio.Event()
    first = site.ask(opened(), [Text(0, "so ")], hold, [Text(0, "far")], ended(), stream=True)
    id = parse_events(await first.read_until(b'"delta":"so "'))[0]["response"]["id"]
    others = [site.visit("GET", path(id, "?stream=true")) for _ in range(3)]
    for other in others:
        await other.read_until(b'"delta":"so "')
    hold.set()
    told = (await first.answer()).events
    assert [(await other.answer()).events for other in others] == [told] * 3


@pytest.mark.parametrize("query", ["x", "-1", "1.5", "9" * 12])
async def test_a_number_that_is_none_is_refused(site: Site, query: str) -> None:
    created = await site.create(*spoken("hi"))
    refused = await site.get(path(created.json["id"], f"?stream=true&starting_after={query}"))
    assert (refused.status, refused.error["param"]) == (400, "starting_after")


async def test_numbers_are_not_kept_for_ever(site: Site) -> None:
    first = await site.create(*spoken("a", "b"), stream=True)
    id = first.events[0]["response"]["id"]
    site.stage.clock.advance(601)
    async with site.stage.database.transaction() as connection:
        await drop_journals(connection, site.stage.clock())
    refused = await streamed(site, id, 3)
    assert (refused.status, refused.error["code"]) == (400, "stream_cursor_expired")
    told = (await streamed(site, id)).events
    check_stream(told)
    assert told[-1]["response"] == first.events[-1]["response"]


async def test_what_is_not_there_is_not_streamed(migrated_database: str) -> None:
    keys = Keyring((("a", _sha(b"ka")), ("b", _sha(b"kb"))))
    async with opened_site(migrated_database, keys=keys) as site:
        created = await site.create(*spoken("hi"), headers={"x-api-key": "ka"}, background=True)
        id = created.json["id"]
        for other in ("", "/cancel"):
            method = "POST" if other else "GET"
            target = path(id, other or "?stream=true")
            refused = await site.visit(method, target, headers={"x-api-key": "kb"}).answer()
            assert (refused.status, refused.error["code"]) == (404, None)
        assert (await site.get(path("resp_x", "?stream=true"), {"x-api-key": "ka"})).status == 404


def _sha(key: bytes) -> bytes:
    from hashlib import sha256

    return sha256(key).digest()


# Cancelled.


async def test_a_cancel_ends_the_run_and_can_be_repeated(site: Site) -> None:
    created = await site.create(opened(), [Text(0, "half")], asyncio.Event(), background=True)
    id = created.json["id"]
    await site.stage.backend.called(1)
    first = await site.post(path(id, "/cancel"))
    assert (first.status, first.json["status"], first.json["output"]) == (200, "cancelled", [])
    assert (await site.post(path(id, "/cancel"))).json == first.json
    assert (await site.get(path(id))).json == first.json
    assert site.stage.backend.calls[0].cut


async def test_a_cancel_of_what_has_ended_gives_it_back_unchanged(site: Site) -> None:
    created = await site.create(*spoken("hi"), background=True)
    found = await polled(site, created.json["id"])
    assert (await site.post(path(created.json["id"], "/cancel"))).json == found


async def test_a_synchronous_response_is_not_cancelled(site: Site) -> None:
    visit = site.ask(opened(), [Text(0, "so far")], asyncio.Event(), stream=True)
    id = parse_events(await visit.read_until(b"response.output_text.delta"))[0]["response"]["id"]
    refused = await site.post(path(id, "/cancel"))
    assert (refused.status, refused.error["message"]) == (400, "Cannot cancel a synchronous response.")
    created = await site.create(*spoken("hi"))
    assert (await site.post(path(created.json["id"], "/cancel"))).status == 400


# Asked again.


async def test_the_sdk_trying_again_gets_the_answer_to_its_first_try(site: Site) -> None:
    hold = asyncio.Event()
    first = site.ask(hold, *spoken("once"), headers={"x-stainless-retry-count": "0"})
    await site.stage.backend.called(1)
    first.left.set()
    again = site.ask(headers={"x-stainless-retry-count": "1"})
    hold.set()
    answer = await again.answer()
    assert (answer.status, output_text(answer.json)) == (200, "once")
    assert len(site.stage.backend.calls) == 1


async def test_an_idempotency_key_means_one_response(site: Site) -> None:
    key = {"idempotency-key": "order 17"}
    first = await site.create(*spoken("once"), headers=key)
    assert (await site.create(headers=key)).json == first.json
    refused = await site.create(headers=key, input="something else")
    assert (refused.status, refused.error["code"]) == (400, "idempotency_key_reused")
    assert (await site.create(headers={"idempotency-key": "x" * 600})).status == 400
    assert len(site.stage.backend.calls) == 1


async def test_an_idempotent_background_response_is_told_as_it_is_now(site: Site) -> None:
    key = {"idempotency-key": "order 18"}
    first = await site.create(*spoken("once"), headers=key, background=True)
    found = await polled(site, first.json["id"])
    assert (await site.create(headers=key, background=True)).json == found
