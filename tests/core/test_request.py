"""Requests: what a wrong one is answered, and that a right one is left as the client sent it."""

from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from responses_ingress.core.request import KNOWN_FIELDS, Caller, parse_request
from responses_ingress.errors import IngressError, InvalidRequest, InvalidValue, NotFound

Json = dict[str, Any]

OBJECT: Json = {"type": "function", "name": "f"}
USER: Json = {"role": "user", "content": "hi"}
CALL: Json = {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}


def refusal(body: object, **limits: Any) -> tuple[int, str | None, str | None]:
    """Status, code and param of the error that `body` is answered with."""
    with pytest.raises(IngressError) as caught:
        parse_request(body, **limits)
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    return caught.value.status, error["code"], error["param"]


def asked(**body: Any) -> Json:
    return {"model": "m", "input": "hi", **body}


def said(*items: Any) -> Json:
    return {"model": "m", "input": list(items)}


MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"

WRONG: list[tuple[object, str | None, str | None]] = [
    # the body itself
    ([], TYPE, None),
    ("hi", TYPE, None),
    (None, TYPE, None),
    ({}, MISSING, "model"),
    ({"model": "m", "messages": [USER]}, "unsupported_parameter", None),
    # required fields
    ({"input": "hi"}, MISSING, "model"),
    ({"model": None, "input": "hi"}, TYPE, "model"),
    ({"model": 7, "input": "hi"}, TYPE, "model"),
    ({"model": "", "input": "hi"}, VALUE, "model"),
    ({"model": "m"}, MISSING, "input"),
    ({"model": "m", "input": None}, MISSING, "input"),
    ({"model": "m", "previous_response_id": "resp_1"}, MISSING, "input"),
    ({"model": "m", "input": ""}, MISSING, None),
    ({"model": "m", "input": []}, MISSING, None),
    ({"model": "m", "input": 7}, TYPE, "input"),
    ({"model": "m", "input": {"role": "user"}}, TYPE, "input"),
    # types of the top level
    (asked(instructions=["a"]), TYPE, "instructions"),
    (asked(previous_response_id=5), TYPE, "previous_response_id"),
    (asked(conversation=5), TYPE, "conversation"),
    (asked(store="yes"), TYPE, "store"),
    (asked(store=1), TYPE, "store"),
    (asked(background="no"), TYPE, "background"),
    (asked(stream="true"), TYPE, "stream"),
    (asked(stream_options=True), TYPE, "stream_options"),
    (asked(include="all"), TYPE, "include"),
    (asked(include=[1]), TYPE, "include.0"),
    (asked(metadata=[]), TYPE, "metadata"),
    (asked(metadata={"a": 1}), TYPE, "metadata.a"),
    (asked(tools={}), TYPE, "tools"),
    (asked(tool_choice=5), TYPE, "tool_choice"),
    (asked(parallel_tool_calls="no"), TYPE, "parallel_tool_calls"),
    (asked(max_output_tokens="16"), TYPE, "max_output_tokens"),
    (asked(max_output_tokens=16.5), TYPE, "max_output_tokens"),
    (asked(max_output_tokens=True), TYPE, "max_output_tokens"),
    (asked(temperature="hot"), TYPE, "temperature"),
    (asked(temperature=True), TYPE, "temperature"),
    (asked(text="json"), TYPE, "text"),
    (asked(reasoning="high"), TYPE, "reasoning"),
    (asked(context_management={}), TYPE, "context_management"),
    (asked(prompt_cache_key=1), TYPE, "prompt_cache_key"),
    (asked(client_metadata=[]), TYPE, "client_metadata"),
    # bounds
    (asked(max_output_tokens=15), "integer_below_min_value", "max_output_tokens"),
    (asked(max_tool_calls=0), "integer_below_min_value", "max_tool_calls"),
    (asked(top_logprobs=-1), "integer_below_min_value", "top_logprobs"),
    (asked(top_logprobs=21), "integer_above_max_value", "top_logprobs"),
    (asked(temperature=-0.1), "decimal_below_min_value", "temperature"),
    (asked(temperature=2.1), "decimal_above_max_value", "temperature"),
    (asked(top_p=-0.5), "decimal_below_min_value", "top_p"),
    (asked(top_p=1.5), "decimal_above_max_value", "top_p"),
    (asked(presence_penalty=-2.5), "decimal_below_min_value", "presence_penalty"),
    (asked(frequency_penalty=2.5), "decimal_above_max_value", "frequency_penalty"),
    (asked(metadata={str(n): "" for n in range(17)}), "object_above_max_properties", "metadata"),
    (asked(metadata={"a": "x" * 513}), "string_above_max_length", "metadata.a"),
    (asked(metadata={"k" * 65: ""}), "string_above_max_length", f"metadata.{'k' * 65}"),
    (asked(safety_identifier="x" * 129), "string_above_max_length", "safety_identifier"),
    (asked(metadata={"k" * 9000: ""}), "string_above_max_length", f"metadata.{'k' * 100}"),
    # names
    (asked(model="x" * 513), "string_above_max_length", "model"),
    (asked(previous_response_id="x" * 513), "string_above_max_length", "previous_response_id"),
    (asked(conversation="x" * 513), "string_above_max_length", "conversation"),
    (asked(conversation={"id": "x" * 513}), TYPE, "conversation"),
    (asked(model="a\0b"), VALUE, "model"),
    (asked(previous_response_id="a\0"), VALUE, "previous_response_id"),
    (asked(conversation="\0"), VALUE, "conversation"),
    (said(USER, {**USER, "id": ""}), VALUE, "input[1].id"),
    (said({**USER, "id": "x" * 513}), VALUE, "input[0].id"),
    (said({**CALL, "id": "a\0b"}), VALUE, "input[0].id"),
    (said({"id": "a\0b"}), VALUE, "input[0].id"),
    # values
    (asked(truncation="always"), VALUE, "truncation"),
    (asked(tool_choice="always"), VALUE, "tool_choice"),
    (asked(tool_choice={"name": "f"}), MISSING, "tool_choice.type"),
    (asked(reasoning={"effort": "extreme"}), VALUE, "reasoning.effort"),
    (asked(reasoning={"effort": ["low"]}), VALUE, "reasoning.effort"),
    (asked(text={"format": "json"}), TYPE, "text.format"),
    (asked(text={"format": {}}), MISSING, "text.format.type"),
    (asked(text={"format": {"type": "yaml"}}), VALUE, "text.format.type"),
    (asked(text={"format": {"type": "json_schema", "schema": {}}}), MISSING, "text.format.name"),
    (asked(text={"format": {"type": "json_schema", "name": "n"}}), MISSING, "text.format.schema"),
    (asked(text={"format": {"type": "json_schema", "name": "n", "schema": "x"}}), TYPE, "text.format.schema"),
    # tools
    (asked(tools=["web_search"]), TYPE, "tools[0]"),
    (asked(tools=[OBJECT, {"name": "f"}]), MISSING, "tools[1].type"),
    (asked(tools=[{"type": "function"}]), MISSING, "tools[0].name"),
    (asked(tools=[{"type": "function", "name": 5}]), TYPE, "tools[0].name"),
    (asked(tools=[{"type": "custom"}]), MISSING, "tools[0].name"),
    (asked(tools=[{"type": "namespace", "name": "n"}]), MISSING, "tools[0].tools"),
    (asked(tools=[{"type": "namespace", "name": "n", "tools": [OBJECT, 5]}]), TYPE, "tools[0].tools[1]"),
    # state
    (asked(previous_response_id="resp_1", conversation="conv_1"), "mutually_exclusive_parameters", None),
    (asked(previous_response_id="resp_1", conversation={"id": "conv_1"}), "mutually_exclusive_parameters", None),
    # items
    (said("hi"), TYPE, "input[0]"),
    (said(USER, 5), TYPE, "input[1]"),
    (said({}), MISSING, "input[0].type"),
    (said({"content": "hi"}), MISSING, "input[0].type"),
    (said({"type": 5}), TYPE, "input[0].type"),
    (said({"type": "message"}), MISSING, "input[0].role"),
    (said({"type": "message", "role": "tool"}), VALUE, "input[0].role"),
    (said({"role": ["user"]}), VALUE, "input[0].role"),
    (said({"role": "user", "content": 5}), TYPE, "input[0].content"),
    (said({"role": "user", "content": ["hi"]}), TYPE, "input[0].content[0]"),
    (said({"role": "user", "content": [{"text": "hi"}]}), MISSING, "input[0].content[0].type"),
    (said({"role": "user", "content": [{"type": "input_text", "text": 5}]}), TYPE, "input[0].content[0].text"),
    (said({**CALL, "call_id": None}), MISSING, "input[0].call_id"),
    (said({**CALL, "call_id": 5}), TYPE, "input[0].call_id"),
    (said({"type": "function_call", "call_id": "c", "name": "f"}), MISSING, "input[0].arguments"),
    (said({**CALL, "arguments": {}}), TYPE, "input[0].arguments"),
    (said({"type": "function_call_output", "call_id": "c"}), MISSING, "input[0].output"),
    (said({"type": "function_call_output", "output": "x"}), MISSING, "input[0].call_id"),
    (said({"type": "function_call_output", "call_id": "c", "output": 5}), TYPE, "input[0].output"),
    (said({"type": "function_call_output", "call_id": "c", "output": ["x"]}), TYPE, "input[0].output[0]"),
    (said({"type": "custom_tool_call", "call_id": "c", "name": "f"}), MISSING, "input[0].input"),
    (said({"type": "custom_tool_call_output", "call_id": "c"}), MISSING, "input[0].output"),
    (said({"type": "item_reference"}), MISSING, "input[0].id"),
    (said({"type": "item_reference", "id": 5}), TYPE, "input[0].id"),
    (said({"type": "additional_tools"}), MISSING, "input[0].tools"),
    (said({"type": "additional_tools", "tools": [{"type": "function"}]}), MISSING, "input[0].tools[0].name"),
    (said({"type": "reasoning", "summary": ["x"]}), TYPE, "input[0].summary[0]"),
]


@pytest.mark.parametrize(
    ("body", "code", "param"), WRONG, ids=[f"{at}-{code}-{param}"[:60] for at, (_, code, param) in enumerate(WRONG)]
)
def test_a_wrong_request_is_a_400_that_names_what_is_wrong(body: object, code: str | None, param: str | None) -> None:
    assert refusal(body) == (400, code, param)


@pytest.mark.parametrize("name", ["x" * 512, "日本" * 256, "a\nb"], ids=["long", "wide", "lines"])
def test_a_model_may_have_any_name_of_some_length(name: str) -> None:
    assert parse_request(asked(model=name)).model == name


def test_a_prompt_is_not_found() -> None:
    assert refusal(asked(prompt={"id": "pmpt_1"})) == (404, None, None)


def test_the_first_wrong_field_is_named_model_before_input_before_the_rest() -> None:
    assert refusal({"temperature": 9}) == (400, MISSING, "model")
    assert refusal({"model": "m", "temperature": "x"})[2] == "temperature"
    assert refusal({"model": "m", "input": [], "conversation": None, "temperature": 9.5})[2] == "temperature"


def test_more_items_than_the_limit_are_refused() -> None:
    assert len(parse_request(said(USER, USER), max_items=2).input) == 2
    assert refusal(said(USER, USER, USER), max_items=2) == (400, "array_above_max_length", "input")


def test_unknown_fields_are_named_and_refused_only_where_that_is_asked() -> None:
    body = asked(top_k=5, seed=1)
    assert parse_request(body).unknown == ["top_k", "seed"]
    assert refusal(body, strict=True) == (400, "unknown_parameter", "top_k")
    assert refusal(asked(**{"x" * 9000: 1}), strict=True) == (400, "unknown_parameter", "x" * 100)
    assert parse_request(asked(), strict=True).unknown == []


# Every field of the reference, each with a value a client may send.
RIGHT: Json = {
    "model": "m",
    "input": "hi",
    "instructions": "be nice",
    "previous_response_id": "resp_1",
    "store": False,
    "background": False,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "include": ["reasoning.encrypted_content"],
    "metadata": {"k" * 64: "v" * 512},
    "tools": [OBJECT, {"type": "web_search"}, {"type": "custom", "name": "c"}, {"type": "of_tomorrow"}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []},
    "parallel_tool_calls": False,
    "max_output_tokens": 16,
    "max_tool_calls": 1,
    "temperature": 2,
    "top_p": 0,
    "presence_penalty": -2.0,
    "frequency_penalty": 2,
    "top_logprobs": 20,
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}, "verbosity": "low"},
    "reasoning": {"effort": "high", "summary": "auto"},
    "truncation": "auto",
    "context_management": [{"type": "compaction", "compact_threshold": 1000}],
    "service_tier": "flex",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "user": "u",
    "moderation": {"model": "omni"},
    "access_programs": {},
    "image": {},
    "client_metadata": {"session_id": "s"},
}


def test_every_field_of_the_reference_is_accepted_and_known() -> None:
    assert parse_request(RIGHT, strict=True).unknown == []
    assert set(RIGHT) | {"conversation", "prompt"} == KNOWN_FIELDS


@pytest.mark.parametrize("field", sorted(KNOWN_FIELDS - {"model", "input"}))
def test_any_field_but_model_and_input_may_be_null(field: str) -> None:
    assert parse_request(asked(**{field: None})).body[field] is None


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max", None])
def test_every_effort_of_the_reference_is_accepted(effort: str | None) -> None:
    assert parse_request(asked(reasoning={"effort": effort})).body["reasoning"] == {"effort": effort}


def test_the_body_stays_as_it_was_sent() -> None:
    before = orjson.dumps(RIGHT)
    request = parse_request(RIGHT)
    assert request.body is RIGHT
    assert orjson.dumps(RIGHT) == before


def test_a_request_is_what_its_body_says() -> None:
    request = parse_request({**RIGHT, "background": True})
    assert (request.model, request.instructions, request.previous_response_id) == ("m", "be nice", "resp_1")
    assert (request.store, request.stream, request.background) == (False, True, True)
    assert request.tools == RIGHT["tools"]


def test_a_request_that_says_little_is_stored_and_answered_at_once() -> None:
    request = parse_request(asked())
    assert (request.store, request.stream, request.background) == (True, False, False)
    assert (request.instructions, request.previous_response_id, request.conversation) == (None, None, None)
    assert list(request.tools) == []


@pytest.mark.parametrize("given", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_is_named_by_a_string_or_an_object(given: object) -> None:
    assert parse_request(asked(conversation=given)).conversation == "conv_1"


def test_no_input_is_enough_where_there_is_history() -> None:
    assert parse_request({"model": "m", "input": [], "previous_response_id": "resp_1"}).input == []
    assert parse_request({"model": "m", "input": "", "conversation": "conv_1"}).input == []


def test_a_string_is_a_user_message() -> None:
    text = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    assert parse_request(asked()).input == [text]


def test_an_item_without_a_type_is_a_message_or_a_reference() -> None:
    request = parse_request(said(USER, {"role": "assistant", "content": None, "type": None}, {"id": "msg_1"}))
    assert [item["type"] for item in request.input] == ["message", "message", "item_reference"]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "message", "role": "user", "content": [], "x": {"y": [None]}},
        {"type": "message", "role": "developer", "content": [{"type": "of_tomorrow", "z": 1}]},
        {**CALL, "id": None, "status": None, "namespace": "n"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "u"}]},
        {"type": "custom_tool_call_output", "call_id": "c", "output": ""},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "e"},
        {"type": "web_search_call", "action": {"type": "search"}},
        {"type": "compaction", "encrypted_content": "e"},
        {"type": "compaction_trigger"},
        {"type": "additional_tools", "role": "developer", "tools": [OBJECT]},
        {"type": "local_shell_call", "action": {"command": ["ls"]}, "call_id": "c"},
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
        {"type": "acme:telemetry", "data": 1, "content": ["x"], "summary": [1], "output": [None]},
        {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "stderr": "", "outcome": {}}]},
        {**USER, "type": "message", "id": "x" * 512},
        {**USER, "type": "message", "id": "日本\n"},
    ],
)
def test_an_item_of_any_type_is_kept_as_it_is(item: Json) -> None:
    assert parse_request(said(item)).input == [item]


def test_a_caller_who_says_nothing_is_nobody_with_a_turn() -> None:
    assert (Caller().tenant, Caller().thread_key, Caller().kind, Caller().forked_from) == ("", None, "turn", None)


texts = st.text(max_size=6) | st.sampled_from(["message", "function", "user", "type", "id", "namespace", "json_schema"])
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
keys = (
    st.sampled_from(["type", "role", "content", "id", "name", "tools", "format", "schema", "output", "effort"]) | texts
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
known = st.sampled_from(sorted(KNOWN_FIELDS))
ITEM_TYPES = ["message", "function_call", "function_call_output", "custom_tool_call", "additional_tools", "reasoning"]
item_fields = st.dictionaries(
    st.sampled_from(["role", "content", "call_id", "name", "arguments", "output", "tools", "summary", "id", "input"]),
    anything,
)
some_item = st.builds(lambda type, fields: {**fields, "type": type}, st.sampled_from(ITEM_TYPES), item_fields)
some_body = st.builds(
    lambda fields, items: {"model": "m", "input": items, **fields},
    st.dictionaries(known, anything, max_size=4),
    st.lists(some_item | anything, max_size=3) | anything,
)


@given(anything | some_body, st.booleans())
@example(asked(metadata={"str": 5, "_Conversation": None}), False)
@example(asked(conversation={"id": {}}), True)
@example(asked(tool_choice={"type": []}), False)
def test_any_json_is_a_request_or_refused_in_plain_words(body: object, strict: bool) -> None:
    before = orjson.dumps(body)
    try:
        request = parse_request(body, strict=strict)
    except (InvalidRequest, NotFound) as error:
        found = error.body()["error"]
        assert error.status == (404 if isinstance(error, NotFound) else 400)
        assert found["message"]
        assert isinstance(found["param"], str | None)
    else:
        assert all(isinstance(item["type"], str) for item in request.input)
        assert isinstance(request.model, str)
    assert orjson.dumps(body) == before


def test_tools_nested_as_deep_as_a_body_may_be_are_no_trouble() -> None:
    tool: Json = OBJECT
    for _ in range(300):
        tool = {"type": "namespace", "name": "n", "tools": [tool]}
    assert len(parse_request(asked(tools=[tool])).tools) == 1


def test_an_error_names_a_field_and_never_what_was_in_it() -> None:
    with pytest.raises(InvalidValue) as caught:
        parse_request(asked(truncation="a secret"))
    assert "secret" not in caught.value.message
