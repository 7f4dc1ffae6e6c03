from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import orjson
import pytest

from responses_ingress.core.request import Caller
from responses_ingress.errors import InvalidValue, Unauthorized
from responses_ingress.testing import spoken
from responses_ingress.web.callers import Keyring, is_codex, read_caller
from tests.web.asgi import opened_site

METADATA = "x-codex-turn-metadata"


def hashed(key: str) -> bytes:
    return sha256(key.encode()).digest()


RING = Keyring((("a", hashed("key-a")), ("a", hashed("key-a2")), ("b", hashed("key-b")), ("c", hashed("schlüssel"))))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def caller(**headers: str) -> Caller:
    return read_caller({name.replace("_", "-"): value for name, value in headers.items()}, "t", None)


def with_metadata(metadata: Any, headers: Mapping[str, str] | None = None) -> Caller:
    raw = metadata if isinstance(metadata, str) else orjson.dumps(metadata).decode()
    return read_caller({"thread-id": "th", METADATA: raw, **(headers or {})}, "t", None)


# Keys.


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        (bearer("key-a"), "a"),
        (bearer("key-a2"), "a"),
        (bearer("key-b"), "b"),
        ({"authorization": "bearer   key-b "}, "b"),
        ({"x-api-key": "key-b"}, "b"),
        ({"x-api-key": "key-a", **bearer("their own")}, "a"),
        ({"x-api-key": "their own", **bearer("key-b")}, "b"),
        ({"x-api-key": "key-a", **bearer("key-b")}, "a"),
        ({"x-api-key": "schlüssel"}, "c"),
    ],
    ids=str,
)
def test_a_key_names_its_tenant(headers: Mapping[str, str], tenant: str) -> None:
    assert RING.tenant(headers)[0] == tenant


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("key-c"),
        bearer(""),
        bearer("KEY-A"),
        {"authorization": "key-a"},
        {"authorization": "Basic key-a"},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        {"x-api-key": "key-c", **bearer("key-d")},
        {"x-api-key": hashed("key-a").hex()},
        {"x-api-key": "schlussel"},
        {"x-api-key": "schl?ssel"},
    ],
    ids=str,
)
def test_a_wrong_key_and_none_are_refused_alike(headers: Mapping[str, str]) -> None:
    with pytest.raises(Unauthorized, match="Incorrect API key provided") as refused:
        RING.tenant(headers)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_without_keys_everybody_is_one_tenant_and_every_bearer_their_own() -> None:
    assert Keyring().tenant({}) == ("", None)
    assert Keyring().tenant(bearer("anything")) == ("", "anything")
    assert Keyring().tenant({"x-api-key": "anything"}) == ("", None)


def test_a_bearer_beside_our_key_is_the_callers_own() -> None:
    assert RING.tenant({"x-api-key": "key-a", **bearer("their own")}) == ("a", "their own")


def test_our_key_is_never_taken_for_the_callers_own() -> None:
    assert RING.tenant(bearer("key-a")) == ("a", None)
    assert RING.tenant({"x-api-key": "wrong", **bearer("key-a")}) == ("a", None)


@pytest.mark.parametrize("key", ["key-a", "key-a2", "key-b"])
def test_our_key_is_never_taken_for_the_callers_own_when_it_comes_twice(key: str) -> None:
    assert RING.tenant({"x-api-key": "key-a", **bearer(key)}) == ("a", None)


async def test_the_backend_gets_the_callers_own_bearer_and_never_our_key(migrated_database: str) -> None:
    async with opened_site(migrated_database, keys=RING) as site:
        assert (await site.create(*spoken("hi"), headers=bearer("key-a"))).status == 200
        given = {"x-api-key": "key-a", **bearer("their own"), "session-id": "s"}
        assert (await site.create(*spoken("hi"), headers=given)).status == 200
        assert [call.turn.bearer for call in site.stage.backend.calls] == [None, "their own"]


async def test_the_key_is_asked_for_before_the_body_is_read(migrated_database: str) -> None:
    async with opened_site(migrated_database, keys=RING) as site:
        visit = site.visit("POST", "/v1/responses", b"{")
        answer = await visit.answer()
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert visit.unread == 1


# The thread.


def test_the_first_thread_header_counts_in_the_order_of_their_worth() -> None:
    headers = {"thread-id": "1", "session-id": "2", "session_id": "3", "conversation_id": "4"}
    for name in list(headers):
        assert read_caller(headers, "t", None).thread_key == headers[name]
        del headers[name]
    assert read_caller(headers, "t", None).thread_key is None


def test_an_empty_thread_header_names_nothing() -> None:
    assert caller(thread_id="", session_id="s").thread_key == "s"
    assert caller(thread_id="").thread_key is None


@pytest.mark.parametrize("name", ["x-client-request-id", "x-request-id", "prompt-cache-key"])
def test_other_headers_name_no_thread(name: str) -> None:
    assert read_caller({name: "x"}, "t", None) == Caller(tenant="t")


@pytest.mark.parametrize("key", ["x" * 513, "a\tb", "a\x00b", "a\x7fb", "a\x85b"], ids=repr)
def test_a_thread_name_that_cannot_be_one_is_refused(key: str) -> None:
    with pytest.raises(InvalidValue, match="thread-id"):
        caller(thread_id=key)


@pytest.mark.parametrize("key", ["x" * 512, "a b", "über", "日本", "0199-0c5d", "../../etc"], ids=repr)
def test_any_printable_thread_name_is_good(key: str) -> None:
    assert caller(thread_id=key).thread_key == key


def test_the_tenant_and_the_bearer_come_from_the_key_and_from_nowhere_else() -> None:
    found = read_caller({"thread-id": "th", "x-tenant": "other", **bearer("x")}, "t", "their own")
    assert (found.tenant, found.bearer) == ("t", "their own")


# What codex tells.


@pytest.mark.parametrize("kind", ["turn", "prewarm", "memory", "compaction"])
def test_codex_names_the_kind_of_its_request(kind: str) -> None:
    assert with_metadata({"request_kind": kind}).kind == kind


@pytest.mark.parametrize(
    ("subagent", "kind"),
    [("compact", "compaction"), ("memory_consolidation", "memory"), ("review", "turn"), ("collab_spawn", "turn")],
)
def test_older_codex_names_the_kind_by_its_sub_agent(subagent: str, kind: str) -> None:
    assert caller(session_id="s", x_openai_subagent=subagent).kind == kind


def test_the_newer_name_of_a_kind_wins_and_an_unknown_one_is_no_name() -> None:
    older = {"x-openai-subagent": "compact"}
    assert with_metadata({"request_kind": "turn"}, older).kind == "turn"
    assert with_metadata({"request_kind": "something new"}, older).kind == "compaction"


@pytest.mark.parametrize("kind", [["turn"], {"turn": 1}], ids=str)
def test_a_kind_that_is_no_text_is_no_kind(kind: object) -> None:
    assert with_metadata({"request_kind": kind}).kind == "turn"


@pytest.mark.parametrize("kind", [None, 7, True, ""], ids=str)
def test_a_kind_that_is_none_is_no_kind(kind: object) -> None:
    assert with_metadata({"request_kind": kind}).kind == "turn"


def test_lineage_is_kept_where_it_is_plain_and_known() -> None:
    lineage = {
        "forked_from_thread_id": "f",
        "parent_thread_id": "p",
        "session_id": "s",
        "root_turn_id": "r",
        "window_id": "w",
        "window_number": 3,
        "history_initialization": "fork",
        "subagent_kind": "review",
        "agent_name": "anna",
    }
    found = with_metadata({**lineage, "workspaces": {"/home/anna": {}}, "sandbox": "none"})
    assert found.lineage == lineage
    assert found.forked_from == "f"
    assert with_metadata({"parent_thread_id": ["p"], "forked_from_thread_id": {"id": "f"}}).lineage == {}


def test_lineage_comes_from_older_headers_too_and_the_newer_place_wins() -> None:
    older = {"x-codex-parent-thread-id": "p1", "x-codex-window-id": "w1"}
    assert with_metadata("", older).lineage == {"parent_thread_id": "p1", "window_id": "w1"}
    newer = with_metadata({"parent_thread_id": "p2", "window_id": "w2"}, older)
    assert newer.lineage == {"parent_thread_id": "p2", "window_id": "w2"}


@pytest.mark.parametrize("parent", [7, "a\0b", "x" * 513], ids=lambda parent: repr(parent)[:10])
def test_what_cannot_name_a_thread_is_none_to_fork_from(parent: object) -> None:
    found = with_metadata({"forked_from_thread_id": parent})
    assert (found.forked_from, found.lineage) == (None, {"forked_from_thread_id": parent})


@pytest.mark.parametrize(
    "raw",
    ["", "{", "nonsense", "[]", "null", '"turn"', "7", '{"request_kind": "memory"' + " " * 16_384 + "}"],
    ids=lambda raw: raw[:25],
)
def test_metadata_that_is_no_metadata_is_ignored(raw: str) -> None:
    found = with_metadata(raw)
    assert (found.thread_key, found.kind, found.lineage) == ("th", "turn", {})


def test_without_a_thread_there_is_no_lineage() -> None:
    found = caller(x_codex_turn_metadata='{"request_kind": "memory", "parent_thread_id": "p"}', x_codex_window_id="w")
    assert found == Caller(tenant="t")


@pytest.mark.parametrize(
    ("headers", "codex"),
    [
        ({"originator": "codex_cli_rs"}, True),
        ({"originator": "codex_exec"}, True),
        ({"user-agent": "codex_vscode/1.0"}, True),
        ({"originator": "my_editor", "x-codex-turn-metadata": "{}"}, True),
        ({"originator": "my_editor", "x-codex-window-id": "w:0"}, True),
        ({"originator": "my_editor", "x-other": "x-codex-"}, False),
        ({"user-agent": "OpenAI/Python 2.54 (codex)"}, False),
        ({}, False),
    ],
)
def test_codex_is_known_by_its_originator_or_agent(headers: Mapping[str, str], codex: bool) -> None:
    assert is_codex(headers) is codex
