"""What every stream of events must keep, whatever it tells. Measured on recorded OpenAI traffic.

`check_stream` takes the events as parsed JSON and raises AssertionError with a sentence on the first
thing that is wrong. It shares nothing with the code that makes events.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

CALLS = ("function_call", "custom_tool_call", "mcp_call", "code_interpreter_call")
TERMINAL = ("response.completed", "response.incomplete", "response.failed")

# Event prefix -> place of the part, or "" for a field of the item, and key of the whole text.
TEXTS = {
    "response.output_text": ("content", "text"),
    "response.refusal": ("content", "refusal"),
    "response.reasoning_text": ("content", "text"),
    "response.reasoning_summary_text": ("summary", "text"),
    "response.function_call_arguments": ("", "arguments"),
    "response.mcp_call_arguments": ("", "arguments"),
    "response.custom_tool_call_input": ("", "input"),
    "response.code_interpreter_call_code": ("", "code"),
}
PART_PLACES = {"response.content_part": "content", "response.reasoning_summary_part": "summary"}
STREAMED_FIELD = {
    "function_call": "arguments",
    "mcp_call": "arguments",
    "custom_tool_call": "input",
    "code_interpreter_call": "code",
}
PART_TEXT = {"output_text": "text", "refusal": "refusal", "reasoning_text": "text", "summary_text": "text"}


def check_stream(events: Sequence[Json], *, interleaved: bool = False, backfilled: bool = False) -> None:
    """`interleaved`: items may be open side by side. `backfilled`: items may be done in the final response
    only."""
    _check_frame(events)
    _check_numbers(events)
    items = _Items(interleaved)
    for event in events[:-1]:
        items.see(event)
    _check_ending(events[-1], items, backfilled)


def _check_frame(events: Sequence[Json]) -> None:
    names = [event["type"] for event in events]
    assert names and names[0] == "response.created", f"the first event is not response.created: {names[:1]}"
    created = events[0]["response"]
    assert created["output"] == [], "response.created has output"
    assert created.get("usage") is None, "response.created has usage"
    assert created["status"] in ("in_progress", "queued"), f"response.created has status {created['status']}"
    second = "response.queued" if created["status"] == "queued" else "response.in_progress"
    assert names[1:2] == [second], f"the second event is not {second}: {names[1:2]}"
    assert names.count("response.in_progress") == 1, "response.in_progress did not come exactly once"
    terminal = [name for name in names if name in TERMINAL]
    assert len(terminal) == 1 and names[-1] in TERMINAL, f"not one terminal event, at the end: {terminal}, {names[-1]}"
    ids = {event["response"]["id"] for event in events if "response" in event}
    assert len(ids) == 1, f"more than one response id: {ids}"


def _check_numbers(events: Sequence[Json]) -> None:
    for number, event in enumerate(events):
        got = event.get("sequence_number")
        assert got == number, f"{event['type']} has number {got}, not {number}"


def _check_ending(event: Json, items: "_Items", backfilled: bool) -> None:
    response = event["response"]
    status = response["status"]
    names = {"completed": "response.completed", "incomplete": "response.incomplete"}
    assert event["type"] == names.get(status, "response.failed"), f"{event['type']} with status {status}"
    if "completed_at" in response:
        assert (response["completed_at"] is not None) == (status == "completed"), f"completed_at when {status}"
    if status in ("completed", "incomplete"):
        assert response.get("usage") is not None, f"usage is null in a response that is {status}"
    assert (response["error"] is not None) == (status == "failed"), f"error is {response['error']} when {status}"
    details = response["incomplete_details"]
    assert (details is not None) == (status == "incomplete"), f"incomplete_details is {details} when {status}"
    _check_output(status, response["output"], items, backfilled)


def _check_output(status: str, output: Sequence[Json], items: "_Items", backfilled: bool) -> None:
    if status == "cancelled":
        assert output == [], "a cancelled response has output"
        return
    left = [index for index, item in enumerate(items.items) if item.final is None]
    if status == "incomplete":  # half a call must not be done: clients execute it
        left = [index for index in left if items.items[index].skeleton["type"] not in CALLS]
    if status != "failed" and not backfilled:
        assert not left, f"items {left} were added but never done"
        assert len(output) == len(items.items), f"{len(items.items)} items streamed, {len(output)} in the output"
    for index, streamed in enumerate(items.items):
        final = output[index] if index < len(output) else {}
        assert final.get("id") == streamed.skeleton["id"], f"item {index} is not in the output under its id"
        if streamed.final is not None:
            assert _plain(final) == _plain(streamed.final), f"item {index} of the output is not the item that was done"
        else:
            assert backfilled or final.get("status", "incomplete") == "incomplete", (
                f"item {index} was cut short as {final['status']}"
            )


def _plain(item: Json) -> Json:
    """Without what OpenAI encrypts anew in the final response."""
    return {key: value for key, value in item.items() if key != "encrypted_content"}


class _Run:
    def __init__(self, item: Json, place: str, field: str) -> None:
        self.item, self.place, self.field = item, place, field
        self.texts: list[str] = []
        self.notes: list[Any] = []
        self.sealed = False
        self.part_sealed = place == ""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def over(self) -> bool:
        return self.sealed and self.part_sealed


class _Line:
    def __init__(self, skeleton: Json) -> None:
        self.skeleton = skeleton
        self.final: Json | None = None
        self.runs: dict[tuple[str, int], _Run] = {}
        field = STREAMED_FIELD.get(skeleton["type"])
        if field:
            self.runs["", 0] = _Run(skeleton, "", field)

    def at(self, place: str) -> list[_Run]:
        return [run for (other, _), run in self.runs.items() if other == place]


class _Items:
    """Follows the items of a stream."""

    def __init__(self, interleaved: bool) -> None:
        self.items: list[_Line] = []
        self._interleaved = interleaved

    def see(self, event: Json) -> None:
        name = event["type"]
        prefix, _, end = name.rpartition(".")
        if name == "response.output_item.added":
            self._added(event)
        elif name == "response.output_item.done":
            self._done(event)
        elif prefix in PART_PLACES:
            self._part(event, PART_PLACES[prefix], end)
        elif prefix in TEXTS:
            self._text(event, *TEXTS[prefix], end)
        elif name == "response.output_text.annotation.added":
            self._note(event)
        elif "output_index" in event:
            self._open(event)

    def _added(self, event: Json) -> None:
        index, item = event["output_index"], event["item"]
        assert index == len(self.items), f"item {index} was added when {len(self.items)} was next"
        still = [number for number, line in enumerate(self.items) if line.final is None]
        assert self._interleaved or not still, f"item {index} was added while {still} were open"
        assert item.get("status", "in_progress") == "in_progress", f"item {index} was added with {item['status']}"
        for key in ("content", "summary", STREAMED_FIELD.get(item["type"], "id")):
            assert key == "id" or not item.get(key), f"item {index} was added with {key}"
        self.items.append(_Line(item))

    def _open(self, event: Json) -> _Line:
        index, name = event["output_index"], event["type"]
        assert index < len(self.items), f"{name} for item {index}, which was not added"
        line = self.items[index]
        assert line.final is None, f"{name} for item {index}, which is done"
        assert event.get("item_id") == line.skeleton["id"], f"{name} has item_id {event.get('item_id')}"
        return line

    def _run(self, event: Json, place: str) -> _Run:
        line, position = self._open(event), event[f"{place}_index"] if place else 0
        assert (place, position) in line.runs, f"{event['type']} for a part that was not added: {place} {position}"
        return line.runs[place, position]

    def _part(self, event: Json, place: str, end: str) -> None:
        part = event["part"]
        if end == "added":
            line, position = self._open(event), event[f"{place}_index"]
            assert position == len(line.at(place)), f"part {position} was added when {len(line.at(place))} was next"
            assert all(run.over for run in line.runs.values()), f"part {position} was added while another was open"
            field = PART_TEXT[part["type"]]
            assert part[field] == "", f"part {position} was added with text"
            line.runs[place, position] = _Run(line.skeleton, place, field)
            return
        run = self._run(event, place)
        assert run.sealed and not run.part_sealed, "a part was done before its text, or twice"
        assert part[run.field] == run.text, f"a part was done with {part[run.field]!r}, not {run.text!r}"
        assert part.get("annotations", []) == run.notes, "a part was done with other annotations than were added"
        run.part_sealed = True

    def _text(self, event: Json, place: str, field: str, end: str) -> None:
        run = self._run(event, place)
        assert not run.sealed, f"{event['type']} for text that is done"
        assert run.field == field, f"{event['type']} for a {run.field}"
        if end == "delta":
            run.texts.append(event["delta"])
            return
        assert event[field] == run.text, f"{event['type']} says {event[field]!r}, the deltas {run.text!r}"
        run.sealed = True

    def _note(self, event: Json) -> None:
        run = self._run(event, "content")
        assert not run.sealed, "an annotation came after its text was done"
        index = event["annotation_index"]
        assert index == len(run.notes), f"annotation {index} was added when {len(run.notes)} was next"
        run.notes.append(event["annotation"])

    def _done(self, event: Json) -> None:
        index, item = event["output_index"], event["item"]
        line = self._open({**event, "item_id": item["id"]})
        assert item["type"] == line.skeleton["type"], f"item {index} changed its type"
        assert item.get("status") != "in_progress", f"item {index} was done in progress"
        assert all(run.over for run in line.runs.values()), f"item {index} was done while its text was open"
        for (place, position), text in _texts_of(item):
            run = line.runs.get((place, position))
            assert run is not None, f"item {index} was done with a {place} part that did not stream"
            assert text == run.text, f"item {index} was done with {text!r}, the deltas say {run.text!r}"
        for place, position in line.runs:
            assert not place or position < len(item.get(place) or ()), f"item {index} was done without a part"
        line.final = item


def _texts_of(item: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int], str]]:
    """What of an item must have streamed: where it is, and its text."""
    field = STREAMED_FIELD.get(item["type"])
    if field:
        yield ("", 0), item[field]
    for place in ("content", "summary"):
        for position, part in enumerate(item.get(place) or ()):
            if part["type"] in PART_TEXT:
                yield (place, position), part[PART_TEXT[part["type"]]]
