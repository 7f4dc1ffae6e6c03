"""A turn as a messages request: what each item and parameter becomes."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.items import seal
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.messages import MessagesCall, MessagesOptions, encode, refuses_thinking
from responses_ingress.dialects.tools import Tool
from responses_ingress.errors import InvalidRequest

Json = dict[str, Any]

PLAIN = MessagesOptions(cache=False)


def turn(*items: Json, **fields: Any) -> Turn:
    return Turn("resp_1", "thread_1", "m", context=items[:-1], new=items[-1:], **fields)


def encoded(*items: Json, options: MessagesOptions = PLAIN, recall: bool = True, **fields: Any) -> MessagesCall:
    call = encode(turn(*items, **fields), options, "claude", recall=recall)
    orjson.dumps(call.body)
    return call


def messages(*items: Json, options: MessagesOptions = PLAIN, recall: bool = True, **fields: Any) -> list[Json]:
    made: list[Json] = encoded(*items, options=options, recall=recall, **fields).body["messages"]
    return made


def body(options: MessagesOptions = PLAIN, **fields: Any) -> Json:
    return encoded(user("hi"), options=options, **fields).body


def message(role: str, content: Any, **fields: Any) -> Json:
    return {"type": "message", "role": role, "content": content, **fields}


def user(content: Any) -> Json:
    return message("user", content)


def assistant(*texts: str) -> Json:
    return message(
        "assistant", [{"type": "output_text", "text": text, "annotations": []} for text in texts], id="msg_1"
    )


def call(id: str, name: str = "f", arguments: str = '{"a":1}', **fields: Any) -> Json:
    return {"type": "function_call", "call_id": id, "name": name, "arguments": arguments, **fields}


def output(id: str, output: Any) -> Json:
    return {"type": "function_call_output", "call_id": id, "output": output}


def thought(text: str = "why", signature: str = "S", backend: str = "claude") -> Json:
    block = orjson.dumps({"type": "thinking", "thinking": text, "signature": signature}).decode()
    return {"type": "reasoning", "summary": [], "encrypted_content": seal(backend, block)}


# Their side


def said(role: str, *blocks: Any) -> Json:
    return {"role": role, "content": [text(block) if isinstance(block, str) else block for block in blocks]}


def text(text: str) -> Json:
    return {"type": "text", "text": text}


def use(id: str, name: str = "f", **input: Any) -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": input or {"a": 1}}


def result(id: str, *blocks: Any) -> Json:
    content = {"content": [text(block) if isinstance(block, str) else block for block in blocks]} if blocks else {}
    return {"type": "tool_result", "tool_use_id": id, **content}


def aborted(id: str) -> Json:
    return {"type": "tool_result", "tool_use_id": id, "content": "aborted", "is_error": True}


THOUGHT = {"type": "thinking", "thinking": "why", "signature": "S"}


# The request around the messages


def test_the_least_request() -> None:
    made = encoded(user("hi"))
    assert made.body == {
        "model": "m",
        "max_tokens": 32_000,
        "messages": [said("user", "hi")],
        "stream": True,
    }
    assert (made.dropped, made.summarized, made.recalls, made.foreign) == ((), False, False, False)


SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_output_tokens": 64}, {"max_tokens": 64}),
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0}),
        ({"temperature": 1, "top_p": 0.5}, {"top_p": 0.5}),
        ({"temperature": 1.7, "top_p": 1}, {}),
        ({"temperature": None, "text": None, "reasoning": None, "max_output_tokens": None}, {}),
        ({"text": {"verbosity": "low", "format": {"type": "text"}}}, {}),
        (
            {"text": {"format": {"type": "json_object"}}},
            {"system": [text("Answer with one JSON object and nothing else.")]},
        ),
        (
            {"text": {"format": SCHEMA}},
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        ),
        (
            {"text": {"format": SCHEMA}, "reasoning": {"effort": "high"}, "temperature": 0.5},
            {
                "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
                "thinking": {"type": "adaptive"},
            },
        ),
        ({"reasoning": {"effort": "minimal"}}, {"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}),
        ({"reasoning": {"summary": "auto"}}, {"thinking": {"type": "adaptive", "display": "summarized"}}),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, {"thinking": {"type": "disabled"}}),
        (
            {"reasoning": {"effort": "xhigh", "summary": "detailed"}},
            {"output_config": {"effort": "xhigh"}, "thinking": {"type": "adaptive", "display": "summarized"}},
        ),
        ({"store": False, "metadata": {"a": "b"}, "user": "u", "top_logprobs": 2, "parallel_tool_calls": False}, {}),
    ],
)
def test_parameters(given: Json, expected: Json) -> None:
    assert body(parameters=given) == {**body(), **expected}


def test_options_of_the_request() -> None:
    options = MessagesOptions(
        max_tokens=9, json_schema="instruction", thinking="off", cache=False, forward=("top_k", "model")
    )
    given = {"top_k": 0, "model": "other", "text": {"format": SCHEMA}, "reasoning": {"effort": "high"}}
    made = body(options, parameters=given, instructions="Be kind.", stream=False)
    asked = 'Answer with nothing else than JSON that matches this JSON schema:\n{"type":"object"}'
    assert made == {
        "model": "m",
        "max_tokens": 9,
        "top_k": 0,
        "system": [text(f"Be kind.\n\n{asked}")],
        "messages": [said("user", "hi")],
        "stream": False,
    }


# Thinking by budget

BUDGET = MessagesOptions(thinking="budget", cache=False)


@pytest.mark.parametrize(
    ("reasoning", "most", "budget"),
    [
        ({"effort": "high"}, None, 16_000),
        ({"effort": "low"}, None, 4096),
        ({"summary": "auto"}, None, 8192),
        ({"effort": "max"}, 100_000, 50_000),
        ({"effort": "high"}, 2000, 1024),
        ({"effort": "high"}, 1025, 1024),
        ({"effort": "high"}, 1024, None),
        ({"effort": "minimal"}, 16, None),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_a_budget_leaves_room_for_the_answer(reasoning: Any, most: int | None, budget: int | None) -> None:
    made = body(BUDGET, parameters={"reasoning": reasoning, "max_output_tokens": most, "temperature": 0.5})
    assert made.get("thinking") == (budget and {"type": "enabled", "budget_tokens": budget})
    assert made.get("temperature") == (None if budget else 0.5)
    assert "output_config" not in made


@pytest.mark.parametrize(
    ("items", "thinks"),
    [
        ((user("a"), thought(), call("1"), output("1", "x")), True),
        ((user("a"), thought(), call("1"), output("1", "x"), call("2"), output("2", "x")), True),
        ((user("a"), call("1"), output("1", "x")), False),
        ((user("a"), call("1"), output("1", "x"), thought(), call("2"), output("2", "x")), False),
        ((user("a"), call("1"), output("1", "x"), assistant("b"), user("c")), True),
        ((user("a"), thought(backend="other"), call("1"), output("1", "x")), False),
    ],
)
def test_a_budget_cannot_begin_in_the_middle_of_calls(items: tuple[Json, ...], thinks: bool) -> None:
    made = encoded(*items, options=BUDGET, parameters={"reasoning": {"effort": "low"}}).body
    assert ("thinking" in made) == thinks
    adaptive = encoded(*items, parameters={"reasoning": {"effort": "low"}}).body
    assert adaptive["thinking"] == {"type": "adaptive"}


def test_a_forced_call_leaves_no_budget() -> None:
    """Recorded for `adaptive`: count_tokens_with_adaptive_thinking_and_output_tools."""
    given: Json = {"tools": [F], "tool_choice": "required", "parameters": {"reasoning": {"effort": "low"}}}
    assert "thinking" not in body(BUDGET, **given)
    assert body(**given)["thinking"] == {"type": "adaptive"}


# Tools

F = {"type": "function", "name": "f", "description": "d", "parameters": {"properties": {}}, "strict": True}
G = {"type": "function", "name": "g"}
WEB = {"type": "web_search"}


def test_tools() -> None:
    made = encoded(user("hi"), tools=[F, G, WEB], parameters={"parallel_tool_calls": True})
    assert made.body["tools"] == [
        {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}},
        {"name": "g", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert "tool_choice" not in made.body
    assert made.dropped == ("web_search",)
    assert made.tools.tool("f") == Tool("function", "f")


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        ("none", False, {"type": "none"}),
        ("required", None, {"type": "any"}),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
        ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
        ({"type": "function", "name": "g"}, None, {"type": "tool", "name": "g"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            *(None, {"type": "any"}),
        ),
    ],
)
def test_tool_choice(choice: Any, parallel: bool | None, expected: Json) -> None:
    made = body(tools=[F, G], tool_choice=choice, parameters={"parallel_tool_calls": parallel})
    assert made["tool_choice"] == expected


def test_a_hosted_tool_cannot_be_forced() -> None:
    with pytest.raises(InvalidRequest, match="web_search"):
        body(tools=[WEB], tool_choice=WEB)


def test_without_usable_tools_nothing_about_tools_is_sent() -> None:
    assert body(tools=[WEB]) == body()


def test_calls_in_the_history_are_offered_but_not_to_be_called_where_there_are_no_tools() -> None:
    made = encoded(call("1"), call("2", "g"), call("3"), user("so")).body
    schema = {"input_schema": {"type": "object"}}
    assert made["tools"] == [{"name": "f", **schema}, {"name": "g", **schema}]
    assert made["tool_choice"] == {"type": "none"}


# Messages


@pytest.mark.parametrize(
    "item",
    [
        user(""),
        user(None),
        user(" \n"),
        message("developer", " "),
        message("assistant", [{"type": "output_text", "text": "\n\n"}]),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}], "encrypted_content": "E"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        thought(backend="openai"),
        {"type": "reasoning", "encrypted_content": 7},
        {"type": "reasoning", "encrypted_content": seal("claude", "{}")},
        {"type": "reasoning", "encrypted_content": seal("claude", '{"type":"thinking","thinking":1,"signature":"S"}')},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": None},
        {"type": "compaction", "encrypted_content": "C"},
        {"type": "additional_tools", "tools": []},
        {"type": "unheard_of", "role": "user", "content": "x"},
    ],
)
@pytest.mark.parametrize("system", ["user", "in_place", "leading"])
def test_what_leaves_no_message(item: Json, system: Any) -> None:
    options = MessagesOptions(system=system, cache=False)
    assert messages(user("a"), item, user("b"), options=options) == [said("user", "a", "b")]


def test_reasoning_of_another_backend_is_told_of() -> None:
    assert encoded(thought(backend="openai"), user("a")).foreign
    assert not encoded(thought(), user("a")).foreign
    assert not encoded({"type": "reasoning", "summary": []}, user("a")).foreign


def test_messages_of_one_role_are_one() -> None:
    agent = [{"type": "input_text", "text": "Task"}, {"type": "encrypted_content", "encrypted_content": "E"}]
    assert messages(
        {"role": "user", "content": "without a type"},
        {"type": "agent_message", "author": "/root", "content": agent},
        message("critic", "x"),
        assistant("a", "b"),
        message("assistant", [{"type": "refusal", "refusal": "never"}]),
        user("c"),
    ) == [said("user", "without a type", "Task", "x"), said("assistant", "a", "b", "never"), said("user", "c")]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ((), [said("user", "(The conversation begins.)")]),
        ((message("developer", "d"),), [said("user", "(The conversation begins.)")]),
        (
            (assistant("a"), user("b")),
            [said("user", "(The conversation begins.)"), said("assistant", "a"), said("user", "b")],
        ),
        ((user("a"), assistant("b")), [said("user", "a"), said("assistant", "b"), said("user", "(Go on.)")]),
    ],
)
def test_a_user_is_first_and_last(items: tuple[Json, ...], expected: list[Json]) -> None:
    assert messages(*items) == expected


SYSTEM_ITEMS = (
    message("developer", [{"type": "input_text", "text": "b"}]),
    message("system", "c"),
    user("hi"),
    message("developer", "d"),
    assistant("ho"),
    message("system", "e"),
    user("so"),
)


@pytest.mark.parametrize(
    ("mode", "system", "expected"),
    [
        (
            *("user", "a\n\nb\n\nc"),
            [
                said("user", "hi", "<system>\nd\n</system>"),
                said("assistant", "ho"),
                said("user", "<system>\ne\n</system>", "so"),
            ],
        ),
        (
            *("in_place", "a\n\nb\n\nc"),
            [said("user", "hi"), said("system", "d"), said("assistant", "ho"), said("system", "e"), said("user", "so")],
        ),
        ("leading", "a\n\nb\n\nc\n\nd\n\ne", [said("user", "hi"), said("assistant", "ho"), said("user", "so")]),
    ],
)
def test_system_messages(mode: Any, system: str, expected: list[Json]) -> None:
    made = encoded(*SYSTEM_ITEMS, instructions="a", options=MessagesOptions(system=mode, cache=False)).body
    assert made["system"] == [text(system)]
    assert made["messages"] == expected


# Calls and thinking


def test_a_round_of_tools() -> None:
    assert messages(
        user("go"),
        thought(),
        assistant("Let me look."),
        call("1"),
        call("2", "g", ""),
        output("1", "one"),
        output("2", None),
        assistant("Done."),
        user("thanks"),
    ) == [
        said("user", "go"),
        said("assistant", THOUGHT, "Let me look.", use("1"), {**use("2", "g"), "input": {}}),
        said("user", result("1", "one"), result("2")),
        said("assistant", "Done."),
        said("user", "thanks"),
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        # One after the other; outputs in another order; something between a call and its output.
        (
            (call("1"), output("1", "a"), call("2"), output("2", "b")),
            [
                said("assistant", use("1")),
                said("user", result("1", "a")),
                said("assistant", use("2")),
                said("user", result("2", "b")),
            ],
        ),
        (
            (call("1"), assistant("wait"), call("2"), output("2", "b"), output("1", "a"), user("so")),
            [said("assistant", use("1"), "wait", use("2")), said("user", result("1", "a"), result("2", "b"), "so")],
        ),
        (
            (call("1"), user("hurry"), output("1", "a")),
            [said("assistant", use("1")), said("user", result("1", "a"), "hurry")],
        ),
        (
            (call("1"), message("developer", "d"), output("1", "a")),
            [said("assistant", use("1")), said("user", result("1", "a"), "<system>\nd\n</system>")],
        ),
        # Calls without outputs, outputs without calls.
        (
            (call("1"), call("2"), output("1", "a"), user("so")),
            [said("assistant", use("1"), use("2")), said("user", result("1", "a"), aborted("2"), "so")],
        ),
        ((call("1"),), [said("assistant", use("1")), said("user", aborted("1"))]),
        ((output("1", "a"), call("1")), [said("user", "a"), said("assistant", use("1")), said("user", aborted("1"))]),
        (
            (call("1"), output("1", "a"), output("1", "b")),
            [said("assistant", use("1")), said("user", result("1", "a"), "b")],
        ),
        # Ids that come again, are not legal, or are not there.
        (
            (call("c"), output("c", "a"), call("c"), output("c", "b")),
            [
                said("assistant", use("c")),
                said("user", result("c", "a")),
                said("assistant", use("c_1")),
                said("user", result("c_1", "b")),
            ],
        ),
        (
            (call("a|b"), call("a.b"), output("a.b", "2"), output("a|b", "1")),
            [said("assistant", use("a_b"), use("a_b_1")), said("user", result("a_b", "1"), result("a_b_1", "2"))],
        ),
        ((call(""), output("", "a")), [said("assistant", use("call")), said("user", result("call", "a"))]),
        # Arguments that are no object.
        (
            (call("1", arguments='{"a'), call("2", arguments="[1]"), output("1", "a"), output("2", "b")),
            [
                said("assistant", use("1", arguments='{"a'), use("2", arguments="[1]")),
                said("user", result("1", "a"), result("2", "b")),
            ],
        ),
    ],
)
def test_calls_are_answered_at_once(items: tuple[Json, ...], expected: list[Json]) -> None:
    first = [] if expected[0]["role"] == "user" else [said("user", "(The conversation begins.)")]
    assert messages(*items) == first + expected


def test_thinking_goes_back_as_it_came_or_not_at_all() -> None:
    redacted = {"type": "redacted_thinking", "data": "D"}
    items = (
        user("a"),
        thought(),
        {"type": "reasoning", "encrypted_content": seal("claude", orjson.dumps({**redacted, "x": 1}).decode())},
        assistant("b"),
        user("c"),
    )
    assert messages(*items)[1] == said("assistant", THOUGHT, redacted, "b")
    assert encoded(*items).recalls
    assert messages(*items, recall=False)[1] == said("assistant", "b")
    assert not encoded(*items, recall=False).recalls


@pytest.mark.parametrize(
    ("status", "message", "refused"),
    [
        (400, "messages.1.content.0: Invalid `signature` in `thinking` block", True),
        (400, "`thinking` or `redacted_thinking` blocks in the latest assistant message cannot be modified.", True),
        (400, "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `tool_use`.", True),
        (400, "max_tokens must be greater than thinking.budget_tokens", False),
        (500, "Invalid `signature` in `thinking` block", False),
    ],
)
def test_refusals_of_thinking(status: int, message: str, refused: bool) -> None:
    said = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    assert refuses_thinking(status, orjson.dumps(said)) == refused


def test_codex_calls_keep_the_names_of_their_tools() -> None:
    tools = [
        {"type": "custom", "name": "exec", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "function", "name": "wait", "strict": False, "parameters": {"type": "object"}},
    ]
    brought = {"type": "namespace", "name": "functions", "description": "", "tools": tools}
    custom = {
        "type": "custom_tool_call",
        "call_id": "1",
        "name": "exec",
        "namespace": "functions",
        "input": 'say("x")\n',
    }
    made = encoded(
        {"type": "additional_tools", "id": "at_1", "role": "developer", "tools": [brought]},
        user("go"),
        custom,
        {"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
        call("2", "wait", namespace="functions"),
        output("2", "y"),
    )
    assert [tool["name"] for tool in made.body["tools"]] == ["functions__exec", "functions__wait"]
    assert made.body["messages"][1:] == [
        said("assistant", use("1", "functions__exec", input='say("x")\n')),
        said("user", result("1", "x")),
        said("assistant", use("2", "functions__wait")),
        said("user", result("2", "y")),
    ]
    assert made.tools.tool("functions__exec") == Tool("custom", "exec", "functions")


# The cache


def marked(made: Json) -> list[str]:
    """Where the marks are."""
    found = [f"tool {tool['name']}" for tool in made.get("tools", ()) if "cache_control" in tool]
    found += ["system" for block in made.get("system", ()) if "cache_control" in block]
    blocks = [
        (f"{at}.{number}", block)
        for at, one in enumerate(made["messages"])
        for number, block in enumerate(one["content"])
    ]
    for place, block in blocks:
        if "cache_control" in block:
            assert block["cache_control"] == {"type": "ephemeral"}
            found.append(place)
    return found


def test_the_ends_of_what_stays_are_marked() -> None:
    cached = MessagesOptions()
    items = (user("a"), assistant("b"), user("c"))
    made = encoded(*items, instructions="i", tools=[F, G], options=cached).body
    assert marked(made) == ["tool g", "system", "1.0", "2.0"]
    assert marked(encoded(user("a"), options=cached).body) == ["0.0"]
    assert marked(encoded(user("a"), call("1"), output("1", "x"), options=cached).body) == ["tool f", "1.0", "2.0"]
    assert marked(encoded(user("a"), thought(), user("b"), options=cached).body) == ["2.0"]
    assert marked(encoded(user("a"), thought(), options=cached).body) == ["0.0", "2.0"]
    assert marked(encoded(*items, instructions="i", tools=[F]).body) == []


# Anything at all

IDS = st.sampled_from(["", "1", "2", "a.b"])
ITEMS = st.one_of(
    st.sampled_from([user("a"), user(" "), assistant("b"), assistant(""), thought(), thought(backend="x")]),
    st.sampled_from([message("developer", "d"), message("system", ""), {"type": "reasoning"}]),
    st.builds(call, IDS, st.sampled_from(["f", "g"]), st.sampled_from(["", "{}", "{", "[]"])),
    st.builds(output, IDS, st.sampled_from(["", "x", None])),
)


@given(
    items=st.lists(ITEMS, max_size=14),
    options=st.builds(
        MessagesOptions,
        system=st.sampled_from(["user", "leading"]),
        thinking=st.sampled_from(["adaptive", "budget"]),
        cache=st.booleans(),
    ),
)
def test_any_history_keeps_the_rules_of_the_api(items: list[Json], options: MessagesOptions) -> None:
    made = encoded(*items, options=options, parameters={"reasoning": {"effort": "low"}}).body
    roles = [one["role"] for one in made["messages"]]
    assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and roles[-1] == "user"
    ids: list[str] = []
    waiting: list[str] = []
    for one in made["messages"]:
        content = one["content"]
        assert content and not any(block["type"] == "text" and not block["text"].strip() for block in content)
        results = [block["tool_use_id"] for block in content if block["type"] == "tool_result"]
        assert results == waiting and all(block["type"] == "tool_result" for block in content[: len(results)])
        waiting = [block["id"] for block in content if block["type"] == "tool_use"]
        ids += waiting
    assert not waiting and len(set(ids)) == len(ids)
    assert bool(ids) == ("tools" in made)
    assert len(marked(made)) <= 4
