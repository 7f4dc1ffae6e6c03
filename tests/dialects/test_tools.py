"""Flat names and back, tool choice, and the unwrapping of freeform input."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.dialects.tools import (
    Choice,
    Function,
    Tool,
    Toolbox,
    ToolMap,
    Unwrapper,
    call_skeleton,
    toolbox,
    wrapped,
)
from responses_ingress.errors import InvalidRequest

Json = dict[str, Any]

GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": GRAMMAR}


def function(name: str, **fields: Any) -> Json:
    return {"type": "function", "name": name, "parameters": {"type": "object"}, **fields}


def namespace(name: str, *tools: Json, description: str = "") -> Json:
    return {"type": "namespace", "name": name, "description": description, "tools": list(tools)}


def box(*tools: Json, items: list[Json] | None = None, choice: object = "auto") -> Toolbox:
    return toolbox(tools, items or [], choice)


def names(made: Toolbox) -> list[str]:
    return [function.name for function in made.functions]


# Functions


def test_a_function_stays_as_it_is() -> None:
    made = box(function("f", description="d", strict=True, parameters={"type": "object", "properties": {"a": {}}}))
    assert made.functions == [Function("f", "d", {"type": "object", "properties": {"a": {}}}, strict=True)]
    assert made.names.tool("f") == Tool("function", "f")
    assert (made.choice, made.dropped) == (Choice("auto"), ())


@pytest.mark.parametrize(
    "tool",
    [
        {**PATCH, "format": "zz"},
        {**PATCH, "format": [1]},
        {**PATCH, "description": ["a"]},
        function("f", description=7),
        function("f", description={"a": 1}),
        {**function("f"), "parameters": "zz"},
        namespace("n", function("f")) | {"description": ["a"]},
        namespace("n", function("f", description=["a"]), description="About."),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(tool: Json) -> None:
    with pytest.raises(InvalidRequest) as refused:
        box(tool)
    assert (refused.value.status, refused.value.param) == (400, "tools")


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_function_without_parameters_gets_an_empty_object(parameters: object) -> None:
    [made] = box(function("f", parameters=parameters, description=None, strict=None)).functions
    assert made == Function("f", "", {"type": "object", "properties": {}}, strict=False)


def test_a_custom_tool_becomes_a_function_of_one_string() -> None:
    made = box(PATCH)
    [offered] = made.functions
    assert offered.name == "apply_patch"
    assert offered.parameters["required"] == ["input"]
    assert offered.parameters["properties"]["input"]["type"] == "string"
    assert offered.description.startswith("Edits files.\n\n")
    assert offered.description.endswith("lark grammar:\nstart: /.+/")
    assert made.names.tool("apply_patch") == Tool("custom", "apply_patch")


@pytest.mark.parametrize("format", [None, {"type": "text"}])
def test_a_custom_tool_without_a_grammar(format: object) -> None:
    [offered] = box({"type": "custom", "name": "c", "format": format}).functions
    assert offered.description == (
        "Call this tool with one argument, `input`: a string that is the whole freeform input."
    )


def test_namespaces_are_flattened_and_their_description_is_said_once() -> None:
    made = box(namespace("agents", function("spawn", description="Starts one."), PATCH, description="Sub-agents."))
    assert names(made) == ["agents__spawn", "agents__apply_patch"]
    assert made.functions[0].description == "Starts one.\n\nAbout all tools of agents: Sub-agents."
    assert "Sub-agents." not in made.functions[1].description
    assert made.names.tool("agents__spawn") == Tool("function", "spawn", "agents")
    assert made.names.tool("agents__apply_patch") == Tool("custom", "apply_patch", "agents")


def test_tools_come_from_input_items_too() -> None:
    items: list[Json] = [
        {"type": "additional_tools", "role": "developer", "tools": [namespace("functions", PATCH, function("wait"))]},
        {"type": "message", "role": "user", "content": "x", "tools": [function("no")]},
        {"type": "tool_search_output", "tools": [function("found")]},
        {"type": "additional_tools", "tools": None},
    ]
    made = box(function("f"), items=items)
    assert names(made) == ["f", "functions__apply_patch", "functions__wait", "found"]


def test_the_later_declaration_of_a_tool_wins_in_the_place_of_the_first() -> None:
    items = [{"type": "additional_tools", "tools": [function("a", description="new")]}]
    made = box(function("a", description="old"), function("b"), items=items)
    assert [(made.name, made.description) for made in made.functions] == [("a", "new"), ("b", "")]


def test_hosted_tools_are_dropped_and_told_once() -> None:
    made = box(
        {"type": "web_search", "external_web_access": True},
        function("f"),
        {"type": "tool_search", "execution": "client"},
        {"type": "web_search"},
        namespace("n", {"type": "mcp"}),
        namespace("empty"),
    )
    assert names(made) == ["f"]
    assert made.dropped == ("web_search", "tool_search", "mcp")


@pytest.mark.parametrize("tool", [{"type": "function"}, {"type": "custom", "name": 3}, namespace("n", function(""))])
def test_a_tool_without_a_name_is_refused(tool: Json) -> None:
    with pytest.raises(InvalidRequest) as caught:
        box(tool)
    assert caught.value.param == "tools"


# Names

LEGAL = re.compile(r"[A-Za-z0-9_-]{1,64}")


def test_names_that_are_not_legal_get_a_digest() -> None:
    made = box(function("ask.user"), function("ask user"), function("x" * 65), namespace("n" * 40, function("f" * 40)))
    assert names(made) == [
        "ask_user_af6d49c5",
        "ask_user_27965b45",
        "x" * 55 + "_6efbc671",
        "n" * 40 + "__" + "f" * 13 + "_bc283f9d",
    ]
    assert all(LEGAL.fullmatch(name) for name in names(made))
    assert made.names.tool(names(made)[1]) == Tool("function", "ask user")


def test_of_two_tools_with_one_flat_name_the_one_outside_of_namespaces_keeps_it() -> None:
    made = box(namespace("a", function("b")), function("a__b"), {"type": "custom", "name": "a__b"})
    nested, plain, custom = names(made)
    assert plain == "a__b"
    assert len({nested, plain, custom}) == 3
    assert [made.names.tool(name) for name in (nested, plain, custom)] == [
        Tool("function", "b", "a"),
        Tool("function", "a__b"),
        Tool("custom", "a__b"),
    ]


def test_even_a_digest_that_is_taken_is_no_collision() -> None:
    map = ToolMap()
    second = map.flat(Tool("function", "a b"))
    other = ToolMap()
    other.flat(Tool("function", second))
    third = other.flat(Tool("function", "a b"))
    assert third != second
    assert third.startswith(second.removesuffix("_")[:12])


def test_calls_in_the_history_are_named_like_their_tools() -> None:
    made = box(namespace("functions", PATCH, function("wait")), function("f"))
    calls: list[tuple[Json, str]] = [
        ({"type": "custom_tool_call", "name": "apply_patch", "namespace": "functions"}, "functions__apply_patch"),
        ({"type": "function_call", "name": "wait", "namespace": "functions"}, "functions__wait"),
        ({"type": "function_call", "name": "f", "namespace": None}, "f"),
        ({"type": "function_call", "name": "gone", "namespace": "old"}, "old__gone"),
        ({"type": "custom_tool_call", "name": "gone"}, "gone"),
    ]
    for call, flat in calls:
        assert made.names.of_call(call) == flat
    assert made.names.tool("old__gone") == Tool("function", "gone", "old")
    assert names(made) == ["functions__apply_patch", "functions__wait", "f"]


def test_a_name_never_given_out_is_a_plain_function() -> None:
    assert box(function("f")).names.tool("made_up") == Tool("function", "made_up")


@given(
    st.lists(
        st.builds(
            Tool,
            st.sampled_from(["function", "custom"]),
            st.text(min_size=1, max_size=70) | st.sampled_from(["a", "b", "a__b", "a b", "a.b"]),
            st.none() | st.sampled_from(["a", "a__b", "n" * 63]),
        ),
        max_size=12,
    )
)
def test_names_are_legal_unique_and_lead_back(tools: list[Tool]) -> None:
    map, again = ToolMap(), ToolMap()
    flat = [map.flat(tool) for tool in tools]
    assert flat == [map.flat(tool) for tool in tools] == [again.flat(tool) for tool in tools]
    assert len(set(flat)) == len(set(tools))
    assert all(LEGAL.fullmatch(name) for name in flat)
    assert [map.tool(name) for name in flat] == tools


@pytest.mark.parametrize(
    ("tool", "skeleton"),
    [
        (
            Tool("function", "f"),
            {"type": "function_call", "status": "in_progress", "call_id": "c", "name": "f", "arguments": ""},
        ),
        (
            Tool("custom", "e", "functions"),
            {
                "type": "custom_tool_call",
                "status": "in_progress",
                "call_id": "c",
                "name": "e",
                "namespace": "functions",
                "input": "",
            },
        ),
    ],
)
def test_call_skeletons(tool: Tool, skeleton: Json) -> None:
    assert call_skeleton(tool, "c") == skeleton


# Tool choice

TOOLS = (function("f"), PATCH, namespace("n", function("g"), function("h")), {"type": "web_search"})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", Choice("auto")),
        (None, Choice("auto")),
        ("none", Choice("none")),
        ("required", Choice("required")),
        ({"type": "function", "name": "f"}, Choice("required", "f")),
        ({"type": "custom", "name": "apply_patch"}, Choice("required", "apply_patch")),
        ({"type": "function", "name": "g", "namespace": "n"}, Choice("required", "n__g")),
    ],
)
def test_choices(choice: object, expected: Choice) -> None:
    made = box(*TOOLS, choice=choice)
    assert made.choice == expected
    assert len(made.functions) == 4


@pytest.mark.parametrize(
    ("mode", "entries", "offered"),
    [
        ("auto", [{"type": "function", "name": "f"}], ["f"]),
        ("required", [{"type": "custom", "name": "apply_patch"}, {"type": "web_search"}], ["apply_patch"]),
        ("auto", [{"type": "namespace", "name": "n"}], ["n__g", "n__h"]),
        ("auto", [{"type": "function", "name": "h", "namespace": "n"}], ["n__h"]),
        ("auto", [{"type": "web_search"}], []),
        (None, [{"type": "function", "name": "f"}], ["f"]),
    ],
)
def test_allowed_tools_are_a_hard_limit(mode: str | None, entries: list[Json], offered: list[str]) -> None:
    made = box(*TOOLS, choice={"type": "allowed_tools", "mode": mode, "tools": entries})
    assert made.choice == Choice("required" if mode == "required" else "auto")
    assert names(made) == offered
    assert made.names.of_call({"type": "function_call", "name": "g", "namespace": "n"}) == "n__g"


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "web_search"},
        {"type": "mcp", "server_label": "x"},
        {"type": "function", "name": "absent"},
        {"type": "function"},
        {"type": "custom", "name": "f"},
        {"type": "function", "name": "g"},
        {"type": "function", "name": ["f"]},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "absent"}]},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]},
        {"type": "allowed_tools", "mode": "sometimes", "tools": []},
        {},
        "any",
        7,
    ],
)
def test_choices_that_cannot_be_kept_are_refused(choice: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        box(*TOOLS, choice=choice)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, None, "tool_choice")


def test_a_required_call_without_tools_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        box({"type": "web_search"}, choice="required")


# Unwrapping


def unwrap(*pieces: str) -> tuple[str, str]:
    """What came while the arguments streamed, and what only came at the end."""
    unwrapper = Unwrapper()
    early = "".join(unwrapper.feed(piece) for piece in pieces)
    return early, unwrapper.end()


@pytest.mark.parametrize(
    ("arguments", "early", "late"),
    [
        ('{"input":"abc"}', "abc", ""),
        (' {\n "input" :\t"abc"\n} ', "abc", ""),
        ('{"input":""}', "", ""),
        (r'{"input":"a\n\t\r\b\f\"\\\/é"}', 'a\n\t\r\b\f"\\/é', ""),
        (r'{"input":"\ud83d\ude00!"}', "😀!", ""),
        (r'{"input":"\\ud83d"}', r"\ud83d", ""),
        # Halves of a pair cannot be sent on.
        (r'{"input":"\ud83d"}', "\ufffd", ""),
        (r'{"input":"\ud83dx"}', "\ufffdx", ""),
        (r'{"input":"\ud83d\n"}', "\ufffd\n", ""),
        (r'{"input":"\ud83d\u0041"}', "\ufffdA", ""),
        (r'{"input":"\ud83d\ud83d\ude00"}', "\ufffd😀", ""),
        (r'{"input":"\ude00"}', "\ufffd", ""),
        # No JSON, but models write it.
        ('{"input":"two\nlines"}', "two\nlines", ""),
        (r'{"input":"\d+ \u12x \uzz"}', r"\d+ \u12x \uzz", ""),
        # Cut off.
        ('{"input":"abc', "abc", ""),
        ('{"input":"abc\\', "abc", ""),
        (r'{"input":"abc\u00e', "abc", ""),
        (r'{"input":"abc\ud83d\u', "abc", ""),
        # More keys.
        ('{"input":"abc","why":"x"}', "abc", ""),
        ('{"why":"x","input":"abc"}', "", "abc"),
        (r'{"\u0069nput":"abc"}', "", "abc"),
        ('{"in put":"abc","input":"d"}', "", "d"),
        # Not the wrapper.
        ('{"patch":"abc"}', "", "abc"),
        ('{"patch":"abc","n":3}', "", "abc"),
        ('{"patch":"abc","path":"d"}', "", '{"patch":"abc","path":"d"}'),
        ('{"input":{"a":1}}', "", '{"input":{"a":1}}'),
        ('{"input":null}', "", '{"input":null}'),
        ("{}", "", "{}"),
        ('["abc"]', "", '["abc"]'),
        ('"abc"', "", '"abc"'),
        ("*** Begin Patch\n", "", "*** Begin Patch\n"),
        ('{"input', "", '{"input'),
        ("", "", ""),
    ],
)
def test_unwrapping(arguments: str, early: str, late: str) -> None:
    assert unwrap(arguments) == (early, late)
    assert unwrap(*arguments) == (early, late)


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


CUTS = st.lists(st.integers(0, 60), max_size=10)


@given(text=st.text(), ascii=st.booleans(), cuts=CUTS)
def test_any_input_comes_back_from_its_wrapper(text: str, ascii: bool, cuts: list[int]) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii)
    assert unwrap(*cut(arguments, cuts)) == (text, "")
    assert unwrap(*cut(wrapped(text), cuts)) == (text, "")


@given(
    before=st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=2),
    text=st.text(max_size=9),
    after=st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2),
    cuts=CUTS,
)
def test_any_input_comes_back_from_among_other_keys(
    before: Mapping[str, Any], text: str, after: Mapping[str, Any], cuts: list[int]
) -> None:
    arguments = json.dumps({**before, "input": text, **after})
    assert "".join(unwrap(*cut(arguments, cuts))) == text


FRAGMENTS = st.sampled_from(
    ["{", '"input"', ":", '"', "\\", "u", "d83d", "\\ude00", "x", " ", "}", ",", "\n", "\\n", '{"input":"', "é"]
)


@given(fragments=st.lists(FRAGMENTS, max_size=14), cuts=CUTS)
def test_cuts_do_not_matter(fragments: list[str], cuts: list[int]) -> None:
    arguments = "".join(fragments)
    early, late = unwrap(arguments)
    assert unwrap(*cut(arguments, cuts)) == (early, late)
    assert not (early and late)
