"""The text channels: where streamed text lives in an item, how the events about it are called, and a
run of text through one of them.

What must stay true: this table is the only place that knows these names; the builder writes by it,
readers of the Responses dialect read by it. Knows nothing of the order or the numbers of events.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from orjson import JSONDecodeError, dumps, loads

from responses_ingress.core.deltas import Item, Kind


class Channel(NamedTuple):
    """One way for text to stream.

    place: the item's list of parts that the text's part is in, or "" for text in a field of the item.
    field: the key, in the part or the item and in the `.done` event, that holds the whole text.
    event: prefix of the text's own events.
    part:  prefix of the events of its part, or "".
    """

    place: str
    field: str
    event: str
    part: str

    @property
    def position(self) -> str:
        """The key that says in events which part of the place is meant."""
        return f"{self.place}_index"


_CONTENT, _SUMMARY = "response.content_part", "response.reasoning_summary_part"

PARTS: Mapping[Kind, Channel] = {
    "output_text": Channel("content", "text", "response.output_text", _CONTENT),
    "refusal": Channel("content", "refusal", "response.refusal", _CONTENT),
    "reasoning_text": Channel("content", "text", "response.reasoning_text", _CONTENT),
    "summary_text": Channel("summary", "text", "response.reasoning_summary_text", _SUMMARY),
}
"""Part kind -> its channel."""

FIELDS: Mapping[str, Channel] = {
    "function_call": Channel("", "arguments", "response.function_call_arguments", ""),
    "mcp_call": Channel("", "arguments", "response.mcp_call_arguments", ""),
    "custom_tool_call": Channel("", "input", "response.custom_tool_call_input", ""),
    "code_interpreter_call": Channel("", "code", "response.code_interpreter_call_code", ""),
}
"""Item type -> the channel of its streamed field."""

PLACES = ("summary", "content")
"""The lists of parts an item can have, in the order in which they stream."""

ANNOTATION = "response.output_text.annotation.added"

_EVENT = re.compile(r"[\w.\-]{1,128}", re.ASCII)


def is_event_type(name: str) -> bool:
    """Whether an event may be called so: it stands in a line of its own on the wire, where a line end in it
    would begin another event."""
    return _EVENT.fullmatch(name) is not None


def skeleton(kind: Kind) -> dict[str, Any]:
    """A part before its first text, as recorded OpenAI traffic has it."""
    if kind == "output_text":
        return {"type": kind, "annotations": [], "logprobs": [], "text": ""}
    return {"type": kind, PARTS[kind].field: ""}


def kind_of(part: Any) -> Kind | None:
    """The kind of a part as it stands in an item, or None for one that cannot stream."""
    if not isinstance(part, dict):
        return None
    kind = next((kind for kind in PARTS if kind == part.get("type")), None)
    lists = all(isinstance(part.get(key) or [], list) for key in ("annotations", "logprobs"))
    return kind if kind and lists and isinstance(part.get(PARTS[kind].field) or "", str) else None


def parts_of(item: Item, place: str) -> Iterator[tuple[Kind, dict[str, Any]]]:
    """The parts at `place` in `item` that stream."""
    parts = item.get(place)
    for part in parts if isinstance(parts, list) and item["type"] not in FIELDS else ():
        kind = kind_of(part)
        if kind is not None and PARTS[kind].place == place:
            yield kind, part


def seals(event: str, item: Item) -> bool:
    """Whether `event` is a phase of `item` that ends its text. The first phase comes before the code or
    the arguments of a call, the others after them (recorded: thinking_with_code_execution_tool_stream,
    model_mcp_server_tool_stream)."""
    prefix, _, phase = event.rpartition(".")
    return prefix == f"response.{item['type']}" and phase != "in_progress"


def is_half_a_call(item: Item) -> bool:
    """Whether the item is a call that the end of the response cut short. It must never be told as done."""
    return item["type"] in FIELDS and item.get("status") == "incomplete"


def is_whole_call(item: Item) -> bool:
    """Whether nothing in the item itself says that it is half a call: arguments are one JSON object. Empty ones
    may still come, so they are not."""
    if FIELDS.get(item["type"]) is None or FIELDS[item["type"]].field != "arguments":
        return True
    try:
        return isinstance(loads(item.get("arguments") or ""), dict)
    except (JSONDecodeError, TypeError):
        return False


def may_be_half(item: Item, last: bool) -> bool:
    """Whether the item, in a response that was not completed, may be half a call. Where a custom tool's input ends,
    nothing in it tells."""
    cut = last and item["type"] == "custom_tool_call"
    return item["type"] in FIELDS and (cut or item.get("status") == "in_progress" or not is_whole_call(item))


def takes(item: Item, kind: Kind) -> bool:
    """Whether a part of this kind can stream in `item`."""
    return item["type"] not in FIELDS and isinstance(item.get(PARTS[kind].place) or [], list)


class TextRun:
    """A text run under way, in a part of an item or in a field of it."""

    __slots__ = ("channel", "head", "logprobs", "middle", "part", "tail", "texts", "type", "where")

    def __init__(self, channel: Channel, where: dict[str, Any], part: dict[str, Any] | None) -> None:
        self.channel = channel
        self.where = where
        self.part = part
        self.texts: list[str] = []
        self.logprobs: list[Any] | None = [] if channel is PARTS["output_text"] else None
        # A delta event is these bytes around its number and its text: a token costs no dict.
        self.type = channel.event + ".delta"
        self.head = b'{"type":"%b","sequence_number":' % self.type.encode()
        self.middle = b',%b,"delta":' % dumps(where)[1:-1]
        self.tail = b"}" if self.logprobs is None else b',"logprobs":[]}'

    def scored(self, logprobs: Sequence[Any]) -> bytes:
        """The end of a delta event with logprobs."""
        if self.logprobs is None:
            return self.tail
        tail = b',"logprobs":%b}' % dumps(logprobs)
        self.logprobs += logprobs
        return tail

    def done(self) -> dict[str, Any]:
        """The fields of the `.done` event."""
        fields = {**self.where, self.channel.field: "".join(self.texts)}
        return fields if self.logprobs is None else {**fields, "logprobs": self.logprobs}

    def part_done(self) -> dict[str, Any]:
        """The part as its `.done` event has it. Logprobs stay out of it and stand in the item only
        (recorded: instructions_with_responses_logprobs_streaming)."""
        return {**(self.part or {}), self.channel.field: "".join(self.texts)}

    def add_to(self, item: Item) -> None:
        """Put the text into `item`."""
        if self.part is None:
            item[self.channel.field] = "".join(self.texts)
            return
        part = self.part_done()
        if "logprobs" in part:
            part["logprobs"] = list(self.logprobs or ())
        item[self.channel.place] = [*(item.get(self.channel.place) or ()), part]
