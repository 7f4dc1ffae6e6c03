"""Tool calls written as text, for models whose upstream has no tools: found in a stream, and taken out of it.

    <tool_call>
    {"name": "a tool's flat name", "arguments": {…}}
    </tool_call>

is the form: most open models were trained on it. What follows the opening tag is a call when it is one JSON
object that names a known tool, whether or not the closing tag follows (models forget it); so a closing tag
inside of a string ends nothing. Anything else stays text, and so do calls in `<think>` at the beginning.

What must stay true: how the text was cut into pieces changes nothing; what may be the beginning of a call is
held back until it is known; no call is made up; of a call that the answer's end cut short nothing is told,
neither as a call nor as text, whatever the upstream says of its message, and such an answer is not completed.
Once a model that has made a call goes on with a `<tool_response>`, it makes the tool's answer up, and nothing
further of its text is told, least of all a call. Knows nothing of any upstream.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from responses_ingress.core.deltas import Close, Delta, Finish, Item, Mark, Note, Open, Part, Text
from responses_ingress.core.replay import opening
from responses_ingress.dialects.emulation import CLOSING, OPENING, RESPONSE, TextCall, read_call
from responses_ingress.dialects.tools import Tool, call_skeleton
from responses_ingress.errors import IllegalDelta, UpstreamTruncated

_THINK, _THOUGHT = "<think>", "</think>"
_SLICE = 4096
_MOST_SPACE = 64
"""How much of a run of white space is held back: some models never stop making it."""
_QUOTE = re.compile(r'["\\]')
_SIGN = re.compile(r"[^\s,:0-9+\-.eEtrufalsn]")
"""In JSON, outside of strings: what opens or closes something, or cannot stand there."""


class CallParser:
    """Text in, text and calls out. White space around a call belongs to neither."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools
        self._step: Callable[[CallParser, str, list[str | TextCall]], str] = CallParser._begin
        self._held = ""
        self._pieces: list[str] = []
        self._object = _Object()
        self._tags: tuple[str, ...] = (OPENING,)

    def feed(self, text: str) -> list[str | TextCall]:
        """What `text` makes certain."""
        found: list[str | TextCall] = []
        # In slices, because each step copies what is left.
        for start in range(0, len(text), _SLICE):
            rest, self._held = self._held + text[start : start + _SLICE], ""
            while rest:
                rest = self._step(self, rest, found)
        return found

    @property
    def holds(self) -> bool:
        """Whether anything is held back."""
        return bool(self._held or self._pieces)

    @property
    def in_call(self) -> bool:
        """Whether a call has begun that is not whole: after its tag, the object has."""
        return self._step is CallParser._call

    def end(self) -> str:
        """What was held back and is text after all, as the text is whole. Where it is cut short, that is
        not to be told."""
        held, self._held, self._pieces = "".join((*self._pieces, self._held)), "", []
        return "" if self._step is CallParser._closing else held

    def _begin(self, rest: str, found: list[str | TextCall]) -> str:
        word = rest[_space(rest) :]
        if len(word) < len(_THINK) and _THINK.startswith(word):
            return self._hold(rest)
        self._step = CallParser._think if word.startswith(_THINK) else CallParser._text
        return rest

    def _think(self, rest: str, found: list[str | TextCall]) -> str:
        before, thought, after = rest.partition(_THOUGHT)
        if thought:
            found.append(before + thought)
            self._step = CallParser._text
            return after
        at = _maybe(rest, (_THOUGHT,))
        found.append(rest[:at])
        return self._hold(rest[at:])

    def _text(self, rest: str, found: list[str | TextCall]) -> str:
        at, tag = min(((rest.find(tag), tag) for tag in self._tags if tag in rest), default=(-1, ""))
        before = rest[: at if tag else _maybe(rest, self._tags)]
        at = max(len(before.rstrip()), len(before) - _MOST_SPACE)
        if at:
            found.append(rest[:at])
        if not tag:
            return self._hold(rest[at:])
        self._step = CallParser._head if tag == OPENING else CallParser._made_up
        return rest[at:]

    def _head(self, rest: str, found: list[str | TextCall]) -> str:
        tag = rest.index(OPENING) + len(OPENING)
        at = tag + _space(rest[tag:])
        if at == len(rest):
            return self._hold(rest)
        if rest[at] == "{":
            self._pieces, self._object, self._step = [rest[:at]], _Object(), CallParser._call
            return rest[at:]
        found.append(rest[:tag])
        self._step = CallParser._text
        return rest[tag:]

    def _call(self, rest: str, found: list[str | TextCall]) -> str:
        at, ended = self._object.end_in(rest)
        self._pieces.append(rest[:at])
        if not ended and at == len(rest):
            return ""
        (head, *pieces), self._pieces = self._pieces, []
        call = read_call("".join(pieces), self._tools) if ended else None
        if call is None:
            found.append("".join((head, *pieces)))
            self._step = CallParser._text
        else:
            found.append(call)
            self._step, self._tags = CallParser._closing, (OPENING, RESPONSE)
        return rest[at:]

    def _closing(self, rest: str, found: list[str | TextCall]) -> str:
        rest = rest.lstrip()
        if len(rest) < len(CLOSING) and CLOSING.startswith(rest):
            return self._hold(rest)
        self._step = CallParser._after
        return rest.removeprefix(CLOSING)

    def _after(self, rest: str, found: list[str | TextCall]) -> str:
        rest = rest.lstrip()
        if rest:
            self._step = CallParser._text
        return rest

    def _made_up(self, rest: str, found: list[str | TextCall]) -> str:
        return ""

    def _hold(self, rest: str) -> str:
        self._held = rest
        return ""


def _space(text: str) -> int:
    """How much white space `text` begins with, as far as that counts."""
    head = text[:_MOST_SPACE]
    return len(head) - len(head.lstrip())


def _maybe(text: str, tags: tuple[str, ...]) -> int:
    """Where the end of `text` may be the beginning of a tag; its length where it cannot."""
    at = text.rfind("<")
    return at if at >= 0 and any(tag.startswith(text[at:]) for tag in tags) else len(text)


class _Object:
    """Finds the end of a JSON object as it comes."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def end_in(self, text: str) -> tuple[int, bool]:
        """Where in `text` it ends, and True; or how far it goes in it, and False."""
        at = 1 if self._escaped else 0
        self._escaped = False
        while sign := (_QUOTE if self._quoted else _SIGN).search(text, at):
            at = sign.end()
            if sign[0] == '"':
                self._quoted = not self._quoted
            elif self._quoted:
                self._escaped = at == len(text)
                at += 1
            elif sign[0] in "{}[]":
                self._depth += 1 if sign[0] in "{[" else -1
                if not self._depth:
                    return at, True
            else:
                return sign.start(), False
        return len(text), False


@dataclass(slots=True)
class _Message:
    """A message of the upstream, which may become none, one or several of ours.

    index: where it is open on our side; None where it is not.
    part:  the upstream's open part; `told`: it is open on our side too.
    whole: nothing was taken out of it.
    """

    item: Item
    index: int | None = None
    part: Part | None = None
    told: bool = False
    parser: CallParser | None = None
    notes: list[Note] = field(default_factory=list)
    whole: bool = True


class TextCalls:
    """The deltas of an answer, with the calls that its messages hold as items of their own.

    A message is opened when there is text to tell. Logprobs of its text are left out, since text may be told
    in other pieces than it came in; annotations are, once a call was taken out of it, since they count
    characters."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools
        self._messages: dict[int, _Message] = {}
        self._indexes: dict[int, int] = {}
        """Output index of the upstream -> ours, for all that was passed on as it is."""
        self._theirs = 0
        self._ours = 0
        """The next output index, there and here."""
        self._waiting: dict[int, Close] = {}
        """Ends of messages whose last text may be half a call: what comes next tells whether it was cut short."""
        self._cut: list[int] = []
        """Messages of ours that the upstream has ended as incomplete."""

    def feed(self, delta: Delta) -> list[Delta]:
        match delta:
            case Open(index, item):
                return [*self._settle(), *self._open(index, item)]
            case Part() | Text() | Note() | Close() if delta.index in self._waiting:
                raise IllegalDelta(f"No item is open at output index {delta.index}.")
            case Part() | Text() | Note() | Close() if delta.index in self._messages:
                return self._in_message(self._messages[delta.index], delta)
            case Part() | Text() | Note() | Close():
                return [replace(delta, index=self._index(delta.index))]
            case Mark(int(index)):
                message = self._messages.get(index)
                ours = message.index if message else self._index(index)
                return [] if ours is None else [replace(delta, index=ours)]
            case Finish():
                return self._finish(delta)
        return [delta]

    def _index(self, index: int) -> int:
        if index not in self._indexes:
            raise IllegalDelta(f"No item is open at output index {index}.")
        return self._indexes[index]

    def _new(self) -> int:
        self._ours += 1
        return self._ours - 1

    def _open(self, index: int, item: Item) -> list[Delta]:
        if index != self._theirs:
            raise IllegalDelta(f"Item {index} was opened where {self._theirs} is next.")
        self._theirs += 1
        if item.get("type") == "message":
            self._messages[index] = _Message(item)
            return []
        self._indexes[index] = self._new()
        return [Open(self._indexes[index], item)]

    def _in_message(self, message: _Message, delta: Part | Text | Note | Close) -> list[Delta]:
        match delta:
            case Text(_, text):
                found = message.parser.feed(text) if message.parser else [text]
                return self._tell(message, found)
            case Part():
                rest = self._end_text(message)
                message.part, message.told = delta, False
                message.parser = CallParser(self._tools) if delta.kind == "output_text" else None
                return rest
            case Note():
                message.notes.append(delta)
                return self._shown(message) if message.told else []
        if message.parser and message.parser.holds and not _is_cut(delta):
            self._waiting[delta.index] = delta
            return []
        return self._close(delta, message)

    def _settle(self, cut: bool = False) -> list[Delta]:
        """The ends that waited. Those of an answer that was cut short are for its Finish."""
        deltas: list[Delta] = []
        waiting, self._waiting = self._waiting, {}
        for index, close in waiting.items():
            message = self._messages[index]
            deltas += self._end_text(message, cut=True) if cut else self._close(close, message)
        return deltas

    def _tell(self, message: _Message, found: Iterable[str | TextCall]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in found:
            if isinstance(piece, TextCall):
                deltas += self._called(message, piece)
            elif piece:
                deltas += self._shown(message)
                deltas.append(Text(self._at(message), piece))
        return deltas

    def _at(self, message: _Message) -> int:
        """The index of our message, which is a new one where none is open."""
        if message.index is None:
            message.index = self._new()
        return message.index

    def _shown(self, message: _Message) -> list[Delta]:
        """Our message and its part, opened if they are not, with the annotations that came for it."""
        deltas: list[Delta] = [] if message.index is not None else [Open(self._at(message), message.item)]
        at = self._at(message)
        if message.part and not message.told:
            deltas.append(replace(message.part, index=at))
            message.told = True
        if message.whole:
            deltas += [replace(note, index=at) for note in message.notes]
        message.notes = []
        return deltas

    def _called(self, message: _Message, call: TextCall) -> list[Delta]:
        """The call, with our message closed before it. The next one is another, with an id of its own."""
        closed: list[Delta] = [] if message.index is None else [Close(message.index)]
        message.index, message.told, message.whole = None, False, False
        message.item = {name: value for name, value in message.item.items() if name != "id"}
        index = self._new()
        text = [Text(index, call.text)] if call.text else []
        return [*closed, Open(index, call_skeleton(call.tool, "")), *text, Close(index)]

    def _end_text(self, message: _Message, cut: bool = False) -> list[Delta]:
        """The rest of the text that is under way."""
        if not cut and message.parser and message.parser.in_call:
            raise UpstreamTruncated("The upstream's answer broke off in the middle of a call.")
        rest = message.parser.end() if message.parser else ""
        message.parser = None
        if cut and rest:
            message.whole = False
            return []
        return self._tell(message, [rest])

    def _close(self, delta: Close, message: _Message) -> list[Delta]:
        cut = _is_cut(delta)
        deltas = self._end_text(message, cut)
        del self._messages[delta.index]
        if message.whole:
            deltas += self._shown(message)
            self._indexes[delta.index] = self._at(message)
            return [*deltas, Close(self._at(message), delta.item)]
        if message.index is None:
            return deltas
        if cut:
            self._cut.append(message.index)
            return deltas
        return [*deltas, Close(message.index)]

    def _finish(self, finish: Finish) -> list[Delta]:
        deltas = self._settle(cut=finish.status != "completed")
        items = dict(sorted((finish.items or {}).items()))
        new = [index for index in items if index >= self._theirs]
        for index in new:
            if items[index].get("type") == "message":
                self._theirs = index
                for delta in opening(index, items.pop(index)):
                    deltas += self.feed(delta)
        for index, message in list(self._messages.items()):
            if finish.status == "completed":
                deltas += self._close(Close(index, items.get(index)), message)
            else:
                deltas += self._end_text(message, cut=True)
        if finish.status == "completed":
            deltas += [Close(index) for index in self._cut]
        # Not those of messages that were not passed on as they are.
        last = {self._indexes[index]: item for index, item in items.items() if index in self._indexes}
        last |= {self._new(): items[index] for index in new if index in items}
        return [*deltas, replace(finish, items=last or None)]


def _is_cut(close: Close) -> bool:
    return close.item is not None and close.item.get("status") == "incomplete"
