"""Envelopes, items and runs of deltas that tests of the core, the dialects and the contract share."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from hypothesis import strategies as st

from responses_ingress.core.builder import Builder
from responses_ingress.core.channels import FIELDS, PARTS
from responses_ingress.core.deltas import (
    Accepted,
    Close,
    Delta,
    Finish,
    Item,
    Kind,
    Mark,
    Note,
    Open,
    Part,
    Remember,
    Status,
    Text,
)

Json = dict[str, Any]

ENVELOPE: Mapping[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1_760_000_000,
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "error": None,
    "frequency_penalty": 0.0,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": "test-model",
    "output": [],
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "auto",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": None,
    "user": None,
}
QUEUED = {**ENVELOPE, "status": "queued", "background": True}

USAGE = {
    "input_tokens": 11,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 2},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 18,
}
ERROR = {"code": "server_error", "message": "It broke."}
DONE = Finish("completed", usage=USAGE, at=1_760_000_009)


def message(id: str = "msg_1") -> Item:
    return {"id": id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}


def reasoning(id: str = "rs_1") -> Item:
    return {"id": id, "type": "reasoning", "summary": []}


def call(id: str = "fc_1") -> Item:
    head = {"id": id, "type": "function_call", "status": "in_progress"}
    return {**head, "name": "look", "call_id": "call_1", "arguments": ""}


def custom_call(id: str = "ctc_1") -> Item:
    head = {"id": id, "type": "custom_tool_call", "status": "in_progress"}
    return {**head, "name": "run", "call_id": "call_2", "input": ""}


def code_call(id: str = "ci_1") -> Item:
    head = {"id": id, "type": "code_interpreter_call", "status": "in_progress"}
    return {**head, "code": "", "container_id": "cntr_1", "outputs": None}


def mcp_call(id: str = "mcp_1") -> Item:
    head = {"id": id, "type": "mcp_call", "status": "in_progress", "name": "ask", "server_label": "wiki"}
    return {**head, "approval_request_id": None, "arguments": "", "error": None, "output": None}


def search_call(id: str = "ws_1") -> Item:
    return {"id": id, "type": "web_search_call", "status": "in_progress", "action": {"type": "search", "query": "x"}}


MAKERS = (message, reasoning, call, custom_call, code_call, mcp_call, search_call)


def text_item(text: str, id: str = "msg_1") -> Item:
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    return {**message(id), "status": "completed", "content": [part]}


def build(deltas: Iterable[Delta], envelope: Mapping[str, Any] = ENVELOPE) -> Builder:
    builder = Builder(envelope)
    builder.start()
    for delta in deltas:
        builder.feed(delta)
    return builder


def events_of(deltas: Iterable[Delta], envelope: Mapping[str, Any] = ENVELOPE) -> list[Json]:
    return parsed(build(deltas, envelope))


def parsed(builder: Builder) -> list[Json]:
    return [orjson.loads(event.data) for event in builder.take()]


# Characters that JSON, SSE or UTF-8 treat in a way of their own; all of Unicode takes long to set up.
texts = st.text('ab"\\\n\r\0é\u2028😀', max_size=6)
logprobs = st.none() | st.lists(
    st.fixed_dictionaries({"token": texts, "logprob": st.just(-0.5)}), min_size=1, max_size=2
)
annotations = st.fixed_dictionaries({"type": st.just("url_citation"), "url": texts})


class _Model:
    """What a legal backend knows while it speaks."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.open: dict[int, Kind | None] = {}
        """Open items, and the kind of their open part."""
        self.sealed: set[int] = set()


@st.composite
def legal_deltas(draw: st.DrawFn, side_by_side: bool = True) -> list[Delta]:
    """Any legal run of deltas, ended."""
    model = _Model()
    deltas: list[Delta] = [Accepted()] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 14))):
        deltas += draw(_step(model, side_by_side))
    return [*deltas, *draw(_ending(model))]


@st.composite
def _step(draw: st.DrawFn, model: _Model, side_by_side: bool) -> list[Delta]:
    if not model.open or (side_by_side and draw(st.integers(0, 4)) == 0):
        return draw(_opening(model))
    index = draw(st.sampled_from(sorted(model.open)))
    remember: list[Delta] = [Remember({"id": "u1"})]
    choices: list[st.SearchStrategy[list[Delta]]] = [_closing(model, index), _mark(model, index), st.just(remember)]
    if model.items[index]["type"] in ("message", "reasoning"):
        choices.append(_part(model, index))
    if _has_run(model, index):
        # Text outweighs the rest, as it does in life.
        choices += [_text(model, index)] * 4
    if model.open[index] == "output_text":
        choices.append(_note(index))
    return draw(st.one_of(choices))


def _has_run(model: _Model, index: int) -> bool:
    if model.items[index]["type"] in FIELDS:
        return index not in model.sealed
    return model.open[index] is not None


@st.composite
def _opening(draw: st.DrawFn, model: _Model) -> list[Delta]:
    index = len(model.items)
    item = draw(st.sampled_from(MAKERS))(f"item_{index}")
    model.items.append(item)
    model.open[index] = None
    begun: list[Delta] = [Text(index, '{"a":1}')] if item.get("arguments") == "" else []
    return [Open(index, item), *begun]


@st.composite
def _part(draw: st.DrawFn, model: _Model, index: int) -> list[Delta]:
    message_kinds: list[Kind] = ["output_text", "refusal"]
    reasoning_kinds: list[Kind] = ["summary_text", "reasoning_text"]
    kind = draw(st.sampled_from(message_kinds if model.items[index]["type"] == "message" else reasoning_kinds))
    model.open[index] = kind
    bare: Mapping[str, Any] | None = {"type": kind, PARTS[kind].field: "", "extra": True}
    return [Part(index, kind, bare if draw(st.booleans()) else None)]


@st.composite
def _text(draw: st.DrawFn, model: _Model, index: int) -> list[Delta]:
    scored = draw(logprobs) if model.open[index] == "output_text" else None
    # White space keeps arguments whole.
    arguments = "arguments" in model.items[index]
    return [Text(index, draw(st.sampled_from([" ", "\n", ""]) if arguments else texts), scored)]


@st.composite
def _note(draw: st.DrawFn, index: int) -> list[Delta]:
    return [Note(index, draw(annotations))]


@st.composite
def _mark(draw: st.DrawFn, model: _Model, index: int) -> list[Delta]:
    kind = model.items[index]["type"]
    own = draw(st.sampled_from([f"response.{kind}.in_progress", f"response.{kind}.completed", "response.odd.thing"]))
    if own.endswith("completed"):
        model.open[index] = None
        model.sealed.add(index)
    return [draw(st.sampled_from([Mark(index, own), Mark(index, own, {"why": 1}), Mark(None, "response.odd.thing")]))]


@st.composite
def _closing(draw: st.DrawFn, model: _Model, index: int) -> list[Delta]:
    del model.open[index]
    item = model.items[index]
    if item["type"] == "web_search_call" and draw(st.booleans()):
        return [Close(index, {**item, "id": "another", "status": "failed"})]
    return [Close(index)]


@st.composite
def _ending(draw: st.DrawFn, model: _Model) -> list[Delta]:
    statuses: list[Status] = ["completed", "incomplete", "failed", "cancelled"]
    status = draw(st.sampled_from(statuses))
    usage = draw(st.none() | st.just(USAGE) | st.just({"input_tokens": 4}))
    closes: list[Delta] = [Close(index) for index in sorted(model.open)] if status == "completed" else []
    reason = "max_output_tokens" if status == "incomplete" else None
    echo = draw(st.none() | st.just({"service_tier": "flex"}))
    error = ERROR if status == "failed" else None
    return [*closes, Finish(status, reason=reason, error=error, usage=usage, echo=echo, at=9)]


indexes = st.integers(-1, 3)
any_item = st.builds(lambda make, number: make(f"item_{number}"), st.sampled_from(MAKERS), st.integers(0, 3))
any_delta: st.SearchStrategy[Delta] = st.one_of(
    st.just(Accepted()),
    st.builds(Open, indexes, any_item),
    st.builds(Part, indexes, st.sampled_from(list(PARTS))),
    st.builds(Text, indexes, texts, logprobs),
    st.builds(Note, indexes, annotations),
    st.builds(
        Mark, st.none() | indexes, st.sampled_from(["response.function_call.completed", "error", "response.odd"])
    ),
    st.builds(Close, indexes, st.none() | st.just({"id": "x", "type": "of no kind"})),
    st.builds(Remember, st.just({"id": "u2"})),
    st.builds(
        Finish,
        st.sampled_from(["completed", "incomplete", "failed", "cancelled"]),
        reason=st.none() | st.just("content_filter"),
        error=st.none() | st.just(ERROR),
        items=st.none() | st.just({9: text_item("late")}) | st.just({-1: text_item("late")}),
        at=st.just(5),
    ),
)
