"""A client on a raw socket that notes what it was shown, and when, until the connection is lost."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from tests.invariants import TERMINAL
from tests.wire import Wire, parse_events

Json = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """The events that came, each with the time when it did. `lost`: the connection broke before their end."""

    events: list[Json] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    status: int | None = None
    error: Json | None = None
    lost: bool = False

    @property
    def id(self) -> str | None:
        return self.events[0]["response"]["id"] if self.events else None

    @property
    def last(self) -> int:
        """The number of the last event; -1 before any."""
        return int(self.events[-1]["sequence_number"]) if self.events else -1

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1]["type"] in TERMINAL

    @property
    def items(self) -> list[Json]:
        """The items that were done."""
        return [event["item"] for event in self.events if event["type"] == "response.output_item.done"]

    def text(self, before: float = float("inf")) -> str:
        """The text that came before a time."""
        pairs = zip(self.events, self.times, strict=True)
        texts = [event["delta"] for event, at in pairs if event["type"].endswith("_text.delta") and at < before]
        return "".join(texts)

    def take(self, body: bytes) -> None:
        """Note what is new of a body so far."""
        whole = body[: body.rfind(b"\n\n") + 2]
        new = parse_events(whole)[len(self.events) :] if whole else []
        self.events += new
        self.times += [time.monotonic()] * len(new)


async def post(url: str, fields: Json, headers: Mapping[str, str] | None = None) -> Seen:
    """Create a response and follow its stream."""
    seen = Seen()
    try:
        async with Wire(url) as wire:
            await wire.start("POST", "/v1/responses", orjson.dumps({**fields, "stream": True}), headers)
            await _follow(wire, seen)
    except ConnectionError:
        seen.lost = True
    return seen


async def get(url: str, path: str) -> Any:
    """A JSON answer."""
    async with Wire(url) as wire:
        answer = await wire.request("GET", f"/v1/responses/{path}")
        assert answer.status == 200, answer
        return answer.json


async def resume(url: str, response_id: str, after: int = -1) -> Seen:
    """Follow a response from the event behind number `after` on."""
    seen = Seen()
    cursor = f"&starting_after={after}" if after >= 0 else ""
    try:
        async with Wire(url) as wire:
            await wire.start("GET", f"/v1/responses/{response_id}?stream=true{cursor}")
            await _follow(wire, seen)
    except ConnectionError:
        seen.lost = True
    return seen


async def _follow(wire: Wire, seen: Seen) -> None:
    await wire.read_headers()
    seen.status = wire.status
    if seen.status != 200:
        seen.error = (await wire.answer()).error
        return
    async for body in wire.pieces():
        seen.take(body)
