"""Making a response again: from its journal, or, where that is gone, from its output.

What must stay true: `fold` gives the builder the response had when the journal was written; deltas made
from an output build exactly that output. Knows nothing of the store or of time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from responses_ingress.core.builder import Builder
from responses_ingress.core.channels import FIELDS, PARTS, PLACES, is_half_a_call, kind_of, parts_of, skeleton
from responses_ingress.core.deltas import (
    Accepted,
    Close,
    Delta,
    Finish,
    Item,
    Kind,
    Note,
    Open,
    Part,
    Status,
    Text,
    decode,
)

PORTION = 256
"""Deltas that are fed within a millisecond."""

_ENDINGS: tuple[Status, ...] = ("completed", "incomplete", "failed", "cancelled")


def fold(envelope: Mapping[str, Any], batches: Iterable[bytes], *, silent: bool = False) -> Builder:
    """A builder that has been fed a whole journal; a silent one has no events."""
    builder = Builder(envelope, silent=silent)
    for _ in folding(builder, batches):
        pass
    return builder


def folding(builder: Builder, batches: Iterable[bytes]) -> Iterator[None]:
    """Feed a whole journal to a new builder, with a stop after each portion: whoever has others to serve can."""
    builder.start()
    for number, delta in enumerate((delta for payload in batches for delta in decode(payload)), 1):
        builder.feed(delta)
        if number % PORTION == 0:
            yield


def deltas_of(output: Sequence[Item]) -> list[Delta]:
    """Deltas that stream `output`: each text in one piece, hosted items opened and closed."""
    return [delta for index, item in enumerate(output) for delta in (*opening(index, item), Close(index, item))]


def deltas_of_response(response: Mapping[str, Any]) -> list[Delta]:
    """Deltas that stream a whole ended response. What a failure cut short is not closed: a client must
    not act on it."""
    failed = response["status"] in ("failed", "cancelled")
    deltas: list[Delta] = [Accepted()]
    cut: dict[int, Item] = {}
    for index, item in enumerate(response["output"]):
        deltas += opening(index, item)
        if is_half_a_call(item) or (failed and item.get("status") in ("in_progress", "incomplete")):
            cut[index] = item
        else:
            deltas.append(Close(index, item))
    return [*deltas, replace(ending(response), items=cut or None)]


def ending(response: Mapping[str, Any]) -> Finish:
    """The end of an ended response, without its output."""
    status = ended_as(response)
    if status is None:
        raise ValueError("The response has not ended.")
    tier = response.get("service_tier")
    return Finish(
        status,
        reason=(response.get("incomplete_details") or {}).get("reason"),
        error=response.get("error"),
        usage=response.get("usage"),
        echo=None if tier is None else {"service_tier": tier},
        at=response.get("completed_at"),
    )


def ended_as(response: Mapping[str, Any]) -> Status | None:
    """How the response ended, or None while it has not."""
    return next((status for status in _ENDINGS if status == response.get("status")), None)


def opening(index: int, item: Item) -> list[Delta]:
    """Everything of `item` but its Close."""
    deltas: list[Delta] = [Open(index, bare(item))]
    channel = FIELDS.get(item["type"])
    text = item.get(channel.field) if channel else None
    if text and isinstance(text, str):
        deltas.append(Text(index, text))
    for place in PLACES:
        for kind, part in parts_of(item, place):
            deltas += part_deltas(index, kind, part)
    return deltas


def bare(item: Item) -> Item:
    """`item` as it is when it begins: its text not there yet, in progress."""
    begun = dict(item)
    channel = FIELDS.get(item["type"])
    if channel and channel.field in item:
        begun[channel.field] = ""
    for place in PLACES:
        parts = item.get(place)
        if isinstance(parts, list):
            begun[place] = [part for part in parts if kind_of(part) is None]
    if "status" in item:
        begun["status"] = "in_progress"
    return begun


def part_deltas(index: int, kind: Kind, part: Mapping[str, Any]) -> list[Delta]:
    """A whole part."""
    deltas: list[Delta] = [Part(index, kind, bare_part(kind, part))]
    text = part.get(PARTS[kind].field)
    if text:
        deltas.append(Text(index, text, part.get("logprobs") or None))
    return [*deltas, *(Note(index, annotation) for annotation in part.get("annotations") or ())]


def bare_part(kind: Kind, part: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`part` as it is when it begins, or None where that is the usual skeleton."""
    usual = skeleton(kind)
    begun = {key: usual.get(key, value) for key, value in part.items()}
    return None if begun == usual else begun
