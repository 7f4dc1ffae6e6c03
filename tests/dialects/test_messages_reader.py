"""Answers of the Messages API as deltas: streamed and whole, played through the builder."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.core.deltas import Close, Delta, Finish, Note, Open, Part, Text
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.messages import MessagesOptions, encode
from responses_ingress.dialects.messages_reader import MessagesReader
from responses_ingress.dialects.tools import Tool, ToolMap
from responses_ingress.errors import UpstreamError, UpstreamInvalid, UpstreamTruncated
from tests.dialects.play import brief, events_of, response_of

Json = dict[str, Any]

MESSAGE = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
REASONING = {"type": "reasoning", "summary": [], "content": []}
BEGIN = {"type": "message_start", "message": {"type": "message", "content": [], "usage": {"input_tokens": 3}}}
STOP = {"type": "message_stop"}
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


def start(block: Any, index: Any = 0) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(delta: Any, index: Any = 0) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def stop(index: Any = 0) -> Json:
    return {"type": "content_block_stop", "index": index}


def reason(reason: Any = "end_turn", **usage: Any) -> Json:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage or {"output_tokens": 4}}


def said(*texts: str, index: int = 0) -> list[Json]:
    pieces = [piece({"type": "text_delta", "text": text}, index) for text in texts]
    return [start({"type": "text", "text": ""}, index), *pieces, stop(index)]


def thinking(*texts: str, signature: str = "S", index: int = 0) -> list[Json]:
    pieces = [piece({"type": "thinking_delta", "thinking": text}, index) for text in texts]
    signed = [piece({"type": "signature_delta", "signature": signature}, index)] if signature else []
    return [start({"type": "thinking", "thinking": "", "signature": ""}, index), *pieces, *signed, stop(index)]


def call(*pieces: str, id: str = "toolu_1", name: str = "f", index: int = 0) -> list[Json]:
    block = {"type": "tool_use", "id": id, "name": name, "input": {}}
    deltas = [piece({"type": "input_json_delta", "partial_json": text}, index) for text in pieces]
    return [start(block, index), *deltas, stop(index)]


def read(*events: Any, summarized: bool = False) -> list[Delta]:
    reader = MessagesReader(tools(), "claude", summarized=summarized)
    deltas = [delta for event in events for delta in reader.feed(event)]
    deltas += reader.end()
    assert reader.ended and reader.feed(STOP) == reader.end() == []
    return deltas


def answer(*events: Any) -> list[Delta]:
    return read(BEGIN, *events, STOP)


def output(*events: Any) -> list[tuple[str, str]]:
    return brief(response_of(answer(*events))["output"])


# Text


def test_text() -> None:
    assert answer({"type": "ping"}, *said("Hel", "lo", ""), reason()) == [
        Open(0, MESSAGE),
        Part(0, "output_text"),
        Text(0, "Hel"),
        Text(0, "lo"),
        Close(0),
        Finish("completed", usage=USAGE),
    ]


def test_an_empty_answer_has_no_items() -> None:
    assert answer(reason()) == answer(*said(), *said("", index=1), reason()) == [Finish("completed", usage=USAGE)]


def test_text_that_stands_in_the_beginning_of_a_block() -> None:
    assert output(start({"type": "text", "text": "a"}), stop(), reason()) == [("message", "a")]


def test_texts_that_follow_each_other_are_one() -> None:
    assert output(*said("a", "b"), *said("c", index=1), reason()) == [("message", "abc")]


PAGE = {
    "type": "web_search_result_location",
    "url": "https://x",
    "title": "X",
    "cited_text": "c",
    "encrypted_index": "E",
}


def test_citations_come_when_what_they_are_about_is_known() -> None:
    """Recorded: they are told before the text they are about."""
    cited = [
        start({"type": "text", "text": "", "citations": []}, 1),
        piece({"type": "citations_delta", "citation": PAGE}, 1),
        piece({"type": "citations_delta", "citation": {**PAGE, "title": None}}, 1),
        piece({"type": "text_delta", "text": "sun"}, 1),
        piece({"type": "text_delta", "text": "ny"}, 1),
        stop(1),
    ]
    note = {"type": "url_citation", "start_index": 6, "end_index": 11, "url": "https://x", "title": "X"}
    made = answer(*said("It is "), *cited, *said(".", index=2), reason())
    assert made[2:8] == [
        Text(0, "It is "),
        Text(0, "sun"),
        Text(0, "ny"),
        Note(0, note),
        Note(0, {**note, "title": ""}),
        Text(0, "."),
    ]
    [item] = response_of(made)["output"]
    assert len(item["content"][0]["annotations"]) == 2


@pytest.mark.parametrize(
    ("citation", "note"),
    [
        ({"type": "char_location", "document_index": 0, "document_title": "a.pdf", "file_id": None}, None),
        (
            {"type": "page_location", "document_title": "a.pdf", "file_id": "file_1"},
            {"type": "file_citation", "file_id": "file_1", "filename": "a.pdf", "index": 1},
        ),
        (
            {"type": "page_location", "document_title": None, "file_id": "file_1"},
            {"type": "file_citation", "file_id": "file_1", "filename": "", "index": 1},
        ),
        ({}, None),
    ],
)
def test_citations_of_documents(citation: Json, note: Json | None) -> None:
    block = {"type": "text", "text": "a", "citations": [citation]}
    notes = [delta.annotation for delta in whole([block]) if isinstance(delta, Note)]
    assert notes == ([note] if note else [])


def test_citations_of_no_text_are_left_out() -> None:
    assert answer(start({"type": "text", "text": "", "citations": [PAGE]}), stop(), reason()) == [
        Finish("completed", usage=USAGE)
    ]


# Thinking


def sealed(block: Json) -> str:
    return f"claude:{orjson.dumps(block).decode()}"


@pytest.mark.parametrize(
    ("summarized", "kind", "place"), [(False, "reasoning_text", "content"), (True, "summary_text", "summary")]
)
def test_thinking_is_reasoning_with_its_signature(summarized: bool, kind: Any, place: str) -> None:
    block = {"type": "thinking", "thinking": "why not", "signature": "S"}
    made = read(*thinking("why ", "not"), *said("so", index=1), reason(), STOP, summarized=summarized)
    final = {**REASONING, place: [{"type": kind, "text": "why not"}], "encrypted_content": sealed(block)}
    assert made[:5] == [Open(0, REASONING), Part(0, kind), Text(0, "why "), Text(0, "not"), Close(0, final)]
    assert made[5] == Open(1, MESSAGE)
    assert response_of(made)["output"][0] == {**final, "id": "item_0"}


def test_thinking_that_is_not_shown_is_kept() -> None:
    block = {"type": "thinking", "thinking": "", "signature": "S"}
    assert answer(*thinking(), reason())[:2] == [
        Open(0, REASONING),
        Close(0, {**REASONING, "encrypted_content": sealed(block)}),
    ]


def test_redacted_thinking_is_kept() -> None:
    block = {"type": "redacted_thinking", "data": "D"}
    assert answer(start(block), stop(), *said("so", index=1), reason())[:2] == [
        Open(0, REASONING),
        Close(0, {**REASONING, "encrypted_content": sealed(block)}),
    ]


def test_thinking_without_a_signature_cannot_go_back() -> None:
    [item] = response_of(answer(*thinking("why", signature=""), reason("max_tokens")))["output"]
    assert brief([item]) == [("reasoning", "why")] and "encrypted_content" not in item


def test_thinking_survives_the_round_trip() -> None:
    redacted = {"type": "redacted_thinking", "data": "D"}
    events = [*thinking("why"), start(redacted, 1), stop(1), *call("{}", index=2), reason("tool_use")]
    items = response_of(answer(*events))["output"]
    for item in items:
        item.pop("content", None)  # codex drops it
    items.append({"type": "function_call_output", "call_id": "toolu_1", "output": "x"})
    made = encode(Turn("resp_2", "thread_1", "m", new=items), MessagesOptions(cache=False), "claude").body
    assert made["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "why", "signature": "S"},
        redacted,
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
    ]


# Calls


def test_a_call_in_pieces() -> None:
    skeleton = {"type": "function_call", "status": "in_progress", "call_id": "toolu_1", "name": "f", "arguments": ""}
    assert answer(*call("", '{"a"', ":1}"), reason("tool_use")) == [
        Open(0, skeleton),
        Text(0, '{"a"'),
        Text(0, ":1}"),
        Close(0),
        Finish("completed", usage=USAGE),
    ]


def test_a_custom_call_is_unwrapped_as_it_comes() -> None:
    made = answer(*call('{"in', 'put":"a\\', 'nb"', "}", name="n__x"), reason("tool_use"))
    assert [delta.text for delta in made if isinstance(delta, Text)] == ["a", "\nb"]
    assert brief(response_of(made)["output"]) == [("custom", "n/x a\nb")]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([*call("{}"), *call('{"a":1}', id="2", name="n__g", index=1)], [("call", "f {}"), ("call", 'n/g {"a":1}')]),
        ([*call(), *call(id="2", index=1)], [("call", "f {}"), ("call", "f {}")]),
        (
            [*said("a"), *call("{}", index=1), *said("b", index=2)],
            [("message", "a"), ("call", "f {}"), ("message", "b")],
        ),
        # What the model wrote, also where it is no JSON.
        ([*call('{"a"'), *call("[1]", id="2", index=1)], [("call", 'f {"a"'), ("call", "f [1]")]),
        ([*call("{}", name="made_up")], [("call", "made_up {}")]),
        # Servers that tell the whole input at once.
        ([start({"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}), stop()], [("call", 'f {"a":1}')]),
        (
            [start({"type": "tool_use", "id": "1", "name": "patch", "input": {"input": "p"}}), stop()],
            [("custom", "patch p")],
        ),
    ],
)
def test_calls(events: list[Json], expected: list[tuple[str, str]]) -> None:
    assert output(*events, reason("tool_use")) == expected


def test_a_whole_call_is_told_as_soon_as_it_is_whole() -> None:
    reader = MessagesReader(tools(), "claude")
    deltas = [delta for event in call('{"a":1}') for delta in reader.feed(event)]
    assert deltas[-1] == Close(0)


@pytest.mark.parametrize("events", [call('{"a"'), call(), call("")])
@pytest.mark.parametrize("why", ["max_tokens", "model_context_window_exceeded", "refusal"])
def test_a_call_that_the_end_cut_short_is_never_done(events: list[Json], why: str) -> None:
    """Its block ends like any other."""
    made = answer(*call("{}", id="1"), *[{**event, "index": 1} for event in events], reason(why))
    assert [delta.index for delta in made if isinstance(delta, Close)] == [0]
    assert [item["status"] for item in response_of(made)["output"]] == ["completed", "incomplete"]


def test_the_last_call_of_a_whole_message_that_is_incomplete_is_not_done() -> None:
    blocks = [{"type": "tool_use", "id": str(at), "name": "f", "input": {"a": 1}} for at in range(2)]
    items = response_of(whole(blocks, "max_tokens"))["output"]
    assert [(item["status"], item["arguments"]) for item in items] == [
        ("completed", '{"a":1}'),
        ("incomplete", '{"a":1}'),
    ]
    assert [item["status"] for item in response_of(whole(blocks))["output"]] == ["completed", "completed"]


# What is passed over


@pytest.mark.parametrize(
    "block",
    [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
        {"type": "mcp_tool_use", "id": "m", "name": "f", "input": {"a": 1}},
        {"type": "compaction", "content": None},
        {"type": "unheard_of"},
        {},
    ],
)
def test_blocks_of_other_kinds(block: Json) -> None:
    """Texts on both sides of one are not one."""
    others = [piece({"type": kind}, 1) for kind in ("input_json_delta", "compaction_delta", "text_delta", "odd")]
    events = [*said("a"), start(block, 1), *others, stop(1), *said("b", index=2)]
    assert output(*events, reason()) == [("message", "a"), ("message", "b")]


def test_events_of_other_kinds() -> None:
    events = [{"type": "ping"}, {"type": "odd"}, {}, {"type": ["x"]}, piece({"type": "odd_delta"})]
    assert output(said("a")[0], *events, *said("a")[1:], reason()) == [("message", "a")]


# Endings


@pytest.mark.parametrize(
    ("given", "status", "why"),
    [
        ("end_turn", "completed", None),
        ("stop_sequence", "completed", None),
        ("tool_use", "completed", None),
        ("pause_turn", "completed", None),
        ("max_tokens", "incomplete", "max_output_tokens"),
        ("model_context_window_exceeded", "incomplete", "max_output_tokens"),
        ("refusal", "incomplete", "content_filter"),
    ],
)
def test_stop_reasons(given: str, status: str, why: str | None) -> None:
    for made in (answer(*said("a"), reason(given)), whole([{"type": "text", "text": "a"}], given)):
        response = response_of(made)
        assert response["status"] == response["output"][0]["status"] == status
        assert response["incomplete_details"] == ({"reason": why} if why else None)


def test_an_unknown_stop_reason_is_a_failure() -> None:
    response = response_of(answer(*said("a"), reason("bored")))
    assert (response["status"], response["error"]["code"]) == ("failed", "upstream_invalid")
    assert "'bored'" in response["error"]["message"]


def test_an_answer_is_whole_with_its_stop_reason() -> None:
    assert brief(response_of(read(*said("a"), reason()))["output"]) == [("message", "a")]
    assert brief(response_of(read(*said("a")[:-1], reason()))["output"]) == [("message", "a")]


@pytest.mark.parametrize(
    "events",
    [
        [],
        said("a"),
        [*said("a"), reason(None)],
        [*said("a"), STOP],
        [*call('{"a"')[:-1], reason("tool_use")],
        [*call()[:-1], reason("tool_use"), STOP],
    ],
)
def test_what_broke_off_is_truncated(events: list[Json]) -> None:
    with pytest.raises(UpstreamTruncated):
        read(*events)


@pytest.mark.parametrize(
    ("usages", "expected"),
    [
        ([{}, {"input_tokens": 3, "output_tokens": 4}], USAGE),
        ([{"input_tokens": 3, "output_tokens": 1}, {"output_tokens": 4, "input_tokens": None}], USAGE),
        (
            [
                {"input_tokens": 9, "cache_read_input_tokens": 1, "cache_creation_input_tokens": 2},
                {"input_tokens": 3, "cache_read_input_tokens": 100, "output_tokens": 4}
                | {"output_tokens_details": {"thinking_tokens": 2}},
            ],
            {
                "input_tokens": 105,
                "input_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 2},
                "output_tokens": 4,
                "output_tokens_details": {"reasoning_tokens": 2},
                "total_tokens": 109,
            },
        ),
        ([None, "many"], None),
    ],
)
def test_usage(usages: list[Any], expected: Json | None) -> None:
    first = {"type": "message_start", "message": {"usage": usages[0]}}
    last = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usages[1]}
    assert read(first, last, STOP) == [Finish("completed", usage=expected)]


# Failures


@pytest.mark.parametrize(
    ("type", "code"),
    [
        ("overloaded_error", "server_is_overloaded"),
        ("rate_limit_error", "rate_limit_exceeded"),
        ("api_error", "server_error"),
        ("authentication_error", "upstream_refused"),
    ],
)
def test_an_error_in_the_stream(type: str, code: str) -> None:
    error = {"type": "error", "error": {"type": type, "message": "Oh"}}
    response = response_of(read(BEGIN, *call('{"a"')[:-1], error, reason()))
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert response["output"][0]["status"] == "incomplete"
    assert response_of(MessagesReader(tools(), "claude").read_json(error))["error"]["code"] == code


def test_the_body_of_an_error_event() -> None:
    reader = MessagesReader(tools(), "claude")
    [finish] = reader.fail({"message": "Slow down", "code": "rate_limit_exceeded"})
    assert isinstance(finish, Finish) and (finish.error or {})["code"] == "rate_limit_exceeded"
    assert reader.ended and reader.feed(reason()) == reader.end() == []


BAD: list[Any] = [
    None,
    [],
    "text",
    {"type": "message_start"},
    start(None),
    start({"type": "text", "text": 7}),
    start({"type": "text", "text": "", "citations": ["x"]}),
    start({"type": "redacted_thinking"}),
    start({"type": "tool_use", "name": "f"}),
    start({"type": "tool_use", "id": "1", "name": ""}),
    start({"type": "tool_use", "id": "1", "name": "f", "input": ["x"]}),
    piece({"type": "text_delta", "text": "x"}, 7),
    {"type": "content_block_delta", "index": 0},
    {"type": "message_delta"},
]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_event_is_refused(bad: Any) -> None:
    for before in ([], [BEGIN], [BEGIN, *said("a")], said("a")[:-1]):
        with pytest.raises(UpstreamInvalid):
            read(*before, bad)


@pytest.mark.parametrize(
    ("block", "delta"),
    [
        ("text", {"type": "thinking_delta", "thinking": "x"}),
        ("text", {"type": "input_json_delta", "partial_json": "x"}),
        ("thinking", {"type": "text_delta", "text": "x"}),
        ("text", {"type": "text_delta", "text": 7}),
        ("text", {"type": "citations_delta", "citation": None}),
    ],
)
def test_a_delta_that_does_not_fit_its_block_is_refused(block: str, delta: Json) -> None:
    with pytest.raises(UpstreamInvalid):
        read(start({"type": block}), piece(delta))


# Whole messages


def whole(content: Any, reason: Any = "end_turn", **fields: Any) -> list[Delta]:
    body = {"type": "message", "role": "assistant", "content": content, "stop_reason": reason, **fields}
    return MessagesReader(tools(), "claude").read_json(body)


def test_a_whole_message() -> None:
    blocks: list[Json] = [
        {"type": "thinking", "thinking": "why", "signature": "S"},
        {"type": "redacted_thinking", "data": "D"},
        {"type": "text", "text": "s"},
        {"type": "text", "text": "o", "citations": [PAGE]},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"a": 1}},
        {"type": "tool_use", "id": "1", "name": "f", "input": {}},
        {"type": "tool_use", "id": "2", "name": "n__x", "input": {"input": "p"}},
    ]
    response = response_of(whole(blocks, "tool_use", usage={"input_tokens": 3, "output_tokens": 4}))
    assert brief(response["output"]) == [
        ("reasoning", "why"),
        ("reasoning", ""),
        ("message", "so"),
        ("call", "f {}"),
        ("custom", "n/x p"),
    ]
    assert response["output"][2]["content"][0]["annotations"][0]["start_index"] == 1
    assert [item.get("encrypted_content") for item in response["output"][:2]] == [sealed(blocks[0]), sealed(blocks[1])]
    assert response["usage"] == USAGE


@pytest.mark.parametrize("reason", [None, ""])
def test_a_whole_message_without_a_reason_is_truncated(reason: object) -> None:
    for content in ([], [{"type": "text", "text": "so"}], [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]):
        with pytest.raises(UpstreamTruncated):
            whole(content, reason)


@pytest.mark.parametrize(
    "body", [None, [], "text", {}, {"input_tokens": 7}, {"content": "text"}, {"content": [None]}, {"choices": []}]
)
def test_what_is_no_message_is_refused(body: Any) -> None:
    with pytest.raises(UpstreamInvalid):
        MessagesReader(tools(), "claude").read_json(body)


# Anything at all

SCALARS: st.SearchStrategy[Any] = st.sampled_from([None, "", "a", "{", "}", '{"input":"x"}', 0, 1, {}, [], {"a": 1}])
TYPES = st.sampled_from(["text", "thinking", "redacted_thinking", "tool_use", "server_tool_use"])
KINDS = st.sampled_from(["text_delta", "thinking_delta", "signature_delta", "input_json_delta", "citations_delta"])
WORDS = ("text", "thinking", "signature", "data", "partial_json", "name", "input", "citations", "citation", "url")


def loose(types: st.SearchStrategy[str]) -> st.SearchStrategy[Json]:
    some = st.dictionaries(st.sampled_from(WORDS), SCALARS, max_size=4)
    return st.builds(lambda type, rest: {"id": "1", "name": "f", **rest, "type": type}, types, some)


INDEXES = st.integers(0, 1)
EVENTS = st.one_of(
    st.builds(start, loose(TYPES), INDEXES),
    st.builds(piece, loose(KINDS), INDEXES),
    st.builds(stop, INDEXES),
    st.builds(reason, st.sampled_from([None, "end_turn", "max_tokens", "odd"])),
    st.sampled_from([BEGIN, STOP, {"type": "error"}, {"type": "ping"}]),
    st.sampled_from([call("{}", name="n__x"), call('{"a"'), said("a"), thinking("b")]).flatmap(st.sampled_from),
)


@given(events=st.lists(EVENTS, max_size=14))
def test_any_events_make_a_legal_stream_or_an_error(events: list[Json]) -> None:
    reader = MessagesReader(tools(), "claude")
    deltas: list[Delta] = []
    try:
        for event in events:
            deltas += reader.feed(event)
        deltas += reader.end()
    except UpstreamError as error:
        deltas.append(Finish("failed", error=error.detail()))
    response = events_of(deltas)[-1]["response"]
    reasons = [event["delta"].get("stop_reason") for event in events if event["type"] == "message_delta"]
    if response["status"] == "completed":
        assert "end_turn" in reasons


BLOCKS = st.lists(
    st.one_of(
        st.builds(lambda *texts: ("text", texts), st.sampled_from(["", "a"]), st.sampled_from(["b", " "])),
        st.just(("thinking", ("x", "y"))),
        st.sampled_from([("tool_use", ('{"a"', ":1}")), ("tool_use", ("{}",)), ("tool_use", ())]),
        st.just(("server_tool_use", ())),
    ),
    max_size=6,
)


@given(blocks=BLOCKS, why=st.sampled_from(["end_turn", "max_tokens"]))
def test_nothing_that_was_said_is_lost(blocks: list[tuple[str, tuple[str, ...]]], why: str) -> None:
    makers: dict[str, Any] = {"text": said, "thinking": thinking, "tool_use": call}
    events: list[Json] = []
    for at, (kind, pieces) in enumerate(blocks):
        made = makers[kind](*pieces, index=at) if kind in makers else [start({"type": kind}, at), stop(at)]
        events += made
    items = response_of(answer(*events, reason(why)))["output"]
    for kind, type in (("text", "message"), ("thinking", "reasoning")):
        texts = [part["text"] for item in items if item["type"] == type for part in item["content"]]
        assert "".join(texts) == "".join("".join(pieces) for name, pieces in blocks if name == kind)
    calls = [item["arguments"] for item in items if item["type"] == "function_call"]
    wanted = ["".join(pieces) for name, pieces in blocks if name == "tool_use"]
    cut = why == "max_tokens" and blocks and blocks[-1] == ("tool_use", ())
    assert calls == [text or ("" if cut and at == len(wanted) - 1 else "{}") for at, text in enumerate(wanted)]
