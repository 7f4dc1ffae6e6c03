"""Calls in text: which they are, however the text comes in pieces, and what becomes of the items around them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Mark, Note, Open, Part, Remember, Text
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.emulation import TextCall
from responses_ingress.dialects.text_calls import CallParser, TextCalls
from responses_ingress.dialects.tools import Tool, ToolMap
from responses_ingress.errors import IllegalDelta, UpstreamTruncated
from tests.core.shapes import legal_deltas
from tests.dialects.play import brief, events_of, response_of

Json = dict[str, Any]

F, PATCH, DEEP = Tool("function", "f"), Tool("custom", "patch"), Tool("function", "g", "n")
TOOLS = {"f": F, "patch": PATCH, "n__g": DEEP}

MESSAGE = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
DONE = Finish("completed")


def call(name: str = "f", arguments: Any = None) -> str:
    body = json.dumps({"name": name, "arguments": {} if arguments is None else arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def parsed(*pieces: str) -> list[str | TextCall]:
    """What a whole text that comes in these pieces holds, texts that follow each other joined."""
    parser = CallParser(TOOLS)
    found = [part for piece in pieces for part in parser.feed(piece)]
    return joined([*found, parser.end()])


def joined(found: Iterable[str | TextCall]) -> list[str | TextCall]:
    made: list[str | TextCall] = []
    for part in found:
        if part and isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        elif part:
            made.append(part)
    return made


def texts(*pieces: str) -> list[Delta]:
    return [Open(0, MESSAGE), Part(0, "output_text"), *(Text(0, piece) for piece in pieces)]


def filtered(deltas: Iterable[Delta]) -> list[Delta]:
    calls = TextCalls(TOOLS)
    return [made for delta in deltas for made in calls.feed(delta)]


def output(deltas: Iterable[Delta]) -> list[tuple[str, str]]:
    return brief(response_of(filtered(deltas))["output"])


def answer(*pieces: str) -> list[tuple[str, str]]:
    return output([*texts(*pieces), Close(0), DONE])


# What is a call


@pytest.mark.parametrize(
    ("text", "name", "carried"),
    [
        (call(), F, "{}"),
        (call(arguments={"a": [1, {"b": "é"}]}), F, '{"a": [1, {"b": "é"}]}'),
        (call("n__g", {"a": 1}), DEEP, '{"a": 1}'),
        (call("patch", {"input": 'a\n"b"'}), PATCH, 'a\n"b"'),
        (call("patch", "as it is"), PATCH, "as it is"),
        (call("patch", '{"input": "twice"}'), PATCH, "twice"),
        (call("patch", '{"a": "as it is"}'), PATCH, '{"a": "as it is"}'),
        (call("patch", {"input": ""}), PATCH, ""),
        # What weak models write.
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', F, "{}"),
        ('<tool_call>{"name":"f"}</tool_call>', F, "{}"),
        ('<tool_call>{"name":"f","arguments":null}</tool_call>', F, "{}"),
        ('<tool_call>{"name":"f","arguments":""}</tool_call>', F, "{}"),
        ('<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>', F, '{"a": 1}'),
        ('<tool_call>{"arguments":{"a":1},"name":"f","id":"1","type":"function"}</tool_call>', F, '{"a": 1}'),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', F, '{"a": 1}'),
        ('<tool_call>{"name":"f","arguments":{"a":"one\ntwo"}}</tool_call>', F, '{"a": "one\\ntwo"}'),
        ('<tool_call>{"name":"f","arguments":{"a":123456789012345678901}}', F, '{"a": 123456789012345678901}'),
        # The end tag forgotten, cut off, or inside of a string.
        ('<tool_call>\n{"name":"f"}', F, "{}"),
        ('<tool_call>\n{"name":"f"}\n</tool', F, "{}"),
        (call(arguments={"a": "x </tool_call> y"}), F, '{"a": "x </tool_call> y"}'),
        (call(arguments={"a": '} ] { \\ " <tool_call>'}), F, '{"a": "} ] { \\\\ \\" <tool_call>"}'),
    ],
)
def test_a_call(text: str, name: Tool, carried: str) -> None:
    assert parsed(text) == [TextCall(name, carried)]


@pytest.mark.parametrize(
    "text",
    [
        "plain <b>text</b> with a < b and {braces}",
        call("unknown"),
        '{"name": "f", "arguments": {}}',
        "<tool_call>",
        "Write <tool_call> to call.",
        "<tool_call> {",
        '<tool_call>{"name": "f", "arguments": {',
        '<tool_call>{"name": "f", "arguments": {}',
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": ["f"]}</tool_call>',
        '<tool_call>{"name": "f", "description": "d", "parameters": {}}</tool_call>',
        '<tool_call>{"name": "patch"}</tool_call>',
        '<tool_call>{"name": "patch", "arguments": ""}</tool_call>',
        '<tool_call>{"name": "patch", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "patch", "arguments": [1]}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>{]</tool_call>",
        '<tool_call>{"a":' * 5_000 + "}" * 5_000,
        '<tool_call>{"name":"f","arguments":' + '{"a":' * 5_000 + "1" + "}" * 5_001,
        "</tool_call> <tool_response> before any call",
        " \n ",
    ],
)
def test_no_call(text: str) -> None:
    assert parsed(text) == [text]
    assert parsed(*text) == [text]


def test_a_call_that_failed_does_not_hide_the_next() -> None:
    assert parsed("<tool_call>{ <tool_call>{\n" + call()) == ["<tool_call>{ <tool_call>{\n", TextCall(F, "{}")]
    assert parsed("<tool_call>" + call()) == ["<tool_call>", TextCall(F, "{}")]
    assert parsed(call("unknown") + call()) == [call("unknown"), TextCall(F, "{}")]
    forgotten = '<tool_call>{"name":"f"}\n' * 2
    assert parsed(forgotten) == [TextCall(F, "{}")] * 2


def test_what_a_model_thinks_in_its_text_is_no_call() -> None:
    thought = f"\n<think>Shall I?\n{call()}\n</think>"
    assert parsed(f"{thought}\n\n{call()}") == [thought, TextCall(F, "{}")]
    assert parsed(thought.removesuffix("</think>")) == [thought.removesuffix("</think>")]
    assert parsed(f"<thin>{call()}") == ["<thin>", TextCall(F, "{}")]


def test_what_a_model_makes_up_as_its_tools_answer_is_not_told() -> None:
    made_up = "\n<tool_response>\nsunny\n</tool_response>\nSo I go on.\n" + call("patch", "rm -r")
    assert parsed("Look." + call() + call() + made_up) == ["Look.", TextCall(F, "{}"), TextCall(F, "{}")]


def test_white_space_around_a_call_is_not_text() -> None:
    assert parsed(f"\n\n{call()}\n\n{call()}\n\n") == [TextCall(F, "{}")] * 2
    assert parsed(f"Look.\n\n{call()}\n\nDone.\n") == ["Look.", TextCall(F, "{}"), "Done.\n"]


def test_endless_white_space_is_not_held_back() -> None:
    parser = CallParser(TOOLS)
    told = "".join(str(part) for _ in range(300) for part in parser.feed("\n"))
    assert len(told) > 200
    assert told + parser.end() == "\n" * 300


def test_a_long_text_costs_in_proportion() -> None:
    calls = 10_000
    assert parsed(call(arguments={"a": 1}) * calls) == [TextCall(F, '{"a": 1}')] * calls
    assert parsed("<tool_call>{" * calls) == ["<tool_call>{" * calls]


# Any text, in any pieces

SOUP = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<tool_response>", "<think>", "</think>", "<", "<tool_", ">", "</"),
            *(
                "{",
                "}",
                "[",
                "]",
                '"',
                "\\",
                ":",
                ",",
                '"name"',
                '"f"',
                '"arguments"',
                "{}",
                "1",
                "true",
                "é",
                "\ud7ff",
            ),
            *(" ", "\n", "word", '{"name": "f"', '"patch"', "\x1f", "\x00", " " * 40),
            *(call(), call("patch", "x"), call("unknown"), '<tool_call>{"name":"f"}'),
        ]
    ),
    max_size=12,
).map("".join)


@st.composite
def cut(draw: st.DrawFn, whole: str) -> list[str]:
    places = sorted(draw(st.sets(st.integers(0, len(whole)), max_size=8)))
    return [whole[start:end] for start, end in pairwise([0, *places, len(whole)])]


@given(st.data(), SOUP | st.text())
def test_pieces_change_nothing(data: st.DataObject, text: str) -> None:
    whole = parsed(text)
    assert parsed(*data.draw(cut(text))) == whole
    assert parsed(*text) == whole


def rendered(found: Sequence[str | TextCall]) -> str:
    return "".join(part if isinstance(part, str) else called(part) for part in found)


def called(found: TextCall) -> str:
    name = next(name for name, tool in TOOLS.items() if tool == found.tool)
    return call(name, found.text if found.tool.kind == "custom" else json.loads(found.text))


@given(SOUP | st.text())
def test_what_is_found_says_what_the_text_said(text: str) -> None:
    assume(not re.search(r"\s{65}", text))  # of such a run, only the end belongs to a call
    found = parsed(text)
    assert parsed(rendered(found)) == found
    if not any(isinstance(part, TextCall) for part in found):
        assert found == ([text] if text else [])
    else:
        assert all(part in text for part in found if isinstance(part, str))


words = st.sampled_from(["Look", "at a < b", "{}", "<tool_calls>", "é", "in\nthe", '"name": "f"'])
values = st.dictionaries(
    st.text(max_size=3), st.text(max_size=5) | st.integers() | st.just(["<tool_call>"]), max_size=2
)
calls = st.builds(lambda value: ("f", value), values) | st.builds(lambda text: ("patch", text), st.text(min_size=1))


@given(st.data(), st.lists(words | calls, max_size=6))
def test_texts_and_calls_come_out_as_they_were_put_in(data: st.DataObject, parts: list[str | tuple[str, Any]]) -> None:
    expected = joined(part if isinstance(part, str) else made(*part) for part in parts)
    text = "\n".join(part if isinstance(part, str) else called(part) for part in expected)
    assert parsed(*data.draw(cut(text))) == expected


def made(name: str, value: Any) -> TextCall:
    return TextCall(TOOLS[name], value if name == "patch" else json.dumps(value, ensure_ascii=False))


@given(st.data(), SOUP)
def test_what_was_told_never_turns_into_a_call(data: st.DataObject, text: str) -> None:
    parser, told = CallParser(TOOLS), list[str | TextCall]()
    for piece in data.draw(cut(text)):
        told = joined([*told, *parser.feed(piece)])
        # All that has been told so far stands at the beginning of what the whole says.
        whole = parsed(text)
        last = len(told) - 1
        assert told[:last] == whole[:last] if told else True
        assert not told or told[last] == whole[last] or str(whole[last]).startswith(str(told[last]))


# Items


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_items_between_messages(size: int) -> None:
    text = f"Let me look.\n{call(arguments={'at': 1})}\n{call('patch', {'input': 'p'})}Then:\n{call('n__g')}"
    assert answer(*(text[at : at + size] for at in range(0, len(text), size))) == [
        ("message", "Let me look."),
        ("call", 'f {"at": 1}'),
        ("custom", "patch p"),
        ("message", "Then:"),
        ("call", "n/g {}"),
    ]


def test_a_call_comes_whole_and_has_no_id_yet() -> None:
    skeleton = {"type": "function_call", "status": "in_progress", "call_id": "", "name": "f", "arguments": ""}
    assert filtered([*texts("Hi", call()), Close(0), DONE]) == [
        *texts("Hi"),
        Close(0),
        Open(1, skeleton),
        Text(1, "{}"),
        Close(1),
        DONE,
    ]


def test_an_upstreams_id_is_the_first_messages_alone() -> None:
    deltas = [Open(0, {"id": "msg_1", **MESSAGE}), *texts("a" + call() + "b" + call() + "c")[1:], Close(0), DONE]
    messages = [delta.item for delta in filtered(deltas) if isinstance(delta, Open) and delta.index % 2 == 0]
    assert messages == [{"id": "msg_1", **MESSAGE}, MESSAGE, MESSAGE]


def test_text_without_a_call_passes_as_it_comes() -> None:
    deltas = [Accepted(), *texts("Hel", "lo\n", "<b>"), Note(0, {"n": 1}), Close(0, {**MESSAGE, "x": 1}), DONE]
    assert filtered(deltas) == [
        Accepted(),
        *texts("Hel", "lo", "\n<b>"),
        Note(0, {"n": 1}),
        Close(0, {**MESSAGE, "x": 1}),
        DONE,
    ]


def test_reasoning_and_the_rest_pass_with_their_places_kept() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": []}
    search = {"type": "web_search_call", "status": "in_progress"}
    deltas: list[Delta] = [Remember({"id": "u"}), Open(0, reasoning), Part(0, "reasoning_text"), Text(0, call())]
    deltas += [Close(0), Open(1, MESSAGE), Part(1, "output_text"), Text(1, "a" + call() + "b"), Close(1)]
    deltas += [Open(2, search), Mark(2, "response.web_search_call.searching"), Mark(None, "response.odd"), Close(2)]
    told = filtered([*deltas, DONE])
    assert [delta.index for delta in told if isinstance(delta, Open | Mark)] == [0, 1, 2, 3, 4, 4, None]
    assert told[:5] == deltas[:5]
    assert [event["type"] for event in events_of(told)][-4:-2] == ["response.web_search_call.searching", "response.odd"]


def test_refusals_and_further_parts_pass() -> None:
    deltas = [*texts("a", "<tool"), Part(0, "refusal"), Text(0, call()), Part(0, "output_text"), Text(0, "b")]
    parts = response_of(filtered([*deltas, Close(0), DONE]))["output"][0]["content"]
    assert [part.get("text", part.get("refusal")) for part in parts] == ["a<tool", call(), "b"]
    assert output([*texts("a" + call()), Part(0, "output_text"), Text(0, "b" + call()), Close(0), DONE]) == [
        ("message", "a"),
        ("call", "f {}"),
        ("message", "b"),
        ("call", "f {}"),
    ]


def test_notes_wait_for_the_text_and_end_with_the_first_call() -> None:
    deltas: list[Delta] = [Open(0, MESSAGE), Part(0, "output_text"), Note(0, {"n": 1})]
    deltas += [Text(0, "a"), Note(0, {"n": 2}), Text(0, call() + "b"), Note(0, {"n": 3}), Close(0), DONE]
    told = filtered(deltas)
    assert [delta for delta in told if isinstance(delta, Note)] == [Note(0, {"n": 1}), Note(0, {"n": 2})]


def test_a_message_without_text_is_still_a_message() -> None:
    bare: list[Delta] = [Open(0, MESSAGE), Close(0), DONE]
    assert filtered(bare) == bare
    parted: list[Delta] = [*texts(), Close(0), DONE]
    assert filtered(parted) == parted


def test_a_message_that_is_all_calls_is_none() -> None:
    assert answer(call()) == [("call", "f {}")]


def test_the_final_item_of_a_message_that_was_cut_up_is_not_told() -> None:
    final = {**MESSAGE, "content": [{"type": "output_text", "text": call() + "b", "annotations": []}]}
    deltas = [*texts(call() + "b"), Close(0, final), Finish("completed", items={0: final})]
    assert output(deltas) == [("call", "f {}"), ("message", "b")]


def test_a_whole_completion_is_read_alike() -> None:
    body = {"choices": [{"message": {"content": f"Look. {call()}"}, "finish_reason": "stop"}]}
    assert output(ChatReader(ToolMap()).read_json(body)) == [("message", "Look."), ("call", "f {}")]


# Endings

OPENED = re.compile(r"<tool_call>\s*\{")
BEGUN = ["<tool_ca", "<tool_call>\n", '<tool_call>{"name": "f"', '<tool_call>{"name": "f", "arguments": {"a": "b']


@pytest.mark.parametrize("begun", BEGUN[:2])
def test_what_has_not_become_a_call_is_text_where_the_answer_is_whole(begun: str) -> None:
    assert answer("Look.\n", begun) == [("message", f"Look.\n{begun}")]


@pytest.mark.parametrize("begun", BEGUN[2:])
def test_an_answer_completed_in_the_middle_of_a_call_is_truncated(begun: str) -> None:
    told = texts("Look.\n", begun)
    for end in ([Close(0), DONE], [DONE], [Part(0, "refusal")], [Close(0), Open(1, MESSAGE)]):
        with pytest.raises(UpstreamTruncated):
            filtered([*told, *end])


def test_a_mere_mention_of_the_tag_is_text() -> None:
    for text in ("Write <tool_call> first.", "Write <tool_call>", "A <tool_call>{} is empty.", "<tool_call>{so"):
        assert answer(text) == [("message", text)]


CUT = [Finish("incomplete", reason="max_output_tokens"), Finish("failed", error={"code": "c", "message": "m"})]


@pytest.mark.parametrize("finish", CUT)
@pytest.mark.parametrize("begun", BEGUN)
def test_half_a_call_is_nothing_where_the_answer_is_cut_short(begun: str, finish: Finish) -> None:
    response = response_of(filtered([*texts("Look.\n", begun), finish]))
    assert brief(response["output"]) == [("message", "Look.")]
    assert (response["status"], response["output"][0]["status"]) == (finish.status, "incomplete")
    assert output([*texts(call(), begun), finish]) == [("call", "f {}")]


@pytest.mark.parametrize("status", ["completed", None])
@pytest.mark.parametrize("finish", CUT)
@pytest.mark.parametrize("begun", BEGUN)
def test_half_a_call_is_nothing_even_where_its_message_is_said_to_be_whole(
    begun: str, finish: Finish, status: str | None
) -> None:
    final = {**MESSAGE, "status": status, "content": [{"type": "output_text", "text": f"Look.\n{begun}"}]}
    told = filtered([*texts("Look.\n", begun), Close(0, final), replace(finish, items={0: final})])
    assert not [delta for delta in told if isinstance(delta, Close)]
    response = response_of(told)
    assert brief(response["output"]) == [("message", "Look.")]
    assert (response["status"], response["output"][0]["status"]) == (finish.status, "incomplete")


def test_nothing_comes_for_a_message_whose_end_waits() -> None:
    for delta in (Text(0, "a"), Part(0, "refusal"), Close(0)):
        with pytest.raises(IllegalDelta):
            filtered([*texts("a <tool"), Close(0), delta])


def test_an_end_that_waited_comes_before_the_next_item() -> None:
    told = filtered([*texts("a <tool"), Close(0), Open(1, {"type": "reasoning", "summary": []})])
    assert told[-3:] == [Text(0, " <tool"), Close(0), Open(1, {"type": "reasoning", "summary": []})]


def test_an_upstream_may_end_the_message_as_incomplete_first() -> None:
    final = {**MESSAGE, "status": "incomplete", "content": [{"type": "output_text", "text": "Look. <tool_call>{"}]}
    deltas = [*texts("Look. <tool_call>{"), Close(0, final)]
    response = response_of(filtered([*deltas, Finish("incomplete", reason="max_output_tokens", items={0: final})]))
    assert brief(response["output"]) == [("message", "Look.")]
    assert response["output"][0]["status"] == "incomplete"
    assert output([*deltas, DONE]) == [("message", "Look.")]
    assert output([*texts("<tool_call>{"), Close(0, final), DONE]) == []


def test_a_call_that_came_whole_before_the_cut_is_a_call() -> None:
    told = filtered([*texts('<tool_call>{"name": "f"}'), CUT[0]])
    assert Close(0) in told


def test_items_that_come_with_the_end_are_read_too() -> None:
    late = {"id": "m", **MESSAGE, "content": [{"type": "output_text", "text": f"a{call()}", "annotations": []}]}
    other = {"id": "r", "type": "reasoning", "summary": []}
    told = filtered([*texts("x" + call()), Close(0), Finish("completed", items={1: other, 2: late})])
    assert brief(response_of(told[:-1] + [DONE])["output"]) == [
        ("message", "x"),
        ("call", "f {}"),
        ("message", "a"),
        ("call", "f {}"),
    ]
    assert told[-1] == Finish("completed", items={4: other})
    failed = Finish("failed", error={"code": "c", "message": "m"}, items={0: late})
    assert output([failed]) == [("message", "a"), ("call", "f {}")]


def test_deltas_about_nothing_are_refused() -> None:
    for delta in (Text(0, "a"), Close(3), Mark(0, "response.odd"), Open(1, MESSAGE)):
        with pytest.raises(IllegalDelta):
            TextCalls(TOOLS).feed(delta)
    with pytest.raises(IllegalDelta):
        filtered([*texts(call()), Close(0), Text(0, "more")])


@given(legal_deltas())
def test_any_legal_answer_stays_legal(deltas: list[Delta]) -> None:
    told = filtered(deltas)
    named = [Open(d.index, {**d.item, "id": f"item_{d.index}"}) if isinstance(d, Open) else d for d in told]
    again = [Open(d.index, {**d.item, "id": f"item_{d.index}"}) if isinstance(d, Open) else d for d in deltas]
    after, before = events_of(named, interleaved=True), events_of(again, interleaved=True)
    assert after[-1]["type"] == before[-1]["type"]
    assert after[-1]["response"]["usage"] == before[-1]["response"]["usage"]
    assert others(after) == others(before)


def others(events: Sequence[Json]) -> list[str]:
    """The types of all items but messages."""
    output = events[-1]["response"]["output"]
    return sorted(item["type"] for item in output if item["type"] != "message")


@given(st.data(), st.lists(SOUP, max_size=3), st.sampled_from([DONE, *CUT]))
def test_any_text_gives_a_legal_answer(data: st.DataObject, messages: list[str], finish: Finish) -> None:
    deltas: list[Delta] = []
    for index, text in enumerate(messages):
        pieces = [Text(index, piece) for piece in data.draw(cut(text))]
        deltas += [Open(index, MESSAGE), Part(index, "output_text"), *pieces]
        if finish is DONE or index < len(messages) - 1:
            deltas.append(Close(index))
    try:
        events = events_of(filtered([*deltas, finish]))
    except UpstreamTruncated:
        assert any(OPENED.search(text) for text in messages)
        return
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    expected = [part for text in messages for part in parsed(text) if isinstance(part, TextCall)]
    told = [item["arguments"] for item in done if item["type"] == "function_call"]
    assert told == [part.text for part in expected if part.tool.kind == "function"]
