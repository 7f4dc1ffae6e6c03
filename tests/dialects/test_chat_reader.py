"""Chat answers as deltas: every habit of a server, whole and streamed, played through the builder."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.deltas import Close, Delta, Finish, Note, Open, Part, Text
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.tools import Tool, ToolMap
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated
from tests.dialects.play import brief, events_of, response_of

Json = dict[str, Any]

MESSAGE = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
REASONING = {"type": "reasoning", "summary": [], "content": []}
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}


def tools() -> ToolMap:
    map = ToolMap()
    for tool in (Tool("function", "f"), Tool("custom", "patch"), Tool("function", "g", "n"), Tool("custom", "x", "n")):
        map.flat(tool)
    return map


def chunk(delta: Json | None = None, finish: str | None = None, **fields: Any) -> Json:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def said(text: Any, **fields: Any) -> Json:
    return chunk({"content": text, **fields})


def piece(arguments: Any = None, index: int | None = 0, id: str | None = None, name: str | None = None) -> Json:
    call: Json = {"function": {"arguments": arguments}}
    if index is not None:
        call["index"] = index
    if id is not None:
        call["id"] = id
    if name is not None:
        call["function"]["name"] = name
    return chunk({"tool_calls": [call]})


STOP = chunk({}, "stop")
CALLS = chunk({}, "tool_calls")


def read(*chunks: Any) -> list[Delta]:
    reader = ChatReader(tools())
    deltas = [delta for chunk in chunks for delta in reader.feed(chunk)]
    deltas += reader.end()
    assert reader.feed(said("late")) == reader.end() == []
    return deltas


def output(*chunks: Any) -> list[tuple[str, str]]:
    return brief(response_of(read(*chunks))["output"])


# Text


def test_text() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert read(
        {"choices": [], "prompt_filter_results": [{}]},
        chunk({"role": "assistant", "content": "", "refusal": None}),
        said("Hel"),
        said("lo"),
        said(""),
        STOP,
        {"choices": [], "usage": usage},
        {"choices": [], "moderation": {}},
    ) == [
        Open(0, MESSAGE),
        Part(0, "output_text"),
        Text(0, "Hel"),
        Text(0, "lo"),
        Close(0),
        Finish("completed", usage=USAGE),
    ]


def test_an_empty_answer_has_no_items() -> None:
    assert read(chunk({"role": "assistant", "content": ""}), STOP) == [Finish("completed")]


def test_text_and_the_end_in_one_chunk() -> None:
    assert output(chunk({"content": "all"}, "stop")) == [("message", "all")]
    assert output(said("a"), chunk({"content": "b"}, "stop")) == [("message", "ab")]


def test_text_with_logprobs() -> None:
    logprobs = [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]
    scored = said("a")
    scored["choices"][0]["logprobs"] = {"content": logprobs, "refusal": None}
    empty = said("b")
    empty["choices"][0]["logprobs"] = {"content": None, "refusal": None}
    assert read(scored, scored, empty, STOP)[2:5] == [Text(0, "a", logprobs), Text(0, "a", logprobs), Text(0, "b")]


def test_a_refusal_after_text() -> None:
    assert read(said("Hm."), chunk({"refusal": "No"}), chunk({"refusal": "!"}), STOP)[3:] == [
        Part(0, "refusal"),
        Text(0, "No"),
        Text(0, "!"),
        Close(0),
        Finish("completed"),
    ]


def test_the_first_choice_counts() -> None:
    two = {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a"}}]}
    other = {"choices": [{"index": 1, "delta": {"content": "b"}}]}
    assert output(two, other, two, other, STOP) == [("message", "aa")]


CITED = {"url": "https://x", "title": "X", "start_index": 1, "end_index": None, "content": "left out"}


def test_citations() -> None:
    note = {"type": "url_citation", "start_index": 1, "end_index": 0, "url": "https://x", "title": "X"}
    cited = [{"type": "url_citation", "url_citation": CITED}, {"type": "file"}, None]
    before = read(chunk({"content": "", "annotations": cited}), said("a"), said("b"), STOP)
    assert before[2:5] == [Text(0, "a"), Note(0, note), Text(0, "b")]
    after = read(said("a"), chunk({"annotations": cited}), said("b"), chunk({"annotations": {}}), STOP)
    assert after[2:5] == [Text(0, "a"), Note(0, note), Text(0, "b")]
    [item] = response_of(before)["output"]
    assert item["content"][0]["annotations"] == [note]


# Reasoning


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": "why"},
        {"reasoning": "why", "content": None},
        {"reasoning_content": "why", "reasoning": "why", "reasoning_details": [{"text": "why"}]},
        {"reasoning_content": None, "reasoning": "", "reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
        {"reasoning_details": [{"summary": "w"}, {"text": "hy", "data": "E"}, {"data": "E"}, None], "content": ""},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "w"}, {"type": "text", "text": "hy"}]}
            ]
        },
        {"content": [{"type": "thinking", "thinking": "why"}, {"type": "reference", "ids": [1]}]},
    ],
)
def test_reasoning_closes_when_text_begins(delta: Json) -> None:
    assert read(chunk(delta), said("so"), STOP) == [
        Open(0, REASONING),
        Part(0, "reasoning_text"),
        Text(0, "why"),
        Close(0),
        Open(1, MESSAGE),
        Part(1, "output_text"),
        Text(1, "so"),
        Close(1),
        Finish("completed"),
    ]


def test_reasoning_text_and_calls_by_turns() -> None:
    assert output(
        chunk({"reasoning": "a", "content": "b"}),
        chunk({"reasoning": "c"}),
        piece("{}", id="1", name="f"),
        said("d"),
        CALLS,
    ) == [("reasoning", "a"), ("message", "b"), ("reasoning", "c"), ("call", "f {}"), ("message", "d")]


def test_content_parts_of_both_kinds() -> None:
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "so"}, {"type": "text", "text": "."}]
    assert output(chunk({"content": parts}), STOP) == [("reasoning", "why"), ("message", "so.")]


# Calls


def test_a_call_in_pieces() -> None:
    assert read(piece("", id="call_1", name="f"), piece('{"a"'), piece(":1}"), CALLS) == [
        Open(0, {"type": "function_call", "status": "in_progress", "call_id": "call_1", "name": "f", "arguments": ""}),
        Text(0, '{"a"'),
        Text(0, ":1}"),
        Close(0),
        Finish("completed"),
    ]


def test_a_custom_call_is_unwrapped_as_it_comes() -> None:
    pieces = (piece('{"in', id="c1", name="n__x"), piece('put":"a\\'), piece('nb"'), piece("}"))
    assert read(*pieces, CALLS) == [
        Open(
            0,
            {
                "type": "custom_tool_call",
                "status": "in_progress",
                "call_id": "c1",
                "name": "x",
                "namespace": "n",
                "input": "",
            },
        ),
        Text(0, "a"),
        Text(0, "\nb"),
        Close(0),
        Finish("completed"),
    ]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        # Parallel calls, one after the other and all in one chunk.
        (
            [piece("", 0, "1", "f"), piece('{"a":1}', 0), piece('{"b"', 1, "2", "n__g"), piece(":2}", 1)],
            ["1 f {'a':1}", "2 n/g {'b':2}"],
        ),
        (
            [
                chunk(
                    {
                        "tool_calls": [
                            piece("{}", i, str(i), "f")["choices"][0]["delta"]["tool_calls"][0] for i in (0, 1)
                        ]
                    }
                )
            ],
            ["0 f {}", "1 f {}"],
        ),
        # Indexes by turns: nothing is lost, nothing interleaves.
        (
            [piece("", 0, "1", "f"), piece("", 1, "2", "f"), piece('{"b":', 1), piece('{"a":1', 0), piece("}", 0)]
            + [piece("2}", 1), piece("", 2, "3", "f")],
            ["1 f {'a':1}", "2 f {'b':2}", "3 f {}"],
        ),
        # Text that begins before a call is whole.
        ([piece('{"a"', 0, "1", "f"), said("so"), said("!"), piece(":1}", 0)], ["1 f {'a':1}", "so!"]),
        # No index: by id, and by name where there is no id either.
        (
            [piece('{"a"', None, "1", "f"), piece(":1}", None, "1"), piece("{}", None, "2", "f")],
            ["1 f {'a':1}", "2 f {}"],
        ),
        (
            [piece('{"a"', None, None, "f"), piece(":1}", None), piece("{}", None, None, "n__g")],
            ["f {'a':1}", "n/g {}"],
        ),
        ([piece('{"a"', None, "1", "f"), piece(":1}", None, "other")], ["1 f {'a':1}"]),
        # Gemini: index 0 for every call, with and without ids.
        ([piece("{}", 0, "1", "f"), piece("{}", 0, "2", "f")], ["1 f {}", "2 f {}"]),
        ([piece("{}", 0, "", "f"), piece("{}", 0, "", "f")], ["f {}", "f {}"]),
        # Old vLLM: another id in every piece; some repeat the name.
        ([piece("", 0, "1", "f"), piece('{"a"', 0, "2"), piece(":1}", 0, "3")], ["1 f {'a':1}"]),
        ([piece("", 0, "1", "f"), piece('{"a"', 0, "1", "f"), piece(":1}", 0, None, "f")], ["1 f {'a':1}"]),
        # The name, or the id, comes after the first piece.
        ([piece('{"a"', 0, "1"), piece(":1}", 0, None, "f")], ["1 f {'a':1}"]),
        ([piece('{"a":1}', 0), piece("{}", 1, "2", "f")], ["{'a':1}", "2 f {}"]),
        # No arguments, arguments as an object, arguments that are no JSON.
        ([piece(None, 0, "1", "f")], ["1 f {}"]),
        ([piece({"a": 1}, 0, "1", "f")], ["1 f {'a':1}"]),
        ([piece("a}", 0, "1", "f"), piece("{}", 1, "2", "f")], ["1 f a}", "2 f {}"]),
        ([piece("[{}", 0, "1", "f"), piece("{}", 1, "2", "f"), piece("]", 0)], ["1 f [{}]", "2 f {}"]),
        # A custom tool whose wrapper the model forgot.
        ([piece("*** Begin", 0, "1", "patch"), piece(" Patch", 0)], ["1 patch *** Begin Patch"]),
        ([piece('{"input":"a"}', 0, "1", "patch"), piece('{"input":"b"}', 1, "2", "n__x")], ["1 patch a", "2 n/x b"]),
        # A tool that was never declared.
        ([piece("{}", 0, "1", "made_up")], ["1 made_up {}"]),
        # Before there were tool calls; and Snowflake's empty one.
        ([chunk({"function_call": {"name": "f"}}), chunk({"function_call": {"arguments": "{}"}})], ["f {}"]),
        ([chunk({"function_call": {"name": "", "arguments": ""}, "tool_calls": None})], []),
        ([piece("{}", 0, "1", "f"), chunk({"function_call": None})], ["1 f {}"]),
        # More for a call that is whole and closed.
        ([piece("{}", 0, "1", "f"), said("so"), piece("\n", 0)], ["1 f {}", "so"]),
    ],
)
def test_calls(chunks: list[Json], expected: list[str]) -> None:
    items = response_of(read(*chunks, CALLS))["output"]
    assert [_call(item) for item in items] == expected


def _call(item: Json) -> str:
    kind, text = brief([item])[0]
    call_id = item.get("call_id") or ""
    return f"{call_id} {text}".strip().replace('"', "'") if kind != "message" else text


def test_a_waiting_call_is_told_as_soon_as_the_one_before_is_whole() -> None:
    reader = ChatReader(tools())
    assert reader.feed(piece('{"a"', 0, "1", "f"))[1:] == [Text(0, '{"a"')]
    assert reader.feed(piece("{}", 1, "2", "f")) == []
    [rest, close, opened, text] = reader.feed(piece(":1}", 0))
    assert (rest, close, text) == (Text(0, ":1}"), Close(0), Text(1, "{}"))
    assert isinstance(opened, Open) and opened.item["call_id"] == "2"


# Endings


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("function_call", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_finish_reasons(reason: str, status: str, why: str | None) -> None:
    response = response_of(read(said("a"), chunk({}, reason), chunk({"content": ""}, reason)))
    assert response["status"] == status
    assert response["incomplete_details"] == ({"reason": why} if why else None)
    assert response["output"][0]["status"] == status


def test_an_unknown_finish_reason_is_a_failure() -> None:
    response = response_of(read(said("a"), chunk({}, "bored")))
    assert response["status"] == "failed"
    assert response["error"]["code"] == "upstream_invalid"
    assert "'bored'" in response["error"]["message"]


def test_what_an_incomplete_answer_cut_short_is_left_open() -> None:
    chunks = (piece('{"a"', 0, "1", "f"), piece("{}", 1, "2", "f"), piece('{"b', 2, "3", "f"), chunk({}, "length"))
    deltas = read(*chunks)
    assert [delta.index for delta in deltas if isinstance(delta, Open)] == [0, 1, 2]
    assert [delta.index for delta in deltas if isinstance(delta, Close)] == [1]
    assert response_of(read(piece('{"a"', 0, "1", "f"), chunk({}, "length")))["output"][0]["status"] == "incomplete"


def test_text_after_the_finish_reason_is_not_lost() -> None:
    assert output(said("a"), STOP, said("b"), said("c")) == [("message", "a"), ("message", "bc")]


@pytest.mark.parametrize("reason", [None, ""])
def test_a_stream_without_a_finish_reason_is_truncated(reason: str | None) -> None:
    with pytest.raises(UpstreamTruncated):
        read(said("a"), chunk({}, reason))


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, USAGE),
        ({"prompt_tokens": 3, "completion_tokens": 4.0, "prompt_tokens_details": None, "total_tokens": None}, USAGE),
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "total_tokens": 109,
                "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 1, "audio_tokens": None},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
            {
                "input_tokens": 3,
                "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 1},
                "output_tokens": 4,
                "output_tokens_details": {"reasoning_tokens": 5},
                "total_tokens": 109,
            },
        ),
        (
            {"prompt_tokens": 3, "completion_tokens": 4, "prompt_cache_hit_tokens": 1},
            {**USAGE, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0}},
        ),
        ({}, None),
        (None, None),
        ("many", None),
    ],
)
def test_usage(usage: Any, expected: Json | None) -> None:
    assert read(STOP, {"choices": [], "usage": usage})[-1] == Finish("completed", usage=expected)


def test_the_last_usage_counts_wherever_it_is() -> None:
    early = said("b") | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    late = {"x_groq": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}}
    assert read(said("a"), early, STOP | late, {"choices": [], "usage": None})[-1] == Finish("completed", usage=USAGE)
    assert read(said("a"), said("b") | late, STOP, {"choices": None})[-1] == Finish("completed", usage=USAGE)


# Failures


def test_an_error_in_the_stream() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    error = said("") | {"error": {"code": 400, "message": "Token limit reached"}, "usage": usage}
    response = response_of(read(said("a"), chunk({}, "length"), error, STOP))
    assert response["status"] == "failed"
    message = "The upstream reported an error (status 400): Token limit reached."
    assert response["error"] == {"code": "server_error", "message": message}
    assert response["usage"] == USAGE
    assert brief(response["output"]) == [("message", "a")]


def test_an_error_in_the_middle_of_text() -> None:
    assert read(said("a"), said("b") | {"error": "gone"}, STOP)[-1] == Finish(
        "failed", error={"code": "server_error", "message": "The upstream reported an error: gone."}
    )


def test_the_body_of_an_error_event() -> None:
    reader = ChatReader(tools())
    reader.feed(said("a"))
    [finish] = reader.fail({"message": "Slow down", "code": "rate_limit_exceeded"})
    assert isinstance(finish, Finish) and finish.error is not None
    assert finish.error["code"] == "rate_limit_exceeded"
    assert reader.feed(said("b")) == reader.end() == []


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "text",
        {"choices": {}},
        {"choices": [None]},
        {"choices": ["x"]},
        {"choices": [{"delta": "x"}]},
        said(7),
        chunk({"refusal": {"text": "n"}}),
        chunk({"content": ["x"]}),
        chunk({"tool_calls": {"index": 0}}),
        chunk({"tool_calls": [None]}),
        chunk({"tool_calls": [{"function": "f"}]}),
        chunk({"function_call": "f"}),
    ],
)
def test_what_is_no_chunk_is_refused(bad: Any) -> None:
    for before in ([], [said("a")]):
        with pytest.raises(UpstreamInvalid):
            read(*before, bad)


# Whole completions


def completion(message: Any, finish: Any = "stop", **fields: Any) -> Json:
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        **fields,
    }


def whole(body: Any) -> list[Delta]:
    return ChatReader(tools()).read_json(body)


def whole_call(id: str, name: str, arguments: str, **fields: Any) -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def test_a_whole_completion() -> None:
    message = {
        "role": "assistant",
        "reasoning": "why",
        "content": "so",
        "refusal": "",
        "annotations": [{"type": "url_citation", "url_citation": CITED}],
        "function_call": {"name": "", "arguments": ""},
        "tool_calls": [
            whole_call("", "f", "{}", index=0),
            whole_call("", "f", "", index=0),
            whole_call("3", "patch", '{"input":"p"}') | {"custom": {"input": "", "name": ""}},
        ],
    }
    deltas = whole(completion(message, "tool_calls", usage={"prompt_tokens": 3, "completion_tokens": 4}))
    response = response_of(deltas)
    assert brief(response["output"]) == [
        ("reasoning", "why"),
        ("message", "so"),
        ("call", "f {}"),
        ("call", "f {}"),
        ("custom", "patch p"),
    ]
    assert len(response["output"][1]["content"][0]["annotations"]) == 1
    assert response["usage"] == USAGE


@pytest.mark.parametrize("reason", [None, ""])
def test_a_whole_completion_without_a_reason_is_complete(reason: object) -> None:
    assert whole(completion({"content": None}, reason)) == [Finish("completed")]


def test_a_whole_completion_can_be_incomplete_or_failed() -> None:
    assert response_of(whole(completion({"content": "a"}, "length")))["status"] == "incomplete"
    assert response_of(whole(completion({"content": "a"}, "error")))["error"]["code"] == "upstream_invalid"
    assert response_of(whole({"error": {"message": "no"}}))["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    "body",
    ["text", None, [], {}, {"choices": []}, {"choices": [{}]}, completion(None), completion("x"), {"method": "POST"}],
)
def test_what_is_no_completion_is_refused(body: Any) -> None:
    with pytest.raises(UpstreamInvalid):
        whole(body)


# Anything at all

DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, st.sampled_from(["", "a", "b", None])),
    st.builds(lambda text: {"reasoning_content": text}, st.sampled_from(["", "r", None])),
    st.just({"refusal": "n"}),
    st.builds(
        lambda index, id, name, arguments: piece(arguments, index, id, name)["choices"][0]["delta"],
        st.none() | st.integers(0, 2),
        st.none() | st.sampled_from(["", "1", "2"]),
        st.none() | st.sampled_from(["f", "patch", "n__g"]),
        st.sampled_from(["", "{", "}", "{}", '"input":', '"x"', " "]),
    ),
)


@given(deltas=st.lists(DELTAS, max_size=12), reason=st.sampled_from(["stop", "tool_calls", "content_filter", "odd"]))
def test_any_chunks_make_a_legal_stream_that_loses_no_text(deltas: list[Json], reason: str) -> None:
    made = read(*(chunk(delta) for delta in deltas), chunk({}, reason))
    events = events_of(made, interleaved=reason in ("content_filter", "odd"))
    items = events[-1]["response"]["output"]
    parts = [part for item in items for part in item.get("content") or ()]
    for kind, field in (("output_text", "content"), ("refusal", "refusal"), ("reasoning_text", "reasoning_content")):
        got = [part.get("text") or part.get("refusal") for part in parts if part["type"] == kind]
        assert "".join(got) == "".join(delta.get(field) or "" for delta in deltas)
    pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    named = {piece["function"]["name"] for piece in pieces if piece["function"].get("name")}
    calls = {item["name"] for item in items if item["type"].endswith("_call")}
    assert len(calls - {""}) <= len(named) and bool(calls) == bool(pieces)
