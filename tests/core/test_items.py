"""Items: which are the same, which a client is sure to send back, and how they read."""

import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.items import (
    all_text,
    digest,
    is_anchor,
    is_model_made,
    last_user_text,
    listed,
    packed,
    seal,
    text_of,
    unseal,
    user_message,
)

Json = dict[str, Any]


def user(content: Any) -> Json:
    return {"type": "message", "role": "user", "content": content}


def assistant(content: Any) -> Json:
    return {"type": "message", "role": "assistant", "content": content}


def output_text(text: str, **more: Any) -> Json:
    return {"type": "output_text", "text": text, **more}


def input_text(text: str, **more: Any) -> Json:
    return {"type": "input_text", "text": text, **more}


CALL: Json = {"type": "function_call", "call_id": "call_1", "name": "ls", "arguments": '{"a":1}'}
CUSTOM: Json = {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "***"}
ANSWER: Json = {"type": "function_call_output", "call_id": "call_1", "output": "ok"}
CUSTOM_ANSWER: Json = {"type": "custom_tool_call_output", "call_id": "call_2", "output": [input_text("ok")]}
THOUGHT: Json = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"}
SEARCH: Json = {"type": "web_search_call", "action": {"type": "search", "query": "q"}}
STORED: Json = {
    **assistant([output_text("hi", annotations=[{"type": "url_citation", "url": "u"}], logprobs=[])]),
    "id": "msg_1",
    "status": "completed",
    "phase": "final_answer",
}


@pytest.mark.parametrize(
    "sent",
    [
        assistant("hi"),
        assistant([output_text("hi")]),
        assistant([output_text("hi", annotations=None, logprobs=None)]),
        {**STORED, "id": "another"},
        {**STORED, "id": None, "status": None, "phase": None},
        {**STORED, "some_new_field": {"a": [1]}},
        dict(reversed(STORED.items())),
    ],
)
def test_a_message_is_the_same_however_a_client_rewrites_what_does_not_count(sent: Json) -> None:
    assert digest(sent) == digest(STORED)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user("hi"), user([input_text("hi")])),
        (user([input_text("hi")]), user([input_text("hi", prompt_cache_breakpoint={"mode": "explicit"})])),
        (
            user([{"type": "input_image", "image_url": "data:x", "detail": "auto"}]),
            user([{"type": "input_image", "image_url": "data:x"}]),
        ),
        (
            {"type": "message", "role": "developer", "content": "be nice"},
            {"type": "message", "role": "developer", "content": [input_text("be nice")]},
        ),
        (CALL, {**CALL, "id": "fc_1", "status": "completed", "namespace": None}),
        (ANSWER, {**ANSWER, "id": "fco_1", "name": "ls"}),
        (CUSTOM, {**CUSTOM, "id": "ctc_1", "status": "completed"}),
        (CUSTOM_ANSWER, {**CUSTOM_ANSWER, "id": "ctco_1"}),
        (THOUGHT, {**THOUGHT, "id": "rs_1", "encrypted_content": "encrypted anew"}),
        (THOUGHT, {**THOUGHT, "content": [{"type": "reasoning_text", "text": "raw"}], "encrypted_content": None}),
        (SEARCH, {**SEARCH, "id": "ws_1", "status": "completed", "results": None}),
    ],
)
def test_what_clients_rewrite_leaves_an_item_the_same(one: Json, other: Json) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user("hi"), user("Hi")),
        (user("hi"), assistant("hi")),
        (user("hi"), {**user("hi"), "role": "developer"}),
        (user([input_text("a"), input_text("b")]), user([input_text("b"), input_text("a")])),
        (user([input_text("ab")]), user([input_text("a"), input_text("b")])),
        (assistant([output_text("no")]), assistant([{"type": "refusal", "refusal": "no"}])),
        (
            user([{"type": "input_image", "image_url": "data:x"}]),
            user([{"type": "input_image", "image_url": "data:y"}]),
        ),
        (CALL, {**CALL, "call_id": "call_2"}),
        (CALL, {**CALL, "name": "rm"}),
        (CALL, {**CALL, "arguments": "{}"}),
        (CALL, {**CALL, "namespace": "shell"}),
        (ANSWER, {**ANSWER, "output": "failed"}),
        (ANSWER, {**ANSWER, "call_id": "call_2"}),
        (ANSWER, {**ANSWER, "type": "custom_tool_call_output"}),
        (CUSTOM, {**CUSTOM, "input": ""}),
        (THOUGHT, {**THOUGHT, "summary": []}),
        (SEARCH, {**SEARCH, "action": {"type": "search", "query": "another"}}),
        ({"type": "of_tomorrow", "x": 1}, {"type": "of_tomorrow", "x": 2}),
        ({"type": "of_tomorrow"}, {"type": "of_the_day_after"}),
    ],
)
def test_what_decides_makes_items_different(one: Json, other: Json) -> None:
    assert digest(one) != digest(other)


texts = st.text(max_size=5)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
types = st.sampled_from(
    ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "mcp_call", "new"]
)
field_names = st.sampled_from(["role", "content", "summary", "call_id", "name", "arguments", "output", "input", "x"])
any_item = st.builds(lambda type, fields: {**fields, "type": type}, types, st.dictionaries(field_names, values))
beside_the_point = st.dictionaries(st.sampled_from(["id", "status", "phase", "encrypted_content"]), texts | st.none())


@given(any_item, beside_the_point)
def test_any_item_is_the_same_with_and_without_what_does_not_count(item: Json, more: Json) -> None:
    assert digest({**more, **item}) == digest(item)
    assert digest({**item, "absent": None}) == digest(item)
    assert len(digest(item)) == 16


@given(any_item)
def test_an_item_is_the_same_after_a_way_over_the_wire(item: Json) -> None:
    assert digest(orjson.loads(orjson.dumps(item))) == digest(item)


@given(any_item)
def test_a_digest_leaves_its_item_as_it_was(item: Json) -> None:
    before = orjson.dumps(item)
    digest(item)
    listed(item)
    assert orjson.dumps(item) == before


@pytest.mark.parametrize(
    "type", ["message", "compaction", "additional_tools", *(item["type"] for item in (CALL, ANSWER, CUSTOM))]
)
def test_what_history_cannot_do_without_is_an_anchor(type: str) -> None:
    assert is_anchor(type)


@pytest.mark.parametrize("type", ["reasoning", "web_search_call", "mcp_list_tools", "image_generation_call", "new"])
def test_what_clients_may_drop_is_no_anchor(type: str) -> None:
    assert not is_anchor(type)


@pytest.mark.parametrize("item", [assistant("a"), THOUGHT, CALL, CUSTOM, SEARCH, {"type": "local_shell_call"}])
def test_what_only_a_model_can_have_made_tells_that_a_client_carries_its_history(item: Json) -> None:
    assert is_model_made(item)


@pytest.mark.parametrize(
    "item",
    [user("a"), {**user("a"), "role": "developer"}, {"type": "message"}, ANSWER, CUSTOM_ANSWER, {"type": "new"}],
)
def test_what_a_client_makes_itself_tells_nothing_of_its_history(item: Json) -> None:
    assert not is_model_made(item)


def test_a_listed_message_has_parts_and_a_status() -> None:
    assert listed(user("hi")) == {**user([input_text("hi")]), "status": "completed"}
    assert listed(assistant("hi")) == {
        **assistant([output_text("hi", annotations=[], logprobs=[])]),
        "status": "completed",
    }
    assert listed({**user("hi"), "status": "incomplete"})["status"] == "incomplete"


@pytest.mark.parametrize("item", [STORED, CALL, THOUGHT, CUSTOM_ANSWER])
def test_anything_else_is_listed_as_it_is(item: Json) -> None:
    assert listed(item) == item


def test_a_string_stands_for_a_user_message() -> None:
    assert user_message("hi") == user([input_text("hi")])
    assert digest(user_message("hi")) == digest(user("hi"))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (user("hi"), "hi"),
        (user([input_text("a"), {"type": "input_image", "image_url": "u"}, input_text("b")]), "ab"),
        (ANSWER, "ok"),
        (CUSTOM_ANSWER, "ok"),
        ({"type": "message", "content": None}, ""),
        ({"type": "message", "content": ["a string", {"text": 5}]}, ""),
        (CALL, ""),
    ],
)
def test_the_text_of_an_item_is_all_the_text_in_it(item: Json, text: str) -> None:
    assert text_of(item) == text


def test_the_last_user_text_is_the_last_user_messages() -> None:
    assert last_user_text([user("first"), user([input_text("last")]), assistant("answer"), CALL]) == "last"
    assert last_user_text([assistant("answer"), {"type": "message", "role": "developer", "content": "x"}]) == ""
    assert last_user_text([]) == ""


def test_all_text() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image"}, {"type": "refusal", "refusal": "b"}, "c"]
    assert all_text(parts) == "a\nb"
    assert all_text("a") == "a"
    assert all_text(None) == all_text(7) == ""


@pytest.mark.parametrize("content", ["E", "", "claude:E", '{"a":1}'])
def test_a_backend_gets_back_what_it_sealed(content: str) -> None:
    sealed = seal("claude", content)
    assert sealed == f"claude:{content}"
    assert unseal("claude", sealed) == content


@pytest.mark.parametrize("content", [None, "", "E", "claude", "claude2:E", "openai:claude:E", "Claude:E"])
def test_what_another_made_is_not_unsealed(content: str | None) -> None:
    assert unseal("claude", content) is None


def test_packed_json_takes_little_more_memory_than_its_bytes() -> None:
    value = [{"text": "x" * 100}] * 10
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = [packed(value) for _ in range(100)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept[0] == orjson.dumps(value)
    assert after - before < 100 * (len(kept[0]) + 100)
