"""The reader of the Responses dialect: a provider's event stream, or its JSON answer, as deltas.

What must stay true: whatever the provider leaves out, repeats or renames, what comes out is a legal run
of deltas or an `UpstreamError`; whatever a final item holds beyond what has streamed is streamed before
the item is closed; nothing comes after a Finish. It must not know how bytes become events.

Faults it lives with (recorded from vLLM, OpenRouter, OpenAI with several MCP servers): an item or a part
that was never announced, ids that change between added and done, items that are done only in the final
response, a final response that lacks items, content that is null, no sequence numbers, other names for
the events of reasoning, an error without a type.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

from responses_ingress.core.channels import (
    ANNOTATION,
    FIELDS,
    PARTS,
    Channel,
    is_event_type,
    is_half_a_call,
    kind_of,
    may_be_half,
    seals,
)
from responses_ingress.core.deltas import Accepted, Delta, Finish, Item, Kind, Mark, Open
from responses_ingress.core.items import CALLS, sealed
from responses_ingress.core.replay import bare, bare_part, deltas_of_response, ended_as, ending
from responses_ingress.dialects.failures import in_band
from responses_ingress.dialects.slot import Slot
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated
from responses_ingress.ids import PREFIXES

_IGNORED = frozenset(["keepalive", "ping", "response.metadata"])
"""Events that are about the connection, or that make codex show a warning when they are passed on."""

_AT_THE_END = ("usage", "error", "incomplete_details", "completed_at")
"""Fields of a response that are null until it ends."""

_NOT_ECHOED = frozenset(["id", "object", "created_at", "status", "output", *_AT_THE_END])

_IMPLIED: Mapping[Kind, Item] = {
    "output_text": {"type": "message", "role": "assistant", "status": "in_progress", "content": []},
    "refusal": {"type": "message", "role": "assistant", "status": "in_progress", "content": []},
    "reasoning_text": {"type": "reasoning", "summary": [], "content": []},
    "summary_text": {"type": "reasoning", "summary": []},
}
"""The item that text belongs to when the provider did not announce one."""

_ALSO_CALLED = {
    "response.reasoning_text": ("response.reasoning", "reasoning"),
    "response.content_part": ("response.reasoning_part",),
}
"""Other names of events: vLLM's own for reasoning, and those of the Open Responses text."""


class ResponsesReader:
    """Feed it the events of one response, or give it a whole one. Encrypted content is sealed in the name
    of `backend`; without one it stays as it is."""

    def __init__(self, backend: str | None = None) -> None:
        self._backend = backend
        self.envelope: Mapping[str, Any] | None = None
        """The response object as the provider created it."""
        self._slots: list[Slot] = []
        self._by_id: dict[str, Slot] = {}
        self._by_index: dict[int, Slot] = {}
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the response has ended; whatever else comes is of no interest."""
        return self._ended

    finished = ended

    def feed(self, event: Any) -> list[Delta]:
        if self._ended:
            return []
        if not isinstance(event, dict):
            raise UpstreamInvalid("The upstream sent an event that is no object.")
        name = event.get("type")
        if not isinstance(name, str):
            if event.get("error"):
                return self._error(event)
            raise UpstreamInvalid("The upstream sent an event without a type.")
        step = _STEPS.get(name)
        return step(self, event) if step else self._mark(name, event)

    def end(self) -> list[Delta]:
        """The stream is over."""
        if not self._ended:
            raise UpstreamTruncated("The upstream's stream ended before its response did.")
        return []

    def read_json(self, response: Any) -> list[Delta]:
        """A whole answer."""
        if not isinstance(response, dict):
            raise UpstreamInvalid("The upstream answered with something that is no response.")
        status = ended_as(response)
        if status is None and not response.get("status") and response.get("error"):
            return self._error(response)
        if status is None:
            raise UpstreamTruncated("The upstream answered with a response that has not ended.")
        if status in ("completed", "incomplete") and not isinstance(response.get("output"), list):
            raise UpstreamInvalid("The upstream answered with a response without output.")
        self._see(response)
        self._ended = True
        return deltas_of_response(self._whole(response, status))

    # Lifecycle

    def _created(self, event: Mapping[str, Any]) -> list[Delta]:
        self._see(_object(event, "response"))
        return []

    def _in_progress(self, event: Mapping[str, Any]) -> list[Delta]:
        return [*self._created(event), Accepted()]

    def _error(self, event: Mapping[str, Any]) -> list[Delta]:
        self._ended = True
        # Nested on the wire, flat in the published schema.
        flat = {"code": event.get("code"), "message": event.get("message")}
        return [Finish("failed", error=_error_of(event.get("error") or flat))]

    def _end(self, event: Mapping[str, Any], status: str) -> list[Delta]:
        given = _object(event, "response")
        self._see(given)
        self._ended = True
        response = self._whole(given, ended_as(given) or status)
        deltas, items = self._last_items(response["output"], response["status"])
        if response["status"] == "completed":
            left = [slot for slot in self._slots if not slot.closed and slot.index not in items]
            halves = {slot.index: slot.half for slot in left if slot.half and is_half_a_call(slot.half)}
            deltas += [slot.left() for slot in left if slot.index not in halves]
            items |= halves
        return [*deltas, replace(ending(response), items=items or None, echo=self._echo(given))]

    def _last_items(self, output: Sequence[Item], status: str) -> tuple[list[Delta], dict[int, Item]]:
        """What the final output says beyond what was passed on: deltas for items whose text streams, and
        the other final items. Nothing that a failure cut short is closed here."""
        deltas: list[Delta] = []
        items: dict[int, Item] = {}
        failed, completed = status in ("failed", "cancelled"), status == "completed"
        for slot, item in self._pair(output):
            if slot is None:
                slot = self._slot(item, None)
                deltas += [] if failed else slot.whole(item, completed)
            elif not slot.closed and not failed and slot.streams(item):
                deltas += slot.close(item, completed)
            # Encrypted content is encrypted anew in the final response, and that is the one to keep.
            if not slot.closed or slot.same(item) != slot.item:
                items[slot.index] = slot.same(item)
        return deltas, items

    def _pair(self, output: Sequence[Item]) -> list[tuple[Slot | None, Item]]:
        """Each final item with its slot: by id, or as the next of its type, since ids may have changed."""
        named = {item["id"] for item in output}
        free = list(self._slots)
        pairs: list[tuple[Slot | None, Item]] = []
        for item in output:
            alike = [slot for slot in free if slot.item["type"] == item["type"]]
            same = [slot for slot in alike if slot.item["id"] == item["id"]]
            slot = next(iter(same or [slot for slot in alike if slot.item["id"] not in named]), None)
            free = [other for other in free if other is not slot]
            pairs.append((slot, item))
        return pairs

    def _see(self, response: Mapping[str, Any]) -> None:
        """Keep the first response object seen, as it was when nothing had happened yet."""
        if self.envelope is None:
            status = "queued" if response.get("status") == "queued" else "in_progress"
            blank = dict.fromkeys(key for key in _AT_THE_END if key in response)
            self.envelope = {**response, **blank, "status": status, "output": []}

    def _echo(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """What changed since the response was created; the tier is always told."""
        before = self.envelope or {}
        return {
            key: value
            for key, value in response.items()
            if key not in _NOT_ECHOED and (key == "service_tier" or key not in before or before[key] != value)
        }

    def _whole(self, response: Mapping[str, Any], status: str) -> dict[str, Any]:
        """`response` as one that ended with `status`, made sound."""
        output, at, error = response.get("output"), response.get("completed_at"), response.get("error")
        details = response.get("incomplete_details")
        details = details if isinstance(details, dict) and isinstance(details.get("reason"), str) else None
        if status == "incomplete" and not details:
            status, error = "failed", {"message": "The upstream's response is incomplete, without a reason."}
        items = [self._sound(*numbered) for numbered in enumerate(output if isinstance(output, list) else ())]
        return {
            **response,
            "status": status,
            "output": items if status == "completed" else self._cut(items),
            "error": _error_of(error) if status == "failed" else None,
            "incomplete_details": details,
            "completed_at": int(at) if isinstance(at, int | float) else None,
        }

    def _cut(self, items: Sequence[Item]) -> list[Item]:
        """The items of a response that was not completed: what may be half a call is one, unless told as done."""
        cut: list[Item] = []
        for number, item in enumerate(items, 1):
            slot = self._by_id.get(item["id"])
            half = may_be_half(item, number == len(items)) and not (slot and slot.closed)
            cut.append({**item, "status": "incomplete"} if half else item)
        return cut

    # Items

    def _slot(self, item: Item, position: Any) -> Slot:
        slot = Slot(len(self._slots), item)
        self._slots.append(slot)
        self._by_id[item["id"]] = slot
        if isinstance(position, int):
            self._by_index[position] = slot
        return slot

    def _find(self, event: Mapping[str, Any], id: Any = None) -> Slot | None:
        """The slot an event is about: by the item's id, or, where ids change under way, by its index."""
        id, index = id or event.get("item_id"), event.get("output_index")
        slot = self._by_id.get(id) if isinstance(id, str) else None
        return self._by_index.get(index) if slot is None and isinstance(index, int) else slot

    def _sound(self, index: int, item: Any) -> Item:
        """`item` with an id, and with lists where clients need lists."""
        if not isinstance(item, dict) or not isinstance(item.get("type"), str):
            raise UpstreamInvalid("The upstream sent an item without a type.")
        sound: Item = {**item}
        if not isinstance(item.get("id"), str) or not item["id"]:
            tail = str((self.envelope or {}).get("id", "")).rpartition("_")[2]
            sound["id"] = f"{PREFIXES.get(item['type'], 'item')}_{tail}{index:02x}"
        place = {"message": "content", "reasoning": "summary"}.get(item["type"])
        if place and not isinstance(sound.get(place), list):
            sound[place] = []
        if item["type"] in CALLS and not isinstance(item.get("call_id"), str):
            sound["call_id"] = ""  # which the run fills in
        if isinstance(sound.get("arguments"), dict) and item["type"] in FIELDS:
            sound["arguments"] = orjson.dumps(sound["arguments"]).decode()
        return sound if self._backend is None else sealed(self._backend, sound)

    def _added(self, event: Mapping[str, Any]) -> list[Delta]:
        item = self._sound(len(self._slots), event.get("item"))
        known = self._by_id.get(item["id"])
        if known is not None and not known.over:
            return []
        item = bare(item)
        return [Open(self._slot(item, event.get("output_index")).index, item)]

    def _done(self, event: Mapping[str, Any]) -> list[Delta]:
        given = event.get("item")
        slot = self._find(event, given.get("id") if isinstance(given, dict) else None)
        if slot is not None and slot.closed:
            return []
        item = self._sound(slot.index if slot else len(self._slots), given)
        if slot is not None:
            return slot.close(item)
        return self._slot(item, event.get("output_index")).whole(item)

    def _mark(self, name: str, event: Mapping[str, Any]) -> list[Delta]:
        if name in _IGNORED:
            return []
        if not is_event_type(name):
            raise UpstreamInvalid("The upstream sent an event whose type is no name.")
        about = "item_id" in event or "output_index" in event
        slot = self._find(event) if about else None
        if about and (slot is None or slot.closed):
            return []
        known = ("type", "sequence_number", "item_id", "output_index", "obfuscation")
        extra = {key: value for key, value in event.items() if key not in known} or None
        if slot is None:
            return [Mark(None, name, extra)]
        if seals(name, slot.item):
            slot.seal()
        return [Mark(slot.index, name, extra)]

    # Text

    def _part_slot(self, event: Mapping[str, Any], kind: Kind) -> tuple[list[Delta], Slot | None]:
        """The open item that a part event is about, opened if it was never announced."""
        slot = self._find(event)
        if slot is not None:
            return [], slot if slot.takes(kind) else None
        item = self._sound(len(self._slots), {"id": event.get("item_id"), **_IMPLIED[kind]})
        slot = self._slot(item, event.get("output_index"))
        return [Open(slot.index, item)], slot

    def _enter(
        self, event: Mapping[str, Any], kind: Kind, part: Mapping[str, Any] | None = None
    ) -> tuple[list[Delta], Slot | None]:
        """The same, with the part open that the event is about; no slot for one that is over."""
        deltas, slot = self._part_slot(event, kind)
        if slot is None:
            return deltas, None
        entered = slot.enter(kind, event.get(PARTS[kind].position), part)
        return (deltas, None) if entered is None else (deltas + entered, slot)

    def _part_added(self, event: Mapping[str, Any]) -> list[Delta]:
        part = _object(event, "part")
        kind = kind_of(part)
        return self._enter(event, kind, bare_part(kind, part))[0] if kind else []

    def _part_done(self, event: Mapping[str, Any]) -> list[Delta]:
        part = _object(event, "part")
        kind = kind_of(part)
        if kind is None:
            return []
        deltas, slot = self._enter(event, kind, bare_part(kind, part))
        return [*deltas, *slot.part_rest(part)] if slot else deltas

    def _part_delta(self, event: Mapping[str, Any], kind: Kind) -> list[Delta]:
        deltas, slot = self._enter(event, kind)
        logprobs = event.get("logprobs")
        text = _text(event)
        return [*deltas, slot.text(text, logprobs if isinstance(logprobs, list) else None)] if slot else deltas

    def _part_text(self, event: Mapping[str, Any], kind: Kind) -> list[Delta]:
        deltas, slot = self._enter(event, kind)
        return [*deltas, *slot.rest(event.get(PARTS[kind].field))] if slot else deltas

    def _annotation(self, event: Mapping[str, Any]) -> list[Delta]:
        deltas, slot = self._enter(event, "output_text")
        if slot is None:
            return deltas
        return [*deltas, slot.note(_object(event, "annotation"))]

    def _field_slot(self, event: Mapping[str, Any], channel: Channel) -> Slot | None:
        """The open call that a field event is about. One never announced has no name yet: it comes whole
        when it is done."""
        slot = self._find(event)
        known = slot is not None and not slot.sealed and FIELDS.get(slot.item["type"]) is channel
        return slot if known else None

    def _field_delta(self, event: Mapping[str, Any], channel: Channel) -> list[Delta]:
        slot = self._field_slot(event, channel)
        return [slot.text(_text(event))] if slot else []

    def _field_text(self, event: Mapping[str, Any], channel: Channel) -> list[Delta]:
        slot = self._field_slot(event, channel)
        return slot.rest(event.get(channel.field)) if slot else []


_Step = Callable[[ResponsesReader, Mapping[str, Any]], list[Delta]]


def _text_steps() -> Iterable[tuple[str, _Step]]:
    for kind, channel in PARTS.items():
        for event in (channel.event, *_ALSO_CALLED.get(channel.event, ())):
            yield f"{event}.delta", partial(ResponsesReader._part_delta, kind=kind)
            yield f"{event}.done", partial(ResponsesReader._part_text, kind=kind)
        for event in (channel.part, *_ALSO_CALLED.get(channel.part, ())):
            yield f"{event}.added", ResponsesReader._part_added
            yield f"{event}.done", ResponsesReader._part_done
    for channel in FIELDS.values():
        yield f"{channel.event}.delta", partial(ResponsesReader._field_delta, channel=channel)
        yield f"{channel.event}.done", partial(ResponsesReader._field_text, channel=channel)


_STEPS: Mapping[str, _Step] = {
    "response.created": ResponsesReader._created,
    "response.queued": ResponsesReader._created,
    "response.in_progress": ResponsesReader._in_progress,
    "response.output_item.added": ResponsesReader._added,
    "response.output_item.done": ResponsesReader._done,
    ANNOTATION: ResponsesReader._annotation,
    **dict(_text_steps()),
    "response.completed": partial(ResponsesReader._end, status="completed"),
    "response.incomplete": partial(ResponsesReader._end, status="incomplete"),
    "response.failed": partial(ResponsesReader._end, status="failed"),
    "response.cancelled": partial(ResponsesReader._end, status="cancelled"),
    "error": ResponsesReader._error,
}


def _object(event: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = event.get(key)
    if not isinstance(value, dict):
        raise UpstreamInvalid(f"The upstream sent {event.get('type')} without its {key}.")
    return value


def _text(event: Mapping[str, Any]) -> str:
    delta = event.get("delta")
    if not isinstance(delta, str):
        raise UpstreamInvalid(f"The upstream sent {event.get('type')} without text.")
    return delta


def _error_of(given: Any) -> dict[str, Any]:
    """An upstream's error as the `error` of a failed response: its own code, but where ours says more."""
    error = in_band(given)
    code, message = (given.get("code"), given.get("message")) if isinstance(given, dict) else (None, None)
    if error["code"] == "upstream_refused" or not isinstance(code, str) or not isinstance(message, str):
        return {**error}
    return {"code": code if error["code"] == "server_error" else error["code"], "message": message}
