"""Deltas of a reader, played through the builder as a run would: ids for items, one ending."""

from collections.abc import Iterable
from typing import Any

import orjson

from responses_ingress.core.builder import Builder
from responses_ingress.core.deltas import Delta, Open
from tests.invariants import check_stream

Json = dict[str, Any]

ENVELOPE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "completed_at": None,
    "status": "in_progress",
    "model": "m",
    "output": [],
    "error": None,
    "incomplete_details": None,
    "usage": None,
}


def events_of(deltas: Iterable[Delta], *, interleaved: bool = False) -> list[Json]:
    """The events that `deltas` make, checked for what every stream must keep."""
    builder = Builder(ENVELOPE)
    builder.start()
    for delta in deltas:
        if isinstance(delta, Open):
            delta = Open(delta.index, {"id": f"item_{delta.index}", **delta.item})
        builder.feed(delta)
    events = [orjson.loads(event.data) for event in builder.take()]
    if events[-1]["type"] == "response.completed":
        # The run sets it when it ends.
        events[-1]["response"]["completed_at"] = 2
    check_stream(events, interleaved=interleaved)
    return events


def response_of(deltas: Iterable[Delta]) -> Json:
    """The response that `deltas` end in."""
    response: Json = events_of(deltas)[-1]["response"]
    return response


def brief(output: Iterable[Json]) -> list[tuple[str, str]]:
    """Each item's type and text: what a call carries behind its name, a refusal behind an exclamation mark."""
    return [_brief(item) for item in output]


def _brief(item: Json) -> tuple[str, str]:
    name = "/".join(part for part in (item.get("namespace"), item.get("name")) if part)
    match item["type"]:
        case "function_call":
            return "call", f"{name} {item['arguments']}"
        case "custom_tool_call":
            return "custom", f"{name} {item['input']}"
    parts = item["content"]
    return item["type"], "".join(part.get("text") or f"!{part['refusal']}" for part in parts)
