"""A turn as a chat request: what each item and parameter becomes."""

from typing import Any

import orjson
import pytest

from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatOptions, encode
from responses_ingress.dialects.tools import Tool
from responses_ingress.errors import InvalidRequest

Json = dict[str, Any]


def turn(*items: Json, **fields: Any) -> Turn:
    return Turn("resp_1", "thread_1", "m", context=items[:-1], new=items[-1:], **fields)


def messages(*items: Json, options: ChatOptions | None = None, **fields: Any) -> list[Json]:
    made: list[Json] = encode(turn(*items, **fields), options or ChatOptions()).body["messages"]
    orjson.dumps(made)
    return made


def body(**fields: Any) -> Json:
    return encode(turn(user("hi"), **fields), ChatOptions()).body


def message(role: str, content: Any, **fields: Any) -> Json:
    return {"type": "message", "role": role, "content": content, **fields}


def user(content: Any) -> Json:
    return message("user", content)


def assistant(*texts: str) -> Json:
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return message("assistant", content, id="msg_1", status="completed", phase="final_answer")


def call(id: str, name: str = "f", arguments: str = '{"a":1}', **fields: Any) -> Json:
    return {"type": "function_call", "call_id": id, "name": name, "arguments": arguments, **fields}


def output(id: str, output: Any) -> Json:
    return {"type": "function_call_output", "call_id": id, "output": output}


def reasoning(text: str = "", *, summary: str = "", encrypted: str | None = None) -> Json:
    return {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": summary}] if summary else [],
        "content": [{"type": "reasoning_text", "text": text}] if text else None,
        "encrypted_content": encrypted,
    }


def chat_call(id: str, name: str = "f", arguments: str = '{"a":1}') -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# The request around the messages


def test_the_least_request() -> None:
    made = encode(turn(user("hi")), ChatOptions())
    assert made.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert made.dropped == ()


def test_not_streamed() -> None:
    assert body(stream=False) == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"temperature": None, "text": None, "reasoning": None, "include": None, "top_logprobs": None}, {}),
        ({"max_output_tokens": 64}, {"max_tokens": 64}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"reasoning": {"effort": None}}, {}),
        ({"text": {"verbosity": "low", "format": {"type": "text"}}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True, "description": None}
                }
            },
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {}, "strict": True},
                }
            },
        ),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"top_logprobs": 0}, {}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"include": ["reasoning.encrypted_content"]}, {}),
        ({"chat_template_kwargs": {"x": 1}, "seed": 7}, {"chat_template_kwargs": {"x": 1}}),
        ({"store": False, "metadata": {"a": "b"}, "user": "u", "parallel_tool_calls": True}, {}),
    ],
)
def test_parameters(given: Json, expected: Json) -> None:
    assert body(parameters=given) == {**body(), **expected}


def test_options_of_the_request() -> None:
    options = ChatOptions(max_tokens_field="max_tokens", forward=("seed", "model", "stop"))
    given = {"max_output_tokens": 9, "seed": 0, "model": "other", "stop": None}
    made = encode(turn(user("hi"), parameters=given), options).body
    assert made == {**body(), "max_tokens": 9, "seed": 0}


# Tools

F = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
G = {"type": "function", "name": "g", "parameters": {"type": "object"}, "strict": True}
WEB = {"type": "web_search"}


def test_tools() -> None:
    made = encode(turn(user("hi"), tools=[F, G, WEB], parameters={"parallel_tool_calls": False}), ChatOptions())
    assert made.body["tools"] == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}, "strict": True}},
    ]
    assert made.body["parallel_tool_calls"] is False
    assert "tool_choice" not in made.body
    assert made.dropped == ("web_search",)
    assert made.tools.tool("f") == Tool("function", "f")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "g"}, {"type": "function", "function": {"name": "g"}}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}, "required"),
    ],
)
def test_tool_choice(choice: Any, expected: object) -> None:
    assert body(tools=[F, G], tool_choice=choice)["tool_choice"] == expected


def test_without_usable_tools_nothing_about_tools_is_sent() -> None:
    made = encode(turn(user("hi"), tools=[WEB], parameters={"parallel_tool_calls": True}), ChatOptions())
    assert made.body == body()
    assert made.dropped == ("web_search",)


# Messages


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", "hi"),
        ([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
        ([{"type": "text", "text": "a"}, {"type": "unheard_of"}, "b"], "a"),
        (
            [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:x", "detail": "original"}],
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}],
        ),
        (
            [{"type": "input_image", "image_url": "https://x", "detail": "auto", "file_id": None}],
            [{"type": "image_url", "image_url": {"url": "https://x"}}],
        ),
        (
            [{"type": "input_image", "image_url": "https://x", "detail": ["high"]}],
            [{"type": "image_url", "image_url": {"url": "https://x"}}],
        ),
        (
            [{"type": "input_file", "filename": "a.pdf", "file_data": "data:y", "file_url": None}],
            [{"type": "file", "file": {"file_data": "data:y", "filename": "a.pdf"}}],
        ),
        ([{"type": "input_file", "file_id": "file_1"}], [{"type": "file", "file": {"file_id": "file_1"}}]),
        (
            [{"type": "input_audio", "input_audio": {"data": "z", "format": "wav"}}],
            [{"type": "input_audio", "input_audio": {"data": "z", "format": "wav"}}],
        ),
    ],
)
def test_user_content(content: Any, expected: object) -> None:
    assert messages(user(content)) == [{"role": "user", "content": expected}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file_1"},
        {"type": "input_file", "file_url": "https://x"},
        {"type": "input_file", "filename": "a.pdf"},
    ],
)
def test_content_that_chat_has_no_form_for_is_refused(part: Json) -> None:
    for item in (user([part]), output("c", [part])):
        with pytest.raises(InvalidRequest) as caught:
            messages(item)
        assert (caught.value.param, caught.value.code) == ("input", None)


@pytest.mark.parametrize(
    "item",
    [
        user(""),
        user(None),
        user([]),
        message("developer", None),
        message("assistant", [{"type": "output_text", "text": ""}]),
        message("assistant", None),
        reasoning(encrypted="E"),
        reasoning("with nothing after it"),
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": None},
        {"type": "compaction", "encrypted_content": "C"},
        {"type": "additional_tools", "tools": []},
        {"type": "agent_message", "content": [{"type": "encrypted_content", "encrypted_content": "E"}]},
        {"type": "unheard_of", "role": "user", "content": "x"},
    ],
)
@pytest.mark.parametrize("system", ["leading", "in_place"])
def test_what_leaves_no_message(item: Json, system: Any) -> None:
    made = messages(user("a"), item, user("b"), options=ChatOptions(system=system))
    assert [(one["role"], one["content"]) for one in made] == [("user", "a"), ("user", "b")]


def test_messages_of_other_kinds() -> None:
    agent = [{"type": "input_text", "text": "Task"}, {"type": "encrypted_content", "encrypted_content": "E"}]
    assert messages(
        {"role": "user", "content": "without a type"},
        {"type": "agent_message", "author": "/root", "content": agent},
        message("critic", "x"),
        message("assistant", "easy"),
        message("assistant", [{"type": "output_text", "text": "No: "}, {"type": "refusal", "refusal": "never"}]),
    ) == [
        {"role": "user", "content": "without a type"},
        {"role": "user", "content": "Task"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "easy"},
        {"role": "assistant", "content": "No: \nnever"},
    ]


SYSTEM_ITEMS = (
    message("developer", [{"type": "input_text", "text": "b"}]),
    message("system", "c"),
    user("hi"),
    message("developer", "d"),
    assistant("ho"),
    message("system", "e"),
)


def test_system_messages_lead() -> None:
    assert messages(*SYSTEM_ITEMS, instructions="a") == [
        {"role": "system", "content": "a\n\nb\n\nc\n\nd\n\ne"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]


def test_system_messages_in_place() -> None:
    assert messages(*SYSTEM_ITEMS, instructions="a", options=ChatOptions(system="in_place")) == [
        {"role": "system", "content": "a\n\nb\n\nc"},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "d"},
        {"role": "assistant", "content": "ho"},
        {"role": "system", "content": "e"},
    ]


# Calls and reasoning


def test_a_round_of_tools() -> None:
    made = messages(
        user("go"),
        reasoning("think"),
        assistant("Let me look."),
        call("1"),
        call("2", "g", ""),
        output("1", "one"),
        output("2", None),
        reasoning(summary="so"),
        assistant("Done."),
        user("thanks"),
    )
    assert made == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "think",
            "tool_calls": [chat_call("1"), chat_call("2", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "assistant", "content": "Done.", "reasoning_content": "so"},
        {"role": "user", "content": "thanks"},
    ]


def test_calls_one_after_the_other() -> None:
    assert messages(call("1"), output("1", "one"), call("2"), output("2", "two")) == [
        {"role": "assistant", "content": None, "tool_calls": [chat_call("1")]},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [chat_call("2")]},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
    ]


def test_what_is_said_between_calls_and_outputs_stays_with_the_calls() -> None:
    items = (
        reasoning("r"),
        call("1"),
        reasoning("s"),
        assistant("wait"),
        call("2"),
        output("2", "b"),
        output("1", "a"),
    )
    assert messages(*items) == [
        {
            "role": "assistant",
            "content": "wait",
            "reasoning_content": "r\ns",
            "tool_calls": [chat_call("1"), chat_call("2")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "b"},
        {"role": "tool", "tool_call_id": "1", "content": "a"},
    ]


def test_two_answers_stay_two_messages() -> None:
    assert messages(assistant("a"), reasoning("r"), assistant("b")) == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    ]


def test_reasoning_as_text_or_not_at_all() -> None:
    items = (reasoning("r", summary="s", encrypted="E"), assistant("a"), reasoning("t"), call("1"), output("1", "x"))
    as_text = messages(*items, options=ChatOptions(reasoning="text"))
    assert [one["content"] for one in as_text] == ["<think>\nr\n</think>\n\na", "<think>\nt\n</think>", "x"]
    left_out = messages(*items, options=ChatOptions(reasoning="omit"))
    assert [one["content"] for one in left_out] == ["a", None, "x"]
    assert not any("reasoning_content" in one for one in as_text + left_out)


def test_outputs_with_pictures() -> None:
    image = {"type": "input_image", "image_url": "data:x"}
    shown = {"type": "image_url", "image_url": {"url": "data:x"}}
    text = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = (call("1"), call("2"), call("3"), output("1", [image]), output("2", text), output("3", [*text, image]))
    expected = [
        {"role": "tool", "tool_call_id": "1", "content": "(The output is attached below.)"},
        {"role": "tool", "tool_call_id": "2", "content": "a\nb"},
        {"role": "tool", "tool_call_id": "3", "content": "a\nb"},
        {"role": "user", "content": [shown, shown]},
    ]
    assert messages(*items)[1:] == expected
    assert messages(*items, assistant("nice"))[1:] == [*expected, {"role": "assistant", "content": "nice"}]
    assert messages(*items, user("nice"))[1:] == [*expected, {"role": "user", "content": "nice"}]


def test_codex_calls_keep_the_names_of_their_tools() -> None:
    tools = [
        {"type": "custom", "name": "exec", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "function", "name": "wait", "strict": False, "parameters": {"type": "object"}},
    ]
    brought = {"type": "namespace", "name": "functions", "description": "", "tools": tools}
    made = encode(
        turn(
            {"type": "additional_tools", "id": "at_1", "role": "developer", "tools": [brought]},
            user("go"),
            {
                "type": "custom_tool_call",
                "call_id": "1",
                "name": "exec",
                "namespace": "functions",
                "input": 'say("x")\n',
            },
            {"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
            call("2", "wait", namespace="functions"),
            output("2", "y"),
            {"type": "custom_tool_call", "call_id": "3", "name": "old", "namespace": None, "input": None},
        ),
        ChatOptions(),
    )
    assert [tool["function"]["name"] for tool in made.body["tools"]] == ["functions__exec", "functions__wait"]
    assert made.body["messages"] == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [chat_call("1", "functions__exec", '{"input":"say(\\"x\\")\\n"}')],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [chat_call("2", "functions__wait")]},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": None, "tool_calls": [chat_call("3", "old", '{"input":""}')]},
    ]
    assert made.tools.tool("functions__exec") == Tool("custom", "exec", "functions")
