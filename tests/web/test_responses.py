import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import pytest

from responses_ingress.core.deltas import Accepted, Text
from responses_ingress.errors import UpstreamError
from responses_ingress.runs.runner import Limits
from responses_ingress.testing import ended, opened, spoken
from responses_ingress.web.callers import Keyring
from responses_ingress.web.responses import RequestLimits
from tests.runs.stage import output_text, until
from tests.web.asgi import HASTY, Site, opened_site
from tests.wire import Answer

KEYS = Keyring((("a", sha256(b"key-a").digest()), ("b", sha256(b"key-b").digest())))
A, B = {"x-api-key": "key-a"}, {"x-api-key": "key-b"}
THREAD = "x-responses-ingress-thread"


@pytest.fixture
async def shared(migrated_database: str) -> AsyncIterator[Site]:
    """A site with two tenants."""
    async with opened_site(migrated_database, keys=KEYS) as site:
        yield site


def message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def texts(answer: Answer) -> list[str]:
    return [item["content"][0]["text"] for item in answer.json["data"]]


# Create and retrieve.


async def test_what_was_created_is_retrieved_as_it_was(site: Site) -> None:
    created = await site.create(*spoken("hello"), instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    found = await site.get(f"/v1/responses/{created.json['id']}")
    assert (found.status, found.json) == (200, created.json)
    assert (found.json["instructions"], found.json["metadata"]) == ("Be brief.", {"a": "b"})


async def test_the_thread_goes_out_in_a_header(site: Site) -> None:
    session = {"session-id": "s"}
    first = await site.create(*spoken("one"), headers=session)
    second = await site.create(*spoken("two"), headers=session, stream=True)
    other = await site.create(*spoken("three"))
    assert first.headers[THREAD] == second.headers[THREAD] != other.headers[THREAD]
    child = await site.create(*spoken("four"), previous_response_id=other.json["id"])
    assert child.headers[THREAD] == other.headers[THREAD]


async def test_a_response_is_retrieved_while_it_runs_with_its_output_so_far(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY) as site:
        hold = asyncio.Event()
        visit = site.ask(opened(), [Text(0, "so far")], hold, [Text(0, " so good")], ended(), stream=True)
        await visit.read_until(b"response.output_text.delta")
        (row,) = site.stage.rows("SELECT id FROM responses")
        found = await site.get(f"/v1/responses/{row['id']}")
        assert (found.json["status"], output_text(found.json)) == ("in_progress", "so far")
        assert found.json["output"][0]["status"] == "in_progress"
        assert found.json["usage"] is None
        hold.set()
        await visit.answer()
        found = await site.get(f"/v1/responses/{row['id']}")
        assert (found.json["status"], output_text(found.json)) == ("completed", "so far so good")


async def test_a_response_that_runs_in_another_process_is_retrieved_from_its_journal(migrated_database: str) -> None:
    careful = Limits(flush_interval=0)
    async with opened_site(migrated_database, HASTY, limits=careful) as here:
        visit = here.ask(opened(), [Text(0, "so far")], asyncio.Event(), stream=True, instructions="Be brief.")
        await visit.read_until(b"response.output_text.delta")
        (row,) = here.stage.rows("SELECT id FROM responses")
        seen = await here.get(f"/v1/responses/{row['id']}")
        async with opened_site(migrated_database) as there:
            found = await there.get(f"/v1/responses/{row['id']}")
        assert found.json == seen.json
        assert output_text(found.json) == "so far"


async def test_a_failed_response_is_retrieved_with_its_error_and_what_it_had_said(site: Site) -> None:
    await site.create(opened(), [Text(0, "so far")], UpstreamError("It broke."), stream=True)
    (row,) = site.stage.rows("SELECT id FROM responses")
    found = (await site.get(f"/v1/responses/{row['id']}")).json
    assert (found["status"], found["error"]) == ("failed", {"code": "upstream_error", "message": "It broke."})
    assert (output_text(found), found["output"][0]["status"]) == ("so far", "incomplete")


async def test_a_cancelled_response_is_retrieved_without_output(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY, limits=Limits(disconnect_grace=0)) as site:
        visit = site.ask(opened(), [Text(0, "so far")], asyncio.Event(), stream=True)
        await visit.read_until(b"response.output_text.delta")
        (row,) = site.stage.rows("SELECT id FROM responses")
        visit.left.set()
        await until(lambda: site.stage.row(row["id"])["status"] == "cancelled")
        found = (await site.get(f"/v1/responses/{row['id']}")).json
        assert (found["status"], found["output"], found["error"]) == ("cancelled", [], None)


@pytest.mark.parametrize("query", ["stream=false", "include[]=x", "starting_after=3"])
async def test_what_else_a_query_says_does_not_matter(site: Site, query: str) -> None:
    created = await site.create(*spoken("hi"))
    found = await site.get(f"/v1/responses/{created.json['id']}?{query}")
    assert found.json == created.json


async def test_a_response_that_is_not_stored_is_not_found(site: Site) -> None:
    created = await site.create(*spoken("hi"), store=False)
    for path in ("", "/input_items"):
        assert (await site.get(f"/v1/responses/{created.json['id']}{path}")).status == 404
    assert (await site.create(previous_response_id=created.json["id"])).status == 400


async def test_an_unknown_response_is_not_found_and_its_id_quoted_in_part(site: Site) -> None:
    for id in ("resp_none", "x" * 5000):
        answer = await site.get(f"/v1/responses/{id}")
        assert (answer.status, answer.error["code"]) == (404, None)
        assert f"'{id[:100]}'" in answer.error["message"]


# Delete.


async def test_a_deleted_response_is_gone_at_once_and_its_descendants_are_not(site: Site) -> None:
    parent = (await site.create(*spoken("one"))).json["id"]
    child = (await site.create(*spoken("two"), previous_response_id=parent)).json["id"]
    deleted = await site.delete(f"/v1/responses/{parent}")
    assert (deleted.status, deleted.json) == (200, {"id": parent, "object": "response", "deleted": True})
    assert (await site.get(f"/v1/responses/{parent}")).status == 404
    assert (await site.delete(f"/v1/responses/{parent}")).status == 404
    refused = await site.create(previous_response_id=parent)
    assert (refused.status, refused.error["code"]) == (400, "previous_response_not_found")
    assert (await site.create(*spoken("three"), previous_response_id=child)).status == 200
    assert len(site.stage.backend.calls[2].turn.items) == 5


async def test_a_running_response_cannot_be_deleted(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY) as site:
        visit = site.ask([Accepted()], asyncio.Event(), stream=True)
        await visit.read_until(b"response.in_progress")
        (row,) = site.stage.rows("SELECT id FROM responses")
        answer = await site.delete(f"/v1/responses/{row['id']}")
        assert (answer.status, answer.error["message"]) == (400, "Cannot delete an in-flight response.")
        assert (await site.get(f"/v1/responses/{row['id']}")).status == 200


# Input items.


@pytest.fixture
async def listed(site: Site) -> tuple[Site, str]:
    """A site, and the path of five input items."""
    previous = (await site.create(*spoken("earlier"))).json["id"]
    items = [message(text) for text in "abcde"]
    created = await site.create(*spoken("hi"), input=items, previous_response_id=previous)
    return site, f"/v1/responses/{created.json['id']}/input_items"


async def test_input_items_are_the_requests_own_newest_first(listed: tuple[Site, str]) -> None:
    site, path = listed
    answer = await site.get(path)
    assert (answer.status, texts(answer)) == (200, list("edcba"))
    assert (answer.json["object"], answer.json["has_more"]) == ("list", False)
    assert answer.json["first_id"] == answer.json["data"][0]["id"]
    assert answer.json["last_id"] == answer.json["data"][-1]["id"]
    assert texts(await site.get(f"{path}?order=asc")) == list("abcde")


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_follow_one_another_without_gap_or_repeat(listed: tuple[Site, str], order: str) -> None:
    site, path = listed
    read: list[str] = []
    after = ""
    for more in (True, True, False):
        page = await site.get(f"{path}?limit=2&order={order}{after}")
        read += texts(page)
        assert page.json["has_more"] is more
        after = f"&after={page.json['last_id']}"
    assert read == (list("abcde") if order == "asc" else list("edcba"))
    end = await site.get(f"{path}?limit=2&order={order}{after}")
    assert end.json == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("limit=0", 400, "limit"),
        ("limit=101", 400, "limit"),
        ("limit=-1", 400, "limit"),
        ("limit=ten", 400, "limit"),
        ("limit=", 400, "limit"),
        ("limit=9999999999999999999999", 400, "limit"),
        ("limit=%C2%B2", 400, "limit"),
        ("limit=0000000010000", 400, "limit"),
        ("limit=000000005" + "0" * 5000, 400, "limit"),
        ("limit=005", 200, None),
        ("order=up", 400, "order"),
        ("order=", 400, "order"),
        ("after=msg_none", 404, "after"),
        ("after=", 404, "after"),
        ("after=%00", 404, "after"),
        ("limit=100", 200, None),
        ("limit=1&limit=5", 200, None),
        ("include[]=message.input_image.image_url", 200, None),
    ],
)
async def test_a_wrong_query_is_refused_and_named(
    listed: tuple[Site, str], query: str, status: int, param: str | None
) -> None:
    site, path = listed
    answer = await site.get(f"{path}?{query}")
    assert answer.status == status
    assert status == 200 or answer.error["param"] == param


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_come_to_an_end_where_two_items_have_one_id(site: Site, order: str) -> None:
    items = [{"id": "msg_same", **message(text)} for text in "ab"] + [{"id": "msg_other", **message("c")}]
    created = await site.create(*spoken("hi"), input=items)
    path = f"/v1/responses/{created.json['id']}/input_items?limit=1&order={order}"
    pages = [await site.get(path)]
    while pages[-1].json["has_more"]:
        assert len(pages) < 3
        pages.append(await site.get(f"{path}&after={pages[-1].json['last_id']}"))
    assert {item["id"] for page in pages for item in page.json["data"]} == {"msg_same", "msg_other"}


async def test_listed_messages_have_parts_and_a_status(site: Site) -> None:
    assistant = {"type": "message", "role": "assistant", "content": "said"}
    created = await site.create(*spoken("hi"), input=[assistant, message("asked")])
    listed = (await site.get(f"/v1/responses/{created.json['id']}/input_items?order=asc")).json["data"]
    assert [item["content"][0]["type"] for item in listed] == ["output_text", "input_text"]
    assert [item["status"] for item in listed] == ["completed", "completed"]
    assert all(item["id"].startswith("msg_") for item in listed)


async def test_input_items_are_listed_while_the_response_runs_and_when_it_failed(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY) as site:
        hold = asyncio.Event()
        visit = site.ask([Accepted()], hold, UpstreamError("No."), input=[message("a"), message("b")], stream=True)
        await visit.read_until(b"response.in_progress")
        (row,) = site.stage.rows("SELECT id FROM responses")
        running = await site.get(f"/v1/responses/{row['id']}/input_items")
        hold.set()
        await visit.answer()
        failed = await site.get(f"/v1/responses/{row['id']}/input_items")
        assert texts(running) == texts(failed) == ["b", "a"]


# Limits of a request.


async def test_more_items_than_the_limit_are_refused(migrated_database: str) -> None:
    async with opened_site(migrated_database, requests=RequestLimits(max_items=2)) as site:
        assert (await site.create(*spoken("hi"), input=[message("a")] * 2)).status == 200
        answer = await site.create(input=[message("a")] * 3)
        assert (answer.status, answer.error["param"]) == (400, "input")


async def test_unknown_fields_are_ignored_and_named_in_the_log_or_refused_where_that_is_set(
    migrated_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    odd: dict[str, Any] = {"odd_field": "secret", "a\nb": 1, "x" * 50: 1}
    async with opened_site(migrated_database) as site:
        created = await site.create(*spoken("hi"), **odd)
        assert created.status == 200
        ignored = rf"{created.json['id']}: unknown fields 'odd_field', 'a\nb', '{'x' * 40}'"
        assert f"{ignored}\n" in caplog.text
        assert "secret" not in caplog.text
    async with opened_site(migrated_database, requests=RequestLimits(strict=True)) as site:
        refused = await site.create(odd_field="secret")
        assert (refused.error["code"], refused.error["param"]) == ("unknown_parameter", "odd_field")


# Tenants.


def plain(answer: Answer, id: str) -> tuple[int, str]:
    """What a client can see of an answer, but for the id it sent itself."""
    return answer.status, answer.body.decode().replace(id, "ID")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items")])
async def test_another_tenants_response_is_exactly_as_unknown_as_one_that_never_was(
    shared: Site, method: str, path: str
) -> None:
    theirs = (await shared.create(*spoken("hi"), headers=A)).json["id"]
    never = theirs[:-1] + ("0" if theirs[-1] != "0" else "1")
    answers = [await shared.visit(method, f"/v1/responses/{id}{path}", headers=B).answer() for id in (theirs, never)]
    assert plain(answers[0], theirs) == plain(answers[1], never)
    assert answers[0].status == 404
    assert (await shared.get(f"/v1/responses/{theirs}", A)).status == 200


async def test_another_tenants_running_response_is_as_unknown(migrated_database: str) -> None:
    async with opened_site(migrated_database, HASTY, keys=KEYS) as site:
        visit = site.ask([Accepted()], asyncio.Event(), headers=A, stream=True)
        await visit.read_until(b"response.in_progress")
        (row,) = site.stage.rows("SELECT id FROM responses")
        for method in ("GET", "DELETE"):
            answer = await site.visit(method, f"/v1/responses/{row['id']}", headers=B).answer()
            assert answer.status == 404
        refused = await site.create(previous_response_id=row["id"], headers=B)
        assert refused.error["code"] == "previous_response_not_found"  # at once: nobody waits for it


async def test_another_tenants_response_cannot_be_built_on(shared: Site) -> None:
    theirs = (await shared.create(*spoken("hi"), headers=A)).json["id"]
    answers = [await shared.create(headers=B, previous_response_id=id) for id in (theirs, "resp_none")]
    assert plain(answers[0], theirs) == plain(answers[1], "resp_none")
    assert (answers[0].status, answers[0].error["code"]) == (400, "previous_response_not_found")
    assert len(shared.stage.backend.calls) == 1


async def test_another_tenants_item_cannot_be_referred_to(shared: Site) -> None:
    created = (await shared.create(*spoken("secret"), headers=A)).json
    theirs = created["output"][0]["id"]
    answers = [
        await shared.create(headers=B, input=[{"type": "item_reference", "id": id}, message("repeat it")])
        for id in (theirs, "msg_none")
    ]
    assert plain(answers[0], theirs) == plain(answers[1], "msg_none")
    assert (answers[0].status, answers[0].error["param"]) == (404, "input")
    own = await shared.create(*spoken("hi"), headers=A, input=[{"type": "item_reference", "id": theirs}])
    assert own.status == 200
    assert shared.stage.backend.calls[1].turn.items == created["output"]


async def test_another_tenants_session_of_the_same_name_is_another_session(shared: Site) -> None:
    session = {"session-id": "the same"}
    first = await shared.create(*spoken("secret"), headers={**A, **session})
    second = await shared.create(*spoken("hi"), headers={**B, **session})
    assert first.headers[THREAD] != second.headers[THREAD]
    assert len(shared.stage.backend.calls[1].turn.items) == 1
    third = await shared.create(*spoken("hi"), headers={**A, **session})
    assert third.headers[THREAD] == first.headers[THREAD]
    assert len(shared.stage.backend.calls[2].turn.items) == 3


# What PostgreSQL cannot take.


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items")])
async def test_an_id_that_cannot_be_one_is_not_found_on_any_database(
    postgres_database: str, method: str, path: str
) -> None:
    async with opened_site(postgres_database) as site:
        answer = await site.visit(method, f"/v1/responses/resp\0{path}").answer()
        assert answer.status == 404


async def test_a_type_that_cannot_be_a_column_is_refused(site: Site) -> None:
    answer = await site.create(*spoken("hi"), input=[{"type": "x\0y", "id": "a"}])
    assert (answer.status, answer.error["param"]) == (400, "input[0].type")
