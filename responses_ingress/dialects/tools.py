"""Tools for upstreams that know flat functions only, and the way back from a flat call.

Responses tools are functions, custom (freeform) tools and namespaces of both. A flat upstream gets one
function for each, and the calls it answers with come back as what the client declared.

What must stay true: a tool has one flat name, legal everywhere (`[A-Za-z0-9_-]`, 64 at most), no two
tools share one, and a call in the history gets the name its tool has, also when the tool is gone; the
same tools and history give the same names. Of a custom tool's input nothing is given out that a later
piece could prove wrong. Knows nothing of any upstream's request format.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple, TypeVar

import orjson

from responses_ingress.core.deltas import Item
from responses_ingress.errors import InvalidRequest

_T = TypeVar("_T")

_LONGEST = 64
_ILLEGAL = re.compile(r"[^A-Za-z0-9_-]")
_CALLABLE = ("function", "custom")
_CARRIERS = ("additional_tools", "tool_search_output")
"""Input items that bring tools along: codex's for its newest models, and what a tool search found."""


class Tool(NamedTuple):
    """What the client calls a tool."""

    kind: str
    name: str
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A tool as a flat upstream is offered it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """`name` is the flat name of the one tool that must be called; the mode is then "required"."""

    mode: Literal["auto", "none", "required"]
    name: str | None = None


class ToolMap:
    """Flat names, both ways. Grows by being asked: first the offered tools, then those of the history."""

    def __init__(self) -> None:
        self._flat: dict[Tool, str] = {}
        self._tools: dict[str, Tool] = {}

    def flat(self, tool: Tool) -> str:
        """The flat name of `tool`, now and ever after."""
        name = self._flat.get(tool)
        if name is None:
            name = next(name for name in _candidates(tool) if name not in self._tools)
            self._flat[tool] = name
            self._tools[name] = tool
        return name

    def tool(self, flat: str) -> Tool:
        """What was meant by a flat name. One that was never given out is a plain function's."""
        return self._tools.get(flat) or Tool("function", flat)

    def of_call(self, item: Item) -> str:
        """The flat name of the tool that a call in the history called."""
        kind = "custom" if item["type"] == "custom_tool_call" else "function"
        return self.flat(Tool(kind, _text(item.get("name")), _text(item.get("namespace")) or None))


def call_skeleton(tool: Tool, call_id: str) -> Item:
    """A call of `tool` as it begins, without an id."""
    item: Item = {"type": "custom_tool_call" if tool.kind == "custom" else "function_call", "status": "in_progress"}
    item |= {"call_id": call_id, "name": tool.name}
    if tool.namespace:
        item["namespace"] = tool.namespace
    item["input" if tool.kind == "custom" else "arguments"] = ""
    return item


def _candidates(tool: Tool) -> Iterable[str]:
    """The plain name where it is legal, then names with more and more of the tool's digest."""
    plain = f"{tool.namespace}__{tool.name}" if tool.namespace else tool.name
    legal = _ILLEGAL.sub("_", plain)
    if plain == legal and 0 < len(plain) <= _LONGEST:
        yield plain
    digest = sha256(orjson.dumps(list(tool))).hexdigest()
    yield from (f"{legal[: _LONGEST - 1 - size]}_{digest[:size]}" for size in range(8, _LONGEST, 8))


@dataclass(frozen=True, slots=True)
class Toolbox:
    """functions: what to offer. names: for the history and the way back. dropped: the types of the hosted
    tools left out, each once."""

    functions: Sequence[Function]
    choice: Choice
    names: ToolMap
    dropped: Sequence[str]


def toolbox(tools: Iterable[Mapping[str, Any]], items: Iterable[Item], choice: object) -> Toolbox:
    """The client's `tools`, those that its `items` bring along, and its `tool_choice`, for a flat upstream.

    Raises `InvalidRequest` for a choice that cannot be kept."""
    brought = [tool for item in items if item.get("type") in _CARRIERS for tool in _objects(item.get("tools"))]
    declared, dropped = _declared([*tools, *brought])
    names = ToolMap()
    # Tools outside of namespaces first: they keep their own names when a flattened one is the same.
    for tool in sorted(declared, key=lambda tool: tool.namespace is not None):
        names.flat(tool)
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        declared = _allowed(choice, declared)
        choice = choice.get("mode")
    made = _choice(choice, declared, names)
    functions = [_function(names.flat(tool), spec) for tool, spec in declared.items()]
    return Toolbox(functions, made, names, tuple(dropped))


def _declared(tools: Iterable[Mapping[str, Any]]) -> tuple[dict[Tool, Mapping[str, Any]], dict[str, None]]:
    """Every callable tool with its declaration (of two for one tool the later), and the types of the rest."""
    declared: dict[Tool, Mapping[str, Any]] = {}
    dropped: dict[str, None] = {}
    for given in tools:
        namespace = _text(given.get("name")) if given.get("type") == "namespace" else None
        for spec in _introduced(given) if namespace else [given]:
            kind = _text(spec.get("type"))
            if kind in _CALLABLE:
                declared[Tool(kind, _name(spec), namespace)] = spec
            else:
                dropped[kind] = None
    return declared, dropped


def _introduced(namespace: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tools of a namespace. The first carries the namespace's description, so that it is said once."""
    tools = _objects(namespace.get("tools"))
    about = _field(namespace, "description", str)
    if tools and about:
        about = f"About all tools of {namespace['name']}: {about}"
        tools[0] = {**tools[0], "description": _paragraphs(_field(tools[0], "description", str), about)}
    return tools


def _name(spec: Mapping[str, Any]) -> str:
    name = _text(spec.get("name"))
    if not name:
        raise InvalidRequest(f"A tool of type '{spec['type']}' needs a name.", param="tools")
    return name


def _function(name: str, spec: Mapping[str, Any]) -> Function:
    description = _field(spec, "description", str) or ""
    if spec["type"] == "custom":
        format = _field(spec, "format", dict) or {}
        return Function(name, _paragraphs(description, _rule(format)), _WRAPPER, strict=False)
    parameters = _field(spec, "parameters", dict) or {"type": "object", "properties": {}}
    return Function(name, description, parameters, strict=spec.get("strict") is True)


def _field(spec: Mapping[str, Any], name: str, kind: type[_T]) -> _T | None:
    value = spec.get(name)
    if value is None or isinstance(value, kind):
        return value
    raise InvalidRequest(f"The '{name}' of a tool is not of the type it must have.", param="tools")


_WRAPPER = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole input of the tool, as it is."}},
    "required": ["input"],
    "additionalProperties": False,
}


def _rule(format: Mapping[str, Any]) -> str:
    """How to call a tool that was declared as freeform. Needed because descriptions of freeform tools tell
    models not to use JSON (codex's apply_patch)."""
    rule = "Call this tool with one argument, `input`: a string that is the whole freeform input."
    if format.get("type") != "grammar":
        return rule
    return f"{rule} It must match this {format.get('syntax')} grammar:\n{format.get('definition')}"


def _paragraphs(*texts: str | None) -> str:
    return "\n\n".join(text for text in texts if text)


def _choice(choice: object, declared: Mapping[Tool, object], names: ToolMap) -> Choice:
    if isinstance(choice, Mapping):
        return Choice("required", names.flat(_named(choice, declared)))
    match choice:
        case None | "auto":
            return Choice("auto")
        case "none":
            return Choice("none")
        case "required" if declared:
            return Choice("required")
        case "required":
            raise _refused("A tool call is required, but this model is offered no tools.")
    raise _refused(f"Unknown tool choice '{choice}'.")


def _named(choice: Mapping[str, Any], declared: Mapping[Tool, object]) -> Tool:
    """The declared tool that a tool choice, or an entry of `allowed_tools`, names."""
    kind = _text(choice.get("type"))
    if kind not in _CALLABLE:
        raise _refused(f"The hosted tool '{kind}' cannot be forced: this model's backend does not have it.")
    tool = Tool(kind, _text(choice.get("name")), _text(choice.get("namespace")) or None)
    if tool not in declared:
        raise _refused(f"Tool choice '{tool.name}' not found in 'tools'.")
    return tool


def _allowed(choice: Mapping[str, Any], declared: Mapping[Tool, Mapping[str, Any]]) -> dict[Tool, Mapping[str, Any]]:
    """The declared tools that are allowed: a hard limit, so the others are not offered at all."""
    allowed: set[Tool] = set()
    for entry in _objects(choice.get("tools")):
        if entry.get("type") == "namespace":
            allowed.update(tool for tool in declared if tool.namespace == entry.get("name"))
        elif entry.get("type") in _CALLABLE:
            allowed.add(_named(entry, declared))
    return {tool: spec for tool, spec in declared.items() if tool in allowed}


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="tool_choice")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def wrapped(input: str) -> str:
    """The arguments that stand for a custom tool's input."""
    return orjson.dumps({"input": input}).decode()


_HEAD = re.compile(r'[ \t\n\r]*\{[ \t\n\r]*"input"[ \t\n\r]*:[ \t\n\r]*"')
_HEAD_WORD = '{"input":"'
_SPECIAL = re.compile(r'["\\]')
_UNIT = re.compile(r"\\u([0-9a-fA-F]{4})")
_LOW_UNIT = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_MAYBE_UNIT = re.compile(r"\\(u[0-9a-fA-F]{0,3})?\Z")
_MAYBE_LOW_UNIT = re.compile(r"(\\(u([dD]([c-fC-F][0-9a-fA-F]?)?)?)?)?\Z")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "\\": "\\", "/": "/"}


class Unwrapper:
    """A custom tool's input out of streamed arguments, `{"input": "…"}`, as it comes.

    Once the arguments begin like that, the input is that string, up to its closing quote or the end;
    whatever follows is not looked at. What is no JSON inside of it stays as it is (`\\d`, a bare line
    end): models write it. Arguments that begin otherwise are held back to the end.
    """

    def __init__(self) -> None:
        self._state: Literal["head", "string", "other", "done"] = "head"
        self._held = ""
        self._pieces: list[str] = []

    def feed(self, piece: str) -> str:
        """The text that `piece` makes certain."""
        if self._state == "string":
            return self._decode(self._held + piece)
        if self._state == "head":
            return self._begin(self._held + piece)
        if self._state == "other":
            self._pieces.append(piece)
        return ""

    def end(self) -> str:
        """The text that only the end makes certain."""
        held = "".join((*self._pieces, self._held))
        return "" if self._state in ("string", "done") else _best_guess(held)

    def _begin(self, text: str) -> str:
        head = _HEAD.match(text)
        if head:
            self._state = "string"
            return self._decode(text[head.end() :])
        self._held = text
        if not _HEAD_WORD.startswith("".join(text.split())):
            self._state, self._held, self._pieces = "other", "", [text]
        return ""

    def _decode(self, text: str) -> str:
        decoded, at = [], 0
        while special := _SPECIAL.search(text, at):
            decoded.append(text[at : special.start()])
            at = special.start()
            if text[at] == '"':
                self._state = "done"
                break
            character, size = _escape(text, at)
            if not size:
                break
            decoded.append(character)
            at += size
        else:
            decoded.append(text[at:])
            at = len(text)
        self._held = text[at:]
        return "".join(decoded)


def _escape(text: str, at: int) -> tuple[str, int]:
    """What the backslash at `at` begins, and its length: 0 as long as more must come to tell."""
    unit = _UNIT.match(text, at)
    if unit:
        return _character(text, at, int(unit[1], 16))
    if _MAYBE_UNIT.match(text, at):
        return "", 0
    kind = text[at + 1]
    return _ESCAPES.get(kind, "\\" + kind), 2


def _character(text: str, at: int, unit: int) -> tuple[str, int]:
    """A `\\uXXXX` escape, with its other half where it is the first one of a surrogate pair."""
    if not 0xD800 <= unit < 0xE000:
        return chr(unit), 6
    if unit < 0xDC00:
        low = _LOW_UNIT.match(text, at + 6)
        if low:
            return chr(0x10000 + ((unit - 0xD800) << 10) + int(low[1], 16) - 0xDC00), 12
        if _MAYBE_LOW_UNIT.match(text, at + 6):
            return "", 0
    return "\N{REPLACEMENT CHARACTER}", 6


def _best_guess(arguments: str) -> str:
    """The input of a model that did not keep to the wrapper: `input` among other keys, the only string
    there is, else all it wrote."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    if not isinstance(value, dict):
        return arguments
    if isinstance(value.get("input"), str):
        return str(value["input"])
    strings = [text for text in value.values() if isinstance(text, str)]
    return strings[0] if len(strings) == 1 else arguments
