"""The builder: deltas in, numbered events and the response object out. The only place that makes events.

What must stay true:
- the same envelope and deltas give the same bytes; numbers rise from 0 without a gap;
- created is first, queued or in_progress second, exactly one terminal event comes and is the last;
- an illegal delta raises `IllegalDelta` and changes nothing;
- a text run is sealed (its `.done`, then its part's `.done`) by the next part, a phase or Close; the
  streamed field of an item is sealed exactly once, also when it got no delta;
- no `.done` ever leaves for an item that a failure or a cancel cut short, nor for a call that the end of
  an incomplete response cut short: codex executes every tool call whose `output_item.done` it saw.
It must not know where deltas come from, who reads the events, or what time it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from orjson import OPT_NON_STR_KEYS, Fragment, JSONEncodeError, dumps

from responses_ingress.core.channels import (
    ANNOTATION,
    FIELDS,
    PARTS,
    Channel,
    TextRun,
    is_event_type,
    seals,
    skeleton,
    takes,
)
from responses_ingress.core.deltas import (
    Accepted,
    Close,
    Delta,
    Finish,
    Item,
    Mark,
    Note,
    Open,
    Part,
    Remember,
    Text,
)
from responses_ingress.core.items import packed
from responses_ingress.errors import IllegalDelta

_TERMINAL = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    # There is no `response.cancelled` event; the status inside tells.
    "cancelled": "response.failed",
}

_OWN = frozenset(
    ["response.created", "response.queued", "response.in_progress", "error", ANNOTATION]
    + ["response.output_item.added", "response.output_item.done", *_TERMINAL.values()]
    + [channel.event + end for channel in (*PARTS.values(), *FIELDS.values()) for end in (".delta", ".done")]
    + [channel.part + end for channel in PARTS.values() for end in (".added", ".done")]
)
"""Event types that a Mark may not carry, because the builder makes them."""


class Event(NamedTuple):
    """`data` is the whole JSON of the event, its type and number included."""

    number: int
    type: str
    data: bytes


class _Line:
    """An item of the output: as it is so far, without the text run under way."""

    __slots__ = ("closed", "item")

    def __init__(self, item: Item, closed: bool = False) -> None:
        self.item = item
        self.closed = closed


class Builder:
    """Feed it deltas, take events. `envelope` is the response object as it was created.

    A silent one makes no events and only numbers them: for a response whose reader wants the whole.
    """

    def __init__(self, envelope: Mapping[str, Any], *, silent: bool = False) -> None:
        self.number = 0
        """The number of the next event."""
        self.memory: Mapping[str, Any] | None = None
        """What the backend last asked to have remembered."""
        self._silent = silent
        self._envelope = dict(envelope)
        self._opened = Fragment(b"")
        self._events: list[Event] = []
        self._lines: list[_Line] = []
        self._runs: dict[int, TextRun] = {}
        self._accepted = False
        self._final: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self._final is not None

    @property
    def has_said(self) -> bool:
        """Whether it has told more than that the response exists and has begun."""
        return self.number > (3 if self._envelope["status"] == "queued" else 2)

    @property
    def status(self) -> str:
        if self._final is not None:
            return str(self._final["status"])
        return "in_progress" if self._accepted else str(self._envelope["status"])

    @property
    def output(self) -> list[Item]:
        """The items so far, in output order; what is open is shown in progress. After a cancel, what was
        made until then, although the response shows none of it."""
        return [self._now(index, "in_progress") for index in range(len(self._lines))]

    def response(self) -> dict[str, Any]:
        """The response object as of now."""
        if self._final is not None:
            return dict(self._final)
        return {**self._envelope, "status": self.status, "output": self.output}

    def take(self) -> list[Event]:
        """The events made since the last call."""
        events, self._events = self._events, []
        return events

    def start(self) -> None:
        """Tell that the response exists. Once, before any delta."""
        if self.number:
            raise IllegalDelta("The response was started twice.")
        # Encoded once for the two or three events that show it: it holds the instructions and the tools.
        self._opened = Fragment(b"" if self._silent else packed(self._envelope))
        self._emit("response.created", {"response": self._opened})
        if self.status == "queued":
            self._emit("response.queued", {"response": self._opened})

    def feed(self, delta: Delta) -> None:
        try:
            if type(delta) is Text:
                self._text(delta)
            else:
                self._feed(delta)
        except JSONEncodeError as error:
            raise IllegalDelta("A delta holds something that JSON cannot say.") from error

    def _feed(self, delta: Delta) -> None:
        if self.ended or not self.number:
            raise IllegalDelta("A delta came before the start or after the end of the response.")
        # What cannot be encoded as deep as it will stand in the terminal event is refused before it can
        # change anything; else that response could never end.
        dumps({"response": {"output": [delta]}}, option=OPT_NON_STR_KEYS)
        _STEPS[type(delta)](self, delta)

    def _accept(self, delta: Accepted) -> None:
        self._begin()

    def _remember(self, delta: Remember) -> None:
        self.memory = delta.state

    def _text(self, delta: Text) -> None:
        run = self._runs.get(delta.index)
        if run is None:
            raise IllegalDelta(f"Text came for output index {delta.index}, where no text is open.")
        number, text = self.number, dumps(delta.text)
        tail = run.scored(delta.logprobs) if delta.logprobs else run.tail
        data = b"%b%d%b%b%b" % (run.head, number, run.middle, text, tail)
        run.texts.append(delta.text)
        if not self._silent:
            self._events.append(Event(number, run.type, data))
        self.number = number + 1

    def _open(self, delta: Open) -> None:
        index, item = delta.index, dict(delta.item)
        if index != len(self._lines):
            raise IllegalDelta(f"Item {index} was opened where {len(self._lines)} is next.")
        _identify(index, item)
        channel = FIELDS.get(item["type"])
        begun = _begun(index, item, channel) if channel else ""
        self._begin()
        self._emit("response.output_item.added", {"output_index": index, "item": item})
        self._lines.append(_Line(item))
        if channel:
            self._runs[index] = TextRun(channel, {"item_id": item["id"], "output_index": index}, None)
        if begun:
            self._text(Text(index, begun))

    def _part(self, delta: Part) -> None:
        index, channel = delta.index, PARTS.get(delta.kind)
        item = self._line(index).item
        if channel is None or not takes(item, delta.kind):
            raise IllegalDelta(f"Item {index}, a {item['type']}, cannot have a part of kind {delta.kind}.")
        self._seal(index)
        position = len(item.get(channel.place) or ())
        where = {"item_id": item["id"], "output_index": index, channel.position: position}
        part = dict(skeleton(delta.kind) if delta.part is None else delta.part)
        self._emit(channel.part + ".added", {**where, "part": part})
        if delta.kind == "output_text":
            part["annotations"] = part.get("annotations") or []
        self._runs[index] = TextRun(channel, where, part)

    def _note(self, delta: Note) -> None:
        run = self._runs.get(delta.index)
        if run is None or run.part is None or run.logprobs is None:
            raise IllegalDelta(f"An annotation came for output index {delta.index}, where no output_text is open.")
        notes = run.part["annotations"]
        self._emit(ANNOTATION, {**run.where, "annotation_index": len(notes), "annotation": delta.annotation})
        run.part["annotations"] = [*notes, delta.annotation]

    def _mark(self, delta: Mark) -> None:
        index, extra = delta.index, delta.extra or {}
        if delta.event in _OWN or not is_event_type(delta.event):
            raise IllegalDelta(f"The event {delta.event!r} is not for a backend to make.")
        if index is None:
            self._begin()
            self._emit(delta.event, extra)
            return
        item = self._line(index).item
        if seals(delta.event, item):
            self._seal(index)
        self._emit(delta.event, {"output_index": index, "item_id": item["id"], **extra})

    def _close(self, delta: Close) -> None:
        index, item = delta.index, delta.item
        line = self._line(index)
        if item is not None:
            item = _same(index, line.item, item)
            if item.get("status") == "in_progress":
                item["status"] = "completed"
            self._complete(index, item)
        self._seal(index)
        self._end(index, item or self._now(index, "completed"))

    def _complete(self, index: int, item: Item) -> None:
        """Send what the final item has of its streamed field beyond what has streamed, so that clients
        that only read the stream get it too."""
        run = self._runs.get(index)
        if run is None or run.part is not None:
            return
        whole, begun = item.get(run.channel.field), "".join(run.texts)
        if isinstance(whole, str) and whole.startswith(begun) and whole != begun:
            self._text(Text(index, whole[len(begun) :]))

    def _finish(self, delta: Finish) -> None:
        backfill = self._backfill(delta.items or {})
        left = [index for index, line in enumerate(self._lines) if not line.closed and index not in backfill]
        if left and delta.status == "completed":
            raise IllegalDelta(f"The response was completed while items {left} were open.")
        if delta.status == "incomplete" and not delta.reason:
            raise IllegalDelta("The response ended incomplete without a reason.")
        if delta.status == "failed" and not delta.error:
            raise IllegalDelta("The response failed without an error.")
        self._begin()
        for index in left:
            if delta.status == "incomplete" and self._lines[index].item["type"] not in FIELDS:
                self._seal(index)
                self._end(index, self._now(index, "incomplete"))
            else:
                self._lines[index] = _Line(self._now(index, "incomplete"), closed=True)
        self._runs.clear()
        for index, item in backfill.items():
            self._lines[index : index + 1] = [_Line(item, closed=True)]
        self._final = self._ending(delta)
        self._emit(_TERMINAL[delta.status], {"response": self._final})

    def _backfill(self, items: Mapping[int, Item]) -> dict[int, Item]:
        """The items that come with the end only, in order."""
        known = len(self._lines)
        new = sorted(index for index in items if not 0 <= index < known)
        if new != list(range(known, known + len(new))):
            raise IllegalDelta(f"The final items {new} do not follow item {known - 1}.")
        return {
            index: _same(index, self._lines[index].item, item) if index < known else _identify(index, item)
            for index, item in sorted(items.items())
        }

    def _ending(self, delta: Finish) -> dict[str, Any]:
        """The final response object."""
        status, echo = delta.status, dict(delta.echo or {})
        if self._envelope.get("service_tier") == "auto":
            # Recorded: the tier is `auto` until the end and then the one that served it.
            echo.setdefault("service_tier", "default")
        return {
            **self._envelope,
            **echo,
            "status": status,
            "completed_at": delta.at if status == "completed" else None,
            "error": dict(delta.error) if status == "failed" and delta.error else None,
            "incomplete_details": {"reason": delta.reason} if status == "incomplete" else None,
            "output": [] if status == "cancelled" else self.output,
            "usage": _usage(delta.usage or {}) if delta.usage or status in ("completed", "incomplete") else None,
        }

    def _begin(self) -> None:
        if not self._accepted:
            self._accepted = True
            queued = self._envelope["status"] != "in_progress"
            opened = {**self._envelope, "status": "in_progress"} if queued else self._opened
            self._emit("response.in_progress", {"response": opened})

    def _line(self, index: int) -> _Line:
        """The open item at `index`."""
        line = self._lines[index] if 0 <= index < len(self._lines) else None
        if line is None or line.closed:
            raise IllegalDelta(f"No item is open at output index {index}.")
        return line

    def _now(self, index: int, status: str) -> Item:
        """The item with all text so far; `status` is what an open one shows, if it has a status."""
        line, run = self._lines[index], self._runs.get(index)
        if line.closed:
            return line.item
        item = dict(line.item)
        if run is not None:
            run.add_to(item)
        if "status" in item or (status == "incomplete" and item["type"] in FIELDS):
            item["status"] = status
        return item

    def _seal(self, index: int) -> None:
        run = self._runs.pop(index, None)
        if run is None:
            return
        self._emit(run.channel.event + ".done", run.done())
        if run.part is not None:
            self._emit(run.channel.part + ".done", {**run.where, "part": run.part_done()})
        run.add_to(self._lines[index].item)

    def _end(self, index: int, item: Item) -> None:
        self._emit("response.output_item.done", {"output_index": index, "item": item})
        self._lines[index] = _Line(item, closed=True)

    def _emit(self, type: str, fields: Mapping[str, Any]) -> None:
        if not self._silent:
            data = packed({"type": type, "sequence_number": self.number, **fields})
            self._events.append(Event(self.number, type, data))
        self.number += 1


_STEPS: Mapping[type[Delta], Callable[[Builder, Any], None]] = {
    Accepted: Builder._accept,
    Open: Builder._open,
    Part: Builder._part,
    Note: Builder._note,
    Mark: Builder._mark,
    Close: Builder._close,
    Remember: Builder._remember,
    Finish: Builder._finish,
}


def _identify(index: int, item: Item) -> Item:
    """`item`, if it can be an item at all: everything else in it is opaque."""
    if not isinstance(item.get("id"), str) or not isinstance(item.get("type"), str):
        raise IllegalDelta(f"Item {index} lacks an id or a type.")
    return item


def _same(index: int, opened: Item, final: Item) -> Item:
    """`final` as the end of `opened`: clients know it by the id it was opened with, and a call that is given no
    `call_id` by the one it was opened with."""
    if final.get("type") != opened["type"]:
        raise IllegalDelta(f"Item {index} was opened as {opened['type']} and ended as {final.get('type')}.")
    known = {"id": opened["id"]}
    if opened.get("call_id") and not final.get("call_id"):
        known["call_id"] = opened["call_id"]
    return {**final, **known}


def _begun(index: int, item: Item, channel: Channel) -> str:
    """Take out of `item` what its streamed field already holds: it streams like the rest."""
    begun = item.get(channel.field)
    if not begun:
        return ""
    if not isinstance(begun, str):
        raise IllegalDelta(f"Item {index} has {channel.field} that are no text.")
    item[channel.field] = ""
    return begun


def _usage(given: Mapping[str, Any]) -> dict[str, Any]:
    """Usage in its one shape: codex falls into a retry storm on a partial usage object."""
    read, wrote = _count(given, "input_tokens"), _count(given, "output_tokens")
    return {
        "input_tokens": read,
        "input_tokens_details": {
            "cached_tokens": _count(given, "input_tokens_details", "cached_tokens"),
            "cache_write_tokens": _count(given, "input_tokens_details", "cache_write_tokens"),
        },
        "output_tokens": wrote,
        "output_tokens_details": {"reasoning_tokens": _count(given, "output_tokens_details", "reasoning_tokens")},
        "total_tokens": _count(given, "total_tokens") or read + wrote,
    }


def _count(given: Any, *path: str) -> int:
    for key in path:
        given = given.get(key) if isinstance(given, Mapping) else None
    return given if isinstance(given, int) else 0
