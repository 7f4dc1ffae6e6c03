"""The items of an answer whose upstream does not keep them apart: text, reasoning and pieces of calls come
as they come, items leave one after another.

What must stay true: one item is open at a time; one that begins while a call is unfinished waits until
that call is whole; nothing that was put in is lost; what an incomplete answer may have cut short is left
open for its Finish. Knows nothing of any wire format.
"""

from typing import Any, Literal, NamedTuple

import orjson

from responses_ingress.core.deltas import Close, Delta, Item, Kind, Note, Open, Part, Text
from responses_ingress.dialects.tools import ToolMap, Unwrapper, call_skeleton


class Piece(NamedTuple):
    """Text for one item, as it came. `kind` is None for a call's arguments."""

    kind: Kind | None
    text: str
    logprobs: list[Any] | None = None


class Entry:
    """An item of the answer. It waits, is open at `index`, or is closed."""

    def __init__(self) -> None:
        self.state: Literal["waiting", "open", "closed"] = "waiting"
        self.index = -1
        self.waiting: list[Piece] = []

    def is_ready(self) -> bool:
        """Whether enough is known to open it."""
        return True

    def is_whole(self) -> bool:
        """Whether it may be closed when another item begins."""
        return True

    def skeleton(self) -> Item:
        raise NotImplementedError

    def deltas(self, piece: Piece) -> list[Delta]:
        raise NotImplementedError

    def rest(self) -> str:
        """What only the end of the item makes certain."""
        return ""


class Prose(Entry):
    """A message or a reasoning item."""

    def __init__(self, type: str) -> None:
        super().__init__()
        self.type = type
        self.part: Kind | None = None

    def skeleton(self) -> Item:
        if self.type == "message":
            return {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
        return {"type": "reasoning", "summary": [], "content": []}

    def deltas(self, piece: Piece) -> list[Delta]:
        text = Text(self.index, piece.text, piece.logprobs)
        if piece.kind is None or piece.kind == self.part:
            return [text]
        self.part = piece.kind
        return [Part(self.index, piece.kind), text]


class Call(Entry):
    """A call of a tool."""

    def __init__(self, tools: ToolMap) -> None:
        super().__init__()
        self.id = ""
        self.name = ""
        self._tools = tools
        self._arguments: list[str] = []
        self._unwrapper: Unwrapper | None = None

    def is_ready(self) -> bool:
        return bool(self.name)

    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object. Empty ones may still come, so they are not."""
        if not self._arguments or not self._arguments[-1].rstrip().endswith("}"):
            return False
        try:
            return isinstance(orjson.loads("".join(self._arguments)), dict)
        except orjson.JSONDecodeError:
            return False

    def skeleton(self) -> Item:
        tool = self._tools.tool(self.name)
        if tool.kind == "custom":
            self._unwrapper = Unwrapper()
        return call_skeleton(tool, self.id)

    def deltas(self, piece: Piece) -> list[Delta]:
        self._arguments.append(piece.text)
        text = self._unwrapper.feed(piece.text) if self._unwrapper else piece.text
        return [Text(self.index, text)] if text else []

    def rest(self) -> str:
        if self._unwrapper:
            return self._unwrapper.end()
        return "" if self._arguments else "{}"


class Calls:
    """Which call a piece belongs to. OpenAI tells by index, and gives id and name once."""

    def __init__(self, tools: ToolMap) -> None:
        self._tools = tools
        self._by_index: dict[int, Call] = {}
        self._by_id: dict[str, Call] = {}
        self._latest: Call | None = None

    def find(self, index: int | None, *, id: str, name: str, arguments: str) -> Call:
        """The call, which may be a new one."""
        call = self._known(index, id, name, arguments) or Call(self._tools)
        call.name = call.name or name
        call.id = call.id or id
        self._latest = call
        if index is not None:
            self._by_index[index] = call
        if id:
            self._by_id[id] = call
        return call

    def _known(self, index: int | None, id: str, name: str, arguments: str) -> Call | None:
        if index is None:
            # Servers without indexes: by id, and a name begins the next call.
            return self._by_id.get(id) or (None if name else self._latest)
        call = self._by_index.get(index)
        # Gemini gives every call index 0. A new id alone proves nothing: old vLLM makes one up for each piece.
        if call is not None and name and (id != call.id if id else arguments and call.is_whole()):
            return None
        return call


class Line:
    """The items of the answer in order. The first one that is not closed is open, the others wait."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._next = 0
        self._out: list[Delta] = []

    def take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def open_text(self) -> int | None:
        """The index of the message, if all that is open is its text."""
        if len(self._entries) == 1 and isinstance(head := self._entries[0], Prose) and head.part == "output_text":
            return head.index
        return None

    def say(self, piece: Piece) -> None:
        type = "reasoning" if piece.kind == "reasoning_text" else "message"
        last = self._entries[-1] if self._entries else None
        self.put(last if isinstance(last, Prose) and last.type == type else Prose(type), piece)

    def put(self, entry: Entry, piece: Piece) -> None:
        if entry.state == "waiting" and entry not in self._entries:
            self._entries.append(entry)
        if not piece.text:
            pass
        elif entry.state == "open":
            self._out += entry.deltas(piece)
        else:
            entry.waiting.append(piece)
        self._advance()

    def note(self, index: int, notes: list[dict[str, Any]]) -> None:
        self._out += [Note(index, note) for note in notes]

    def drain(self, everything: bool) -> None:
        """Nothing more is expected: open what waits and close it, but for what an incomplete answer may
        have cut short."""
        left = []
        for entry in self._entries:
            self._open(entry)
            if everything or (entry is not self._entries[-1] and entry.is_whole()):
                self._close(entry)
            else:
                left.append(entry)
        self._entries = left

    def _advance(self) -> None:
        while self._entries and self._entries[0].is_ready():
            head = self._entries[0]
            self._open(head)
            if len(self._entries) == 1 or not head.is_whole():
                return
            self._close(self._entries.pop(0))

    def _open(self, entry: Entry) -> None:
        if entry.state != "waiting":
            return
        entry.state, entry.index = "open", self._next
        self._next += 1
        self._out.append(Open(entry.index, entry.skeleton()))
        for piece in entry.waiting:
            self._out += entry.deltas(piece)

    def _close(self, entry: Entry) -> None:
        if rest := entry.rest():
            self._out.append(Text(entry.index, rest))
        self._out.append(Close(entry.index))
        entry.state = "closed"
