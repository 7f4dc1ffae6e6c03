"""A turn with tools as a turn without: for models whose upstream has no tools.

The tools are described in the instructions, earlier calls and outputs become texts of assistant and user, and
the choice of tools, the number of calls and the format of the answer are asked for in words. The way back is
`text_calls`, which reads calls in the form that is taught here.

What must stay true: the history says the same, in the same order, in messages that take turns where they did;
what a tool has put out cannot end its own block; the same turn gives the same text, so that an upstream can
keep what it has read. Knows nothing of any upstream but how those without tools refuse them.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from responses_ingress.core.deltas import Item
from responses_ingress.core.items import CALLS, OUTPUTS
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.tools import Function, Tool, Toolbox, ToolMap, Unwrapper, toolbox, wrapped
from responses_ingress.errors import IngressError, UpstreamError

OPENING, CLOSING = "<tool_call>", "</tool_call>"
RESPONSE = "<tool_response"
"""How a tool's output begins, where it is told as text."""


@dataclass(frozen=True, slots=True)
class Emulated:
    """turn: what to ask for. tools: by flat name those that its answer may call; none where none is offered.
    dropped: types of the hosted tools that were left out."""

    turn: Turn
    tools: Mapping[str, Tool]
    dropped: Sequence[str] = ()


_TOLD = frozenset({"tools", "tool_choice", "parallel_tool_calls", "max_tool_calls"})
"""Request fields about tools, which are told in words or not at all."""

_LEFT_OUT = frozenset({"additional_tools", "tool_search_call", "tool_search_output"})
"""Items that bring tools along, or looked for them. Their tools are among those described."""


def emulate(turn: Turn) -> Emulated | None:
    """`turn` without tools; None where it neither offers tools nor has called any, so that nothing changes.

    Hosted tools are left out. Raises `InvalidRequest` for a tool choice that cannot be kept."""
    items = turn.items
    box = toolbox(turn.tools, items, turn.tool_choice)
    offered = () if box.choice.mode == "none" else box.functions
    if not box.functions and not any(item.get("type") in CALLS | OUTPUTS for item in items):
        return None
    told = _Told(box.names, {str(item.get("call_id")): box.names.of_call(item) for item in items if _is_call(item)})
    parameters = {name: value for name, value in turn.parameters.items() if name not in _TOLD}
    lessons = [turn.instructions] if turn.instructions else []
    if offered:
        lessons += [_lesson(box, turn.parameters.get("parallel_tool_calls") is not False), *_format(parameters)]
    plain = replace(
        turn,
        instructions="\n\n".join(lessons) or None,
        context=told.messages(turn.context),
        new=told.messages(turn.new),
        tools=(),
        tool_choice="auto",
        parameters=parameters,
    )
    return Emulated(plain, {function.name: box.names.tool(function.name) for function in offered}, box.dropped)


def _is_call(item: Item) -> bool:
    return item.get("type") in CALLS


# What the model is told.

_HOW = f"""\
# Tools

You can call tools. These are all there are, one in a line, with JSON schemas of their arguments:

<tools>
{{tools}}
</tools>

To call one, write a block like this, with both tags and no code fence around it:

{OPENING}
{{{{"name": "<the tool's name>", "arguments": {{{{<its arguments>}}}}}}}}
{CLOSING}

Between the tags stands one JSON object and nothing else. In its strings, write quotes as \\", backslashes as \\\\
and line ends as \\n. {{number}} Then stop: you are given what the tools put out in {RESPONSE}> blocks. Never \
write such a block yourself. {{choice}}"""

_SEVERAL = "To make several calls, write several blocks, one after another."
_ONE = "Make no more than one call at a time."
_FREE = "Where no tool is needed, answer in plain text without any block."


def _lesson(box: Toolbox, parallel: bool) -> str:
    choice = _FREE
    if box.choice.name is not None:
        choice = f"Now you must call the tool {box.choice.name}."
    elif box.choice.mode == "required":
        choice = "Now you must call at least one tool."
    tools = "\n".join(map(_described, box.functions))
    return _HOW.format(tools=tools, number=_SEVERAL if parallel else _ONE, choice=choice)


def _described(function: Function) -> str:
    described = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return orjson.dumps({name: value for name, value in described.items() if value != ""}).decode()


def _format(parameters: dict[str, Any]) -> list[str]:
    """The format of the answer in words, taken out of `parameters`: there it would keep the model from writing
    anything else, calls too."""
    text = parameters.get("text") or {}
    format = text.get("format") or {}
    if format.get("type") not in ("json_object", "json_schema"):
        return []
    parameters["text"] = {name: value for name, value in text.items() if name != "format"}
    if format["type"] == "json_object":
        return ["An answer without a call must be one JSON object and nothing else."]
    schema = orjson.dumps(format.get("schema")).decode()
    return [f"An answer without a call must be JSON and nothing else, and match this schema:\n{schema}"]


# What has been called.


class _Told:
    """Items as messages. `called`: the flat name of the tool that each call called, by call id."""

    def __init__(self, names: ToolMap, called: Mapping[str, str]) -> None:
        self._names = names
        self._called = called

    def messages(self, items: Iterable[Item]) -> list[Item]:
        """Calls and outputs join the neighbours that have their role, since many chat templates take roles
        only in turns."""
        told: list[Item] = []
        ours = False
        for item in items:
            if item.get("type") in _LEFT_OUT:
                continue
            made = self._made(item)
            message = item if made is None else made
            if told and (ours or made is not None) and _role(told[-1]) == _role(message) is not None:
                told[-1] = _message(message["role"], [*_parts(told[-1]), *_parts(message)])
                ours = True
            else:
                told.append(message)
                ours = made is not None
        return told

    def _made(self, item: Item) -> Item | None:
        if _is_call(item):
            return _message("assistant", [_text("assistant", self._call(item))])
        if item.get("type") in OUTPUTS:
            return _message("user", self._output(item))
        return None

    def _call(self, item: Item) -> str:
        if item["type"] == "custom_tool_call":
            arguments = wrapped(item.get("input") or "")
        else:
            arguments = _json_object(item.get("arguments") or "{}")
        return f'{OPENING}\n{{"name": "{self._names.of_call(item)}", "arguments": {arguments}}}\n{CLOSING}'

    def _output(self, item: Item) -> list[dict[str, Any]]:
        """The output's text in a block, then its pictures and files."""
        output = item.get("output")
        parts = output if isinstance(output, list) else [{"type": "input_text", "text": output or ""}]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        # Else an output could end its block and go on as if it were the user.
        text = "\n".join(texts).replace("</tool_response", "<\\/tool_response")
        name = self._called.get(str(item.get("call_id")))
        head = f'{RESPONSE} name="{name}">' if name else f"{RESPONSE}>"
        block = _text("user", f"{head}\n{text}\n</tool_response>")
        return [block, *(part for part in parts if not isinstance(part.get("text"), str))]


def _json_object(arguments: str) -> str:
    """The arguments as they stand, or, where they are no object, as a string."""
    try:
        if isinstance(orjson.loads(arguments), dict):
            return arguments
    except orjson.JSONDecodeError:
        pass
    return orjson.dumps(arguments).decode()


def _role(item: Item) -> str | None:
    role = item.get("role") if (item.get("type") or "message") == "message" else None
    return role if role in ("assistant", "user") else None


def _message(role: str, content: list[Any]) -> Item:
    return {"type": "message", "role": role, "content": content}


def _parts(message: Item) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [_text(message["role"], content or "")]


def _text(role: str, text: str) -> dict[str, Any]:
    return {"type": "output_text" if role == "assistant" else "input_text", "text": text}


# What is a call.

_INPUT = re.compile(r'\s*\{\s*"input"\s*:\s*"')


class TextCall(NamedTuple):
    """A call as a text holds it. `text` is what goes into the item: a custom tool's input, else arguments."""

    tool: Tool
    text: str


_KEYS = frozenset({"name", "arguments", "parameters", "id", "type"})


def read_call(text: str, tools: Mapping[str, Tool]) -> TextCall | None:
    """The call that a JSON object is, if it is one. Bare line ends in strings and `parameters` for
    `arguments` are habits of weak models."""
    try:
        given = json.loads(text, strict=False)
        name = given.get("name")
        tool = tools.get(name) if isinstance(name, str) and given.keys() <= _KEYS else None
        carried = None if tool is None else _carried(tool, given.get("arguments", given.get("parameters")))
        if tool is None or carried is None:
            return None
        carried.encode()  # half a surrogate pair can be written in JSON, and not be told
    except (ValueError, RecursionError):
        return None
    return TextCall(tool, carried)


def _carried(tool: Tool, given: Any) -> str | None:
    """The text that a call's arguments are, or None where they are none. They may be JSON in a string."""
    if tool.kind == "custom":
        return _input(given)
    arguments = json.loads(given or "{}", strict=False) if isinstance(given, str) else {} if given is None else given
    return _dumped(arguments) if isinstance(arguments, dict) else None


def _input(given: Any) -> str | None:
    """A custom tool's input, which may stand where its wrapper should."""
    if isinstance(given, str) and not _INPUT.match(given):
        return given or None
    if not isinstance(given, str | dict) or not given:
        return None
    unwrapper = Unwrapper()
    return unwrapper.feed(given if isinstance(given, str) else _dumped(given)) + unwrapper.end()


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# How tools are refused.

_REFUSALS = re.compile(
    "|".join(
        (
            # Ollama, Bedrock, xAI, DeepSeek.
            r"(not|n't) support (tools\b(?! of| with| named)|tool (use|calls|calling)\b|function.call)",
            # OpenAI and Groq: `tools`; DashScope: the tool call; DeepInfra: tool calling; Mistral, Gemini:
            # function calling. Not what is only a kind of call or of tool.
            r"(?<!parallel )(?<!custom )(?<!hosted )(?<!strict )(?<!built-in )"
            r"\b(tools|tool (use|calls?|calling)|function.calling)['\"`]? (is|are) not (supported|enabled|available)",
            r"function calling not support",  # Novita
            r"endpoints found that support tool use",  # OpenRouter
            r"requires .{0,40}--tool-call-parser",  # vLLM
            r"tools param requires --jinja",  # llama.cpp, with status 500
            r"unsupported tool_call_parser: none",  # SGLang
            r"unrecognized request arguments? supplied: .{0,60}\btools\b",  # servers like OpenAI's of 2023
        )
    ),
    re.IGNORECASE,
)
_FINAL = frozenset({400, 404, 502})
"""What our status is where an upstream says 400, 404 (OpenAI, OpenRouter), 405 (DeepInfra), 422, 500 or 501."""


def refuses_tools(error: IngressError) -> bool:
    """Whether an upstream refused a request because it has no tools for this model."""
    return isinstance(error, UpstreamError) and error.status in _FINAL and bool(_REFUSALS.search(error.message))
