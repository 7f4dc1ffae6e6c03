"""An item of a Responses provider's output, and how far it has been passed on.

What must stay true: of a text, a part or an annotation, nothing is passed on twice; nothing is passed on
after its item is closed; a call that does not look whole is not closed before the response is completed.
Knows nothing of the events that tell of the item.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from responses_ingress.core.channels import FIELDS, PARTS, PLACES, is_half_a_call, is_whole_call, parts_of, takes
from responses_ingress.core.deltas import Close, Delta, Item, Kind, Note, Part, Text
from responses_ingress.core.replay import opening, part_deltas
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated


class Slot:
    """An item of the provider's output, and how far it has been passed on."""

    __slots__ = ("closed", "half", "index", "item", "kind", "last", "notes", "parts", "position", "said", "sealed")

    def __init__(self, index: int, item: Item) -> None:
        self.index = index
        self.item = item
        self.closed = False
        self.half: Item | None = None
        """Its final form, if it is, or may be, half a call."""
        self.sealed = False
        """Its text is over."""
        self.kind: Kind | None = None
        """Kind and position (the provider's) of the open part."""
        self.position: int | None = None
        self.parts = dict.fromkeys(PLACES, 0)
        """How many parts were opened, and the highest position among them."""
        self.last = dict.fromkeys(PLACES, -1)
        self.said: list[str] = []
        """The text of the open part or field."""
        self.notes = 0

    def takes(self, kind: Kind) -> bool:
        return not self.closed and takes(self.item, kind)

    def text(self, text: str, logprobs: Sequence[Any] | None = None) -> Text:
        self.said.append(text)
        return Text(self.index, text, logprobs or None)

    def note(self, annotation: Any) -> Note:
        self.notes += 1
        return Note(self.index, annotation)

    def rest(self, whole: Any) -> list[Delta]:
        """What `whole` has beyond the text that was passed on."""
        said = "".join(self.said)
        if isinstance(whole, str) and whole != said and whole.startswith(said):
            return [self.text(whole[len(said) :])]
        return []

    def enter(self, kind: Kind, position: Any, part: Mapping[str, Any] | None = None) -> list[Delta] | None:
        """Make the part at `position` the open one; None if it lies behind."""
        place = PARTS[kind].place
        if not isinstance(position, int):
            position = self.position if kind == self.kind else self.last[place] + 1
        if kind == self.kind and position == self.position:
            return []
        if position <= self.last[place]:
            return None
        self.kind, self.position, self.said, self.notes = kind, position, [], 0
        self.last[place] = position
        self.parts[place] += 1
        return [Part(self.index, kind, part)]

    def part_rest(self, part: Mapping[str, Any]) -> list[Delta]:
        """What the whole of the open part has beyond what was passed on."""
        deltas = self.rest(part.get(PARTS[self.kind].field)) if self.kind else []
        missed = (part.get("annotations") or [])[self.notes :]
        return [*deltas, *(self.note(annotation) for annotation in missed)]

    def complete(self, item: Item) -> list[Delta]:
        """What the whole item has in its parts beyond what was passed on."""
        deltas: list[Delta] = []
        unseen: list[Delta] = []
        for place in PLACES:
            for count, (kind, part) in enumerate(parts_of(item, place), 1):
                if count > self.parts[place]:
                    unseen += part_deltas(self.index, kind, part)
                elif count == self.parts[place] and kind == self.kind:
                    deltas += self.part_rest(part)
        return deltas + unseen

    @property
    def over(self) -> bool:
        """Whether its final form is known."""
        return self.closed or self.half is not None

    def close(self, item: Item, completed: bool = False) -> list[Delta]:
        """The end of the item, as its final form says it. Half a call stays open: it is for the Finish. One whose
        arguments are no JSON object is held to be half until the response is `completed`: then it is the model
        that wrote them so."""
        deltas = self.complete(item)
        if is_half_a_call(item) or not (completed or is_whole_call(item)):
            self.half = self.same(item)
            return deltas if self.sealed else self.rest(item.get(FIELDS[item["type"]].field))
        self.item, self.closed, self.sealed, self.said = self.same(item), True, True, []
        return [*deltas, Close(self.index, self.item)]

    def seal(self) -> None:
        """A phase has ended its text."""
        self.sealed, self.kind, self.position = True, None, None

    def whole(self, item: Item, completed: bool = False) -> list[Delta]:
        """An item of which nothing was passed on; calls as in `close`."""
        if is_half_a_call(item) or not (completed or is_whole_call(item)):
            self.half, self.sealed = item, True
            return opening(self.index, item)
        self.closed = self.sealed = True
        return [*opening(self.index, item), Close(self.index, item)]

    def left(self) -> Close:
        """The end of an item which a completed response says nothing of. Raises `UpstreamTruncated` for a call that
        was not said to be whole, and does not look so."""
        said = "".join(self.said)
        channel = FIELDS.get(self.item["type"])
        if self.half is None and channel and said and not is_whole_call({**self.item, channel.field: said}):
            raise UpstreamTruncated("The upstream's response was completed in the middle of a call.")
        self.closed = True
        return Close(self.index, self.half)

    def same(self, item: Item) -> Item:
        """`item` under the id it is known by."""
        if item["type"] != self.item["type"]:
            raise UpstreamInvalid(f"The upstream turned a {self.item['type']} into a {item['type']}.")
        return {**item, "id": self.item["id"]}

    def streams(self, item: Item) -> bool:
        """Whether text of it streams, so that its end matters to clients that only read the stream."""
        return item["type"] in FIELDS or any(True for place in PLACES for _ in parts_of(item, place))
