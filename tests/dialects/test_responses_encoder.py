"""The Responses encoder: what an upstream gets of a turn, and when a turn continues a response of the upstream's."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.items import seal, unseal, user_message
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.responses_encoder import (
    ResponsesOptions,
    complaint,
    continued,
    encode,
    memory_of,
)
from tests.core.shapes import Json, call, reasoning, text_item

NAMED = "thread_0123456789abcdef01" + 32 * "0"
FRESH = "thread_0123456789abcdef00" + 32 * "0"
PLAIN = ResponsesOptions(encrypted_reasoning=False)
CHAIN = ResponsesOptions(chain=True)
HI = user_message("hi")
CALLED: Json = {**call(), "arguments": "{}", "status": "completed"}
ANSWERED: Json = {"type": "function_call_output", "call_id": "call_1", "output": "fine"}
THOUGHT: Json = {**reasoning(), "encrypted_content": seal("mine", "gAAA=")}


def turn(*items: Json, **fields: Any) -> Turn:
    return Turn(**{"response_id": "resp_1", "thread_id": NAMED, "model": "m", "new": items or (HI,), **fields})


def body_of(given: Turn, options: ResponsesOptions = PLAIN) -> Json:
    return encode(given, options, "mine").body


def sent(*items: Json, options: ResponsesOptions = PLAIN) -> list[Json]:
    found: list[Json] = body_of(turn(*items), options)["input"]
    return found


# Sealing.


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_only_who_sealed_a_content_gets_it_back(backend: str, other: str, content: str) -> None:
    sealed = seal(backend, content)
    assert unseal(backend, sealed) == content
    if not sealed.startswith(f"{other}:"):
        assert unseal(other, sealed) is None
    assert unseal(backend, None) is None


# Fields.


def test_the_smallest_request() -> None:
    assert body_of(turn()) == {"model": "m", "input": [HI], "stream": True, "store": False}


def test_what_the_client_asked_for_passes_also_what_nobody_knows() -> None:
    asked = {
        "temperature": 0.5,
        "reasoning": {"effort": "high", "summary": None},
        "odd": [1],
        "tool_choice": "required",
    }
    given = turn(parameters=asked, tool_choice="required", tools=[{"type": "odd", "x": None}], instructions="Be brief.")
    assert body_of(given) == {
        **body_of(turn()),
        **asked,
        "tools": [{"type": "odd", "x": None}],
        "instructions": "Be brief.",
    }


def test_what_is_ours_to_answer_does_not_pass() -> None:
    ours = {
        "model": "theirs",
        "input": "other",
        "previous_response_id": "resp_0",
        "conversation": "conv_1",
        "background": True,
        "metadata": {"a": "b"},
        "prompt": None,
        "store": True,
        "stream": False,
        "tools": [],
        "instructions": "other",
        "temperature": None,
    }
    assert body_of(turn(parameters=ours)) == body_of(turn())


def test_encrypted_reasoning_is_asked_for_once() -> None:
    wanted = ["reasoning.encrypted_content"]
    assert body_of(turn(), ResponsesOptions())["include"] == wanted
    for include in ([], wanted, ["x", *wanted], ["x"]):
        told = body_of(turn(parameters={"include": include}), ResponsesOptions())["include"]
        assert sorted(told) == sorted({*include, *wanted})
    assert body_of(turn(parameters={"include": ["x"]}))["include"] == ["x"]


def test_options_of_a_stream_go_with_a_stream_only() -> None:
    given = turn(parameters={"stream_options": {"include_obfuscation": False}})
    assert body_of(given)["stream_options"] == {"include_obfuscation": False}
    assert "stream_options" not in body_of(replace(given, stream=False))
    assert body_of(replace(given, stream=False))["stream"] is False


# Items.


def test_items_go_in_order_and_whole_but_for_their_ids() -> None:
    odd = {"type": "odd_call", "id": "x", "status": "completed", "z": {"deep": None}}
    message = {**text_item("hm"), "phase": "commentary"}
    items = [HI, THOUGHT, message, CALLED, ANSWERED, odd]
    context, new = items[:3], items[3:]
    body = body_of(turn(*new, context=context), ResponsesOptions(open_reasoning=False))
    assert body["input"] == [
        {key: value for key, value in item.items() if key not in ("id", "encrypted_content")}
        | ({"encrypted_content": "gAAA="} if item is THOUGHT else {})
        for item in items
    ]
    assert sent(CALLED, options=ResponsesOptions(item_ids=True))[0]["id"] == "fc_1"


def test_an_item_that_another_refers_to_keeps_its_id() -> None:
    request = {"type": "mcp_approval_request", "id": "mcpr_1", "name": "n", "arguments": "{}", "server_label": "s"}
    response = {"type": "mcp_approval_response", "id": "x", "approval_request_id": "mcpr_1", "approve": True}
    assert [item.get("id") for item in sent(request, response)] == ["mcpr_1", None]


def test_nulls_are_left_out_where_they_mean_nothing() -> None:
    part: Json = {"type": "output_text", "text": "hm", "annotations": [], "logprobs": None}
    tool = {"type": "function", "name": "f", "parameters": {"default": None}, "strict": None}
    tools = {"type": "additional_tools", "role": "developer", "tools": [tool]}
    assert sent({"type": "message", "role": "assistant", "content": [part, "odd"], "phase": None}, tools) == [
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "hm", "annotations": []}, "odd"],
        },
        tools,
    ]


def test_what_openai_tells_but_does_not_take_is_left_out() -> None:
    action = {"type": "search", "query": None, "queries": ["x"], "sources": [{"type": "url", "url": "u"}]}
    search = {"type": "web_search_call", "status": "completed", "action": action}
    shell = {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "sources": [], "user": None}}
    assert sent(search, shell, {**THOUGHT, "status": "completed"}, text_item("hm")) == [
        {**search, "action": {"type": "search", "queries": ["x"]}},
        {**shell, "action": {"type": "exec", "sources": []}},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA="},
        {key: value for key, value in text_item("hm").items() if key != "id"},
    ]


@pytest.mark.parametrize("open_reasoning", [True, False])
def test_what_another_backend_encrypted_is_left_out_and_counted(open_reasoning: bool) -> None:
    options = ResponsesOptions(open_reasoning=open_reasoning)
    foreign = {**reasoning(), "encrypted_content": seal("yours", "x")}
    told = {**foreign, "summary": [{"type": "summary_text", "text": "so"}]}
    compaction = {"type": "compaction", "id": "cmp_1", "encrypted_content": "never sealed"}
    odd = {"type": "odd", "encrypted_content": "x", "more": 1}
    call = encode(turn(HI, foreign, told, compaction, odd), options, "mine")
    kept = {key: told[key] for key in ("type", "summary")}
    assert call.body["input"] == [HI, *([kept] if open_reasoning else []), {"type": "odd", "more": 1}]
    assert call.foreign == 4


def encrypted(content: str) -> Json:
    return {"type": "encrypted_content", "encrypted_content": content}


def test_encrypted_parts_go_to_who_made_them_only() -> None:
    text = {"type": "input_text", "text": "so"}
    own, foreign = encrypted(seal("mine", "x")), encrypted(seal("yours", "y"))
    agent = {"type": "agent_message", "author": "/root", "content": [text, own, foreign, encrypted("never sealed")]}
    locked = {"type": "agent_message", "author": "/root", "content": [foreign]}
    output = {"type": "function_call_output", "call_id": "call_1", "output": [foreign, own, text]}
    empty = {**output, "output": [foreign]}
    call = encode(turn(HI, agent, locked, output, empty), ResponsesOptions(), "mine")
    assert call.body["input"] == [
        HI,
        {**agent, "content": [text, encrypted("x")]},
        {**output, "output": [encrypted("x"), text]},
        {**output, "output": ""},
    ]
    assert call.foreign == 4
    assert agent["content"][1] == own


def test_an_own_compaction_is_given_back() -> None:
    own = {"type": "compaction", "id": "cmp_1", "encrypted_content": seal("mine", "x")}
    assert sent(own) == [{"type": "compaction", "encrypted_content": "x"}]


@pytest.mark.parametrize(
    ("item", "kept"),
    [
        ({"content": [{"type": "reasoning_text", "text": "hm"}]}, True),
        ({"summary": [{"type": "summary_text", "text": "hm"}]}, True),
        ({"summary": [], "content": []}, False),
        ({"content": None, "encrypted_content": None}, False),
    ],
)
def test_open_reasoning_goes_to_those_who_want_it(item: Json, kept: bool) -> None:
    given = {"type": "reasoning", "id": "rs_1", **item}
    without_nulls = {key: value for key, value in item.items() if value is not None}
    assert sent(given) == ([{"summary": [], **without_nulls, "type": "reasoning"}] if kept else [])
    assert sent(given, options=ResponsesOptions(open_reasoning=False)) == []


def test_openai_gets_no_open_text_beside_its_own() -> None:
    given = {**THOUGHT, "content": [{"type": "reasoning_text", "text": "hm"}]}
    assert sent(given, options=ResponsesOptions(open_reasoning=False)) == [
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA="}
    ]


def test_half_a_call_is_left_out_unless_it_was_answered() -> None:
    half = {**CALLED, "arguments": '{"a', "status": "incomplete"}
    assert [item["type"] for item in sent(HI, half)] == ["message"]
    assert [item["type"] for item in sent(half, ANSWERED)] == ["function_call", "function_call_output"]


# Chains.

OUTPUT: list[Json] = [reasoning(), text_item("hello")]
AGAIN = user_message("again")


def remembered(options: ResponsesOptions = CHAIN, output: list[Json] | None = None, **fields: Any) -> Json | None:
    return memory_of(turn(**fields), options, "mine", "resp_theirs", OUTPUT if output is None else output)


def following(**fields: Any) -> Turn:
    return turn(AGAIN, **{"context": [HI, *OUTPUT], "memory": remembered(), **fields})


def test_the_next_turn_continues_the_upstreams_response() -> None:
    given = following()
    assert continued(given, CHAIN, "mine") == "resp_theirs"
    body = encode(given, CHAIN, "mine", "resp_theirs").body
    assert (body["previous_response_id"], body["store"], body["input"]) == ("resp_theirs", True, [AGAIN])


def test_a_client_that_carries_its_history_continues_too() -> None:
    """It sends no reasoning, other ids and no annotations."""
    carried = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]}
    assert continued(following(context=[HI, carried]), CHAIN, "mine") == "resp_theirs"


@pytest.mark.parametrize(
    "fields",
    [
        {"context": [HI]},
        {"context": [*OUTPUT]},
        {"context": [user_message("ho"), *OUTPUT]},
        {"context": [HI, text_item("other")]},
        {"context": [HI, *OUTPUT, AGAIN]},
        {"model": "other"},
        {"memory": None},
        {"memory": {"response_id": "resp_theirs"}},
        {"memory": {**(remembered() or {}), "response_id": 7}},
        {"new": []},
        {"new": [{"type": "mcp_approval_response", "approval_request_id": "mcpr_1", "approve": True}]},
        {"thread_id": FRESH, "parameters": {"store": False}},
    ],
    ids=str,
)
def test_anything_else_goes_whole(fields: Json) -> None:
    assert continued(following(**fields), CHAIN, "mine") is None


def test_only_who_chains_continues_and_only_what_is_its_own() -> None:
    assert continued(following(), ResponsesOptions(), "mine") is None
    assert continued(following(), CHAIN, "yours") is None


@pytest.mark.parametrize("asked", [{"store": True}, {"store": None}, {}, {"store": False}], ids=str)
@pytest.mark.parametrize("thread", [NAMED, FRESH])
def test_only_what_can_be_found_again_is_stored_there(thread: str, asked: Json) -> None:
    expected = thread == NAMED or asked.get("store") is not False
    given = turn(thread_id=thread, parameters=asked)
    assert body_of(given, CHAIN)["store"] is expected
    assert body_of(given)["store"] is False
    assert bool(remembered(thread_id=thread, parameters=asked)) is expected


def test_what_cannot_be_continued_is_not_remembered() -> None:
    assert remembered(ResponsesOptions()) is None
    assert remembered(output=[{**CALLED, "status": "incomplete"}]) is None
    assert memory_of(turn(), CHAIN, "mine", None, OUTPUT) is None


# Refusals.


@pytest.mark.parametrize(
    ("status", "body", "field"),
    [
        (400, b'{"error":{"code":"previous_response_not_found"}}', "previous_response_id"),
        (400, b'{"error":{"code":"unsupported_parameter","param":"previous_response_id"}}', "previous_response_id"),
        (404, b"", "previous_response_id"),
        (400, b'{"error":{"message":"Encrypted content is not supported","param":"include"}}', "include"),
        (400, b'{"error":{"param":"include[0]"}}', "include"),
        (500, b'{"error":{"param":"include"}}', None),
        (400, b'{"error":{"param":"input"}}', None),
        (400, b'{"error":"no"}', None),
        (400, b"[1]", None),
        (400, b"<html>", None),
    ],
)
def test_what_a_refusal_is_about(status: int, body: bytes, field: str | None) -> None:
    assert complaint(status, body) == field
