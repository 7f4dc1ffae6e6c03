from hashlib import sha256

import pytest
from starlette.types import Message

from responses_ingress.testing import spoken
from responses_ingress.web.callers import Keyring
from tests.web.asgi import Site, opened_site

KEYS = Keyring((("a", sha256(b"key-a").digest()),))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1"),
        ("POST", "/v1/responses/"),
        ("POST", "/responses"),
        ("GET", "/v1/responses/resp_x/"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/responses/resp_x/input_items/more"),
    ],
)
async def test_what_is_not_there_is_404_in_our_words(site: Site, method: str, path: str) -> None:
    answer = await site.visit(method, path).answer()
    assert answer.status == 404
    assert answer.error == {
        "message": f"There is nothing at {path}.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/responses", {"POST"}),
        ("DELETE", "/v1/responses", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("PUT", "/v1/responses/resp_x", {"GET", "HEAD", "DELETE"}),
        ("POST", "/v1/responses/resp_x/input_items", {"GET", "HEAD"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ],
)
async def test_a_method_that_is_not_allowed_is_405_and_told_which_are(
    site: Site, method: str, path: str, allowed: set[str]
) -> None:
    answer = await site.visit(method, path).answer()
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert method in answer.error["message"]
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(("method", "path"), [("GET", "/none"), ("GET", "/v1/responses")])
async def test_also_what_leads_nowhere_is_answered_with_a_request_id(site: Site, method: str, path: str) -> None:
    answer = await site.visit(method, path).answer()
    assert answer.headers.get("x-request-id", "").startswith("req_")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime", "/"])
async def test_a_websocket_upgrade_is_426_wherever_it_goes(site: Site, path: str) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await site.app({"type": "websocket", "path": path, "headers": [], "state": site.state.copy()}, receive, send)
    start, body = sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 426)
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"].startswith(b"req_")
    assert body["type"] == "websocket.http.response.body"
    assert b'"code":"upgrade_required"' in body["body"]


async def test_a_path_as_long_as_a_book_is_not_repeated(site: Site) -> None:
    answer = await site.get("/" + "x" * 10_000)
    assert answer.status == 404
    assert len(answer.error["message"]) < 250


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_and_scrapers_need_no_key(migrated_database: str, path: str) -> None:
    async with opened_site(migrated_database, keys=KEYS) as site:
        assert (await site.get(path)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/responses"),
        ("GET", "/v1/responses/resp_x"),
        ("DELETE", "/v1/responses/resp_x"),
        ("GET", "/v1/responses/resp_x/input_items"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
    ],
)
async def test_all_else_needs_one(migrated_database: str, method: str, path: str) -> None:
    async with opened_site(migrated_database, keys=KEYS) as site:
        answer = await site.visit(method, path).answer()
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


async def test_it_says_that_it_is_alive_and_ready(site: Site) -> None:
    assert (await site.get("/healthz")).json == {"status": "ok"}
    assert (await site.get("/readyz")).json == {"status": "ready"}


async def test_metrics_are_prometheus_text_of_what_has_ended(site: Site) -> None:
    assert (await site.create(*spoken("hi"))).status == 200
    answer = await site.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b'responses_ingress_responses_total{backend="scripted",status="completed"} 1.0\n' in answer.body
