"""The response object apart from its output: complete whatever was asked, and small where it is stored."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.envelope import DEFAULTS, open_envelope, reduce, restore, split_repeated
from responses_ingress.core.request import parse_request

Json = dict[str, Any]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What Open Responses requires of a ResponseResource, and which of these may be null.
REQUIRED = words(
    "id object created_at completed_at status incomplete_details model previous_response_id instructions output "
    "error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty "
    "top_logprobs temperature reasoning usage max_output_tokens max_tool_calls store background service_tier "
    "metadata safety_identifier prompt_cache_key"
)
NULLABLE = words(
    "completed_at incomplete_details previous_response_id instructions error reasoning usage max_output_tokens "
    "max_tool_calls safety_identifier prompt_cache_key"
)
# Those that have a column of their own, or are stored as items.
ELSEWHERE = words(
    "id created_at status model background store previous_response_id output usage error completed_at "
    "incomplete_details"
)
FUNCTION: Json = {"type": "function", "name": "ls"}


def opened(**body: Any) -> Json:
    """The envelope for a request with these fields, as JSON makes it."""
    request = parse_request({"model": "m", "input": "hi", **body})
    return dict(orjson.loads(orjson.dumps(open_envelope(request, "resp_1", 1_760_000_000))))


names = st.text(max_size=8)
metadata = st.dictionaries(names, names, max_size=4)
parameters: st.SearchStrategy[Json] = st.just({"type": "object", "properties": {}})
tools = st.one_of(
    st.just(FUNCTION),
    st.builds(lambda p, s: {**FUNCTION, "parameters": p, "strict": s}, parameters, st.none() | st.booleans()),
    st.just({"type": "web_search", "filters": None}),
    st.just({"type": "custom", "name": "patch"}),
)
formats = st.sampled_from(
    [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "name": "n", "schema": {}, "strict": True}]
)
FIELDS: Mapping[str, st.SearchStrategy[Any]] = {
    "instructions": names,
    "metadata": metadata,
    "temperature": st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.floats(0, 1) | st.integers(0, 1),
    "presence_penalty": st.floats(-2, 2) | st.integers(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "top_logprobs": st.integers(0, 20),
    "max_output_tokens": st.integers(16, 10_000),
    "max_tool_calls": st.integers(1, 10),
    "parallel_tool_calls": st.booleans(),
    "store": st.booleans(),
    "background": st.booleans(),
    "truncation": st.sampled_from(["auto", "disabled"]),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "name": "ls"}]),
    "tools": st.lists(tools, max_size=3),
    "text": st.fixed_dictionaries({}, optional={"format": formats, "verbosity": st.sampled_from(["low", "high"])}),
    "reasoning": st.fixed_dictionaries(
        {}, optional={"effort": st.none() | st.just("low"), "summary": st.none() | st.just("auto")}
    ),
    "safety_identifier": names,
    "prompt_cache_key": names,
    "prompt_cache_retention": names,
    "service_tier": st.sampled_from(["auto", "flex"]),
    "user": names,
    "a_field_of_tomorrow": names,
}
# A field may be there, be null, or be missing.
bodies = st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in FIELDS.items()})
places: st.SearchStrategy[Json] = st.sampled_from(
    [{}, {"previous_response_id": "resp_0"}, {"conversation": "conv_1"}, {"conversation": {"id": "conv_1"}}]
)


@given(bodies, places)
def test_every_response_has_the_31_fields_and_null_only_where_it_may_be(body: Json, place: Json) -> None:
    envelope = opened(**body, **place)
    assert len(REQUIRED) == 31
    assert envelope.keys() >= REQUIRED
    assert {field for field in REQUIRED if envelope[field] is None} <= NULLABLE
    assert envelope["text"].keys() >= {"format"}
    assert envelope["reasoning"].keys() >= {"effort", "summary"}


@given(bodies, places)
def test_what_was_reduced_is_restored(body: Json, place: Json) -> None:
    envelope = opened(**body, **place)
    stored = orjson.loads(orjson.dumps(reduce(envelope)))
    columns = {field: envelope[field] for field in ELSEWHERE}
    assert restore(stored) | columns == envelope


@given(bodies)
def test_what_repeats_from_turn_to_turn_can_be_stored_apart(body: Json) -> None:
    reduced = reduce(opened(**body))
    rest, repeated = split_repeated(reduced)
    assert repeated.keys() <= {"instructions", "tools"}
    assert not rest.keys() & repeated.keys()
    assert rest | repeated == reduced


def test_the_defaults_of_a_response_are_not_stored() -> None:
    assert reduce(opened()) == {}
    assert reduce(opened(temperature=1, top_p=1.0, tools=[], metadata={}, text={"format": {"type": "text"}})) == {}


def test_what_has_a_column_is_not_stored_again() -> None:
    ended = opened() | {
        "status": "incomplete",
        "output": [{"type": "message"}],
        "usage": {"total_tokens": 1},
        "error": {"code": "x"},
        "incomplete_details": {"reason": "max_output_tokens"},
        "completed_at": 5,
    }
    assert not reduce(ended).keys() & ELSEWHERE


@pytest.mark.parametrize("value", [False, 0, 0.0, "", [], None])
def test_a_value_that_is_false_is_stored_where_the_default_is_another(value: Any) -> None:
    fields = {field: value for field in DEFAULTS if field not in ELSEWHERE and DEFAULTS[field] != value}
    assert reduce(opened() | fields) == fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instructions", "be nice"),
        ("metadata", {"a": "b"}),
        ("temperature", 0),
        ("top_p", 0.5),
        ("top_logprobs", 5),
        ("presence_penalty", -1.5),
        ("frequency_penalty", 1.5),
        ("max_output_tokens", 16),
        ("max_tool_calls", 3),
        ("parallel_tool_calls", False),
        ("store", False),
        ("background", True),
        ("truncation", "auto"),
        ("tool_choice", {"type": "function", "name": "ls"}),
        ("previous_response_id", "resp_0"),
        ("prompt_cache_key", "k"),
        ("safety_identifier", "s"),
        ("user", "u"),
    ],
)
def test_a_response_echoes_what_was_asked(field: str, value: Any) -> None:
    assert opened(**{field: value})[field] == value


@pytest.mark.parametrize("field", ["include", "stream", "input", "client_metadata", "context_management", "unheard_of"])
def test_a_response_does_not_echo_what_openai_does_not(field: str) -> None:
    given = {"include": [], "stream": True, "input": "hi", "context_management": []}
    assert field not in opened(**{field: given.get(field, {"a": 1})})


def test_a_response_says_who_and_when_it_is() -> None:
    envelope = opened()
    assert (envelope["id"], envelope["created_at"], envelope["object"], envelope["model"], envelope["status"]) == (
        "resp_1",
        1_760_000_000,
        "response",
        "m",
        "in_progress",
    )
    assert (envelope["output"], envelope["usage"], envelope["error"]) == ([], None, None)


def test_a_background_response_begins_queued() -> None:
    assert opened(background=True)["status"] == "queued"


def test_part_of_a_nested_object_is_filled_with_defaults() -> None:
    assert opened(text={"format": None})["text"] == {"format": {"type": "text"}}
    assert opened(text={"verbosity": "low"})["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert opened(reasoning={"effort": "low"})["reasoning"] == {"effort": "low", "summary": None}


def test_a_function_tool_is_echoed_with_all_its_fields_and_another_as_it_came() -> None:
    other = {"type": "web_search", "filters": None}
    assert opened(tools=[FUNCTION, {**FUNCTION, "strict": False}, other])["tools"] == [
        {**FUNCTION, "description": None, "parameters": None, "strict": None},
        {**FUNCTION, "description": None, "parameters": None, "strict": False},
        other,
    ]


def test_a_conversation_is_echoed_as_an_object_and_only_where_one_was_named() -> None:
    assert opened(conversation="conv_1")["conversation"] == {"id": "conv_1"}
    assert opened(conversation={"id": "conv_1"})["conversation"] == {"id": "conv_1"}
    assert "conversation" not in opened()


def test_an_envelope_leaves_its_request_as_it_was() -> None:
    body = {"model": "m", "input": "hi", "tools": [FUNCTION], "text": {}, "reasoning": {"effort": "low"}}
    before = orjson.dumps(body)
    open_envelope(parse_request(body), "resp_1", 1)
    assert orjson.dumps(body) == before
