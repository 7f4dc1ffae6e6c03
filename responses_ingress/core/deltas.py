"""What a backend says: the whole vocabulary between backends and the rest, and its journal form.

What must stay true: a delta about an item names it by output index; items are opaque JSON dicts;
`encode` and `decode` are inverse to each other. Knows nothing of events, sequence numbers or time.

The life of a response, as deltas:

    Accepted  ( Open  ( Part | Text | Note | Mark )*  Close )*  Remember?  Finish

Several items may be open side by side; each of them is a line of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Item = dict[str, Any]
"""One element of `input` or `output`, the raw JSON object it arrived as."""

Kind = Literal["output_text", "refusal", "reasoning_text", "summary_text"]
Status = Literal["completed", "incomplete", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The upstream took the request: 200 headers, or the harness turn began."""


@dataclass(frozen=True, slots=True)
class Open:
    """An item begins. `item` is its skeleton as clients see it in `output_item.added`. It has a type; the
    run gives it its id. What its streamed field already holds streams like the rest."""

    index: int
    item: Item


@dataclass(frozen=True, slots=True)
class Part:
    """A content or summary part of the item begins. `part` is its skeleton where the backend has one."""

    index: int
    kind: Kind
    part: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Text:
    """Text for the item's open part, or, where no part is open, for its streamed field (`arguments`,
    `input`, `code`). The only delta that comes by the thousand, and so the only one not frozen: a
    frozen dataclass costs three times as much to make."""

    index: int
    text: str
    logprobs: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """An annotation on the open output_text part."""

    index: int
    annotation: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mark:
    """An event without meaning for the output: a named phase of a hosted tool, or one we do not know.

    `event` is the full event type. `index` is None for an event about no item. `extra` holds its other
    fields (all but type, sequence_number, item_id, output_index)."""

    index: int | None
    event: str
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """The item ends. `item` is the final item where the backend has an authoritative one; its id is
    always replaced by the id the item was opened with."""

    index: int
    item: Item | None = None


@dataclass(frozen=True, slots=True)
class Remember:
    """Opaque backend memory: an upstream response id, a harness thread id."""

    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The response ends.

    reason: why it is incomplete (`max_output_tokens`, `content_filter`).
    error:  `{"code", "message"}` of a failed response.
    usage:  the Responses usage object, or None where the backend gave none.
    items:  final items by output index that the backend only gave now.
    echo:   fields of the response object that changed since it was created (`service_tier`, …).
    at:     unix time of the end; the run sets it.
    """

    status: Status
    reason: str | None = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] | None = None
    items: Mapping[int, Item] | None = None
    echo: Mapping[str, Any] | None = None
    at: int | None = None


Delta = Accepted | Open | Part | Text | Note | Mark | Close | Remember | Finish


def encode(deltas: Iterable[Delta]) -> bytes:
    """The journal form of `deltas`: a JSON array with one short array per delta, the first element being
    its tag. Text that follows text of the same item shares one array, so that a token costs three bytes
    more than itself; `decode` still gives back one delta for each."""
    rows: list[list[Any]] = []
    texts: list[str] = []
    index: int | None = None
    for delta in deltas:
        if type(delta) is Text and delta.logprobs is None:
            if delta.index != index:
                texts, index = [], delta.index
                rows.append(["t", index, texts])
            texts.append(delta.text)
        else:
            index = None
            rows.append(_row(delta))
    return orjson.dumps(rows)


def _row(delta: Delta) -> list[Any]:
    match delta:
        case Accepted():
            return ["a"]
        case Open(index, item):
            return ["o", index, item]
        case Part(index, kind, part):
            return ["p", index, kind, part]
        case Text(index, text, logprobs):
            return ["l", index, text, logprobs]
        case Note(index, annotation):
            return ["n", index, annotation]
        case Mark(about, event, extra):
            return ["m", about, event, extra]
        case Close(index, final):
            return ["c", index, final]
        case Remember(state):
            return ["r", state]
    # Pairs, because the keys of a JSON object are strings and these are numbers.
    items = None if delta.items is None else list(delta.items.items())
    return ["f", delta.status, delta.reason, delta.error, delta.usage, items, delta.echo, delta.at]


def decode(payload: bytes) -> list[Delta]:
    """The deltas that `encode` was given."""
    deltas: list[Delta] = []
    for tag, *fields in orjson.loads(payload):
        if tag == "t":
            index, texts = fields
            deltas += [Text(index, text) for text in texts]
        else:
            deltas.append(_MADE_BY[tag](*fields))
    return deltas


def _finish(status: Status, reason: str | None, error: Any, usage: Any, *rest: Any) -> Finish:
    items, echo, at = rest
    return Finish(status, reason, error, usage, None if items is None else dict(items), echo, at)


_MADE_BY: Mapping[str, Callable[..., Delta]] = {
    "a": Accepted,
    "o": Open,
    "p": Part,
    "l": Text,
    "n": Note,
    "m": Mark,
    "c": Close,
    "r": Remember,
    "f": _finish,
}
