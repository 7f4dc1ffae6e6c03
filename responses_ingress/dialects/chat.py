"""Chat completions, our side to theirs: a turn becomes one `/chat/completions` request.

What must stay true: every item that chat can express arrives, in order and without empty messages; one
that it cannot (hosted calls, encrypted reasoning) is left out; content that would silently change the
meaning of a message (an image or a file chat has no form for) is refused. Calls that follow each other
are one assistant message, together with the text and reasoning they belong to, because chat servers
refuse a tool message that does not follow its call. Knows nothing of HTTP. The way back is `chat_reader`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from responses_ingress.core.deltas import Item
from responses_ingress.core.items import all_text, part_text, parts_of
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.tools import Function, Toolbox, ToolMap, toolbox, wrapped
from responses_ingress.errors import InvalidRequest

Message = dict[str, Any]
Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How one upstream wants its chat requests.

    system:    `leading`: instructions and all system and developer messages, wherever they stand, in one
               system message at the head, since many chat templates refuse or misread later ones;
               `in_place`: only those at the head are merged.
    reasoning: how earlier reasoning is given back: as the field `reasoning_content`, as `<think>` text in
               front of the answer, or not at all.
    forward:   further request fields to pass on as they are.
    """

    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_tokens"
    system: Literal["leading", "in_place"] = "leading"
    reasoning: Literal["reasoning_content", "text", "omit"] = "reasoning_content"
    forward: tuple[str, ...] = ("chat_template_kwargs",)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """body: the request. tools: what the reader needs to read the answer. dropped: types of the hosted
    tools that were left out."""

    body: dict[str, Any]
    tools: ToolMap
    dropped: Sequence[str]


def encode(turn: Turn, options: ChatOptions) -> ChatCall:
    """The chat request for `turn`. Raises `InvalidRequest` for what chat cannot express."""
    given = turn.parameters
    items = turn.items
    box = toolbox(turn.tools, items, turn.tool_choice)
    body: dict[str, Any] = {name: given[name] for name in options.forward if given.get(name) is not None}
    body |= {"model": turn.model, "messages": _messages(turn.instructions, items, box.names, options)}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if turn.stream else {"stream": False}
    body |= _parameters(given, options)
    body |= _tools(box, given.get("parallel_tool_calls"))
    return ChatCall(body, box.names, box.dropped)


_SAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty")


def _parameters(given: Mapping[str, Any], options: ChatOptions) -> dict[str, Any]:
    text = given.get("text") or {}
    top_logprobs = given.get("top_logprobs") or None
    wants_logprobs = top_logprobs or "message.output_text.logprobs" in (given.get("include") or ())
    found = {name: given.get(name) for name in _SAME} | {
        options.max_tokens_field: given.get("max_output_tokens"),
        "reasoning_effort": (given.get("reasoning") or {}).get("effort"),
        "verbosity": text.get("verbosity"),
        "response_format": _response_format(text.get("format") or {}),
        "logprobs": True if wants_logprobs else None,
        "top_logprobs": top_logprobs,
    }
    return {name: value for name, value in found.items() if value is not None}


def _response_format(format: Mapping[str, Any]) -> dict[str, Any] | None:
    match format.get("type"):
        case "json_schema":
            schema = {name: value for name, value in format.items() if name != "type" and value is not None}
            return {"type": "json_schema", "json_schema": schema}
        case "json_object":
            return {"type": "json_object"}
    return None


def _tools(box: Toolbox, parallel: object) -> dict[str, Any]:
    if not box.functions:
        return {}
    body: dict[str, Any] = {"tools": [_tool(function) for function in box.functions]}
    if box.choice.name is not None:
        body["tool_choice"] = {"type": "function", "function": {"name": box.choice.name}}
    elif box.choice.mode != "auto":
        body["tool_choice"] = box.choice.mode
    if parallel is not None:
        body["parallel_tool_calls"] = parallel
    return body


def _tool(function: Function) -> dict[str, Any]:
    tool: dict[str, Any] = {"name": function.name}
    if function.description:
        tool["description"] = function.description
    tool["parameters"] = function.parameters
    # Never `strict: false`: it is the default, and servers that do not know the field refuse it.
    if function.strict:
        tool["strict"] = True
    return {"type": "function", "function": tool}


def _messages(instructions: str | None, items: Iterable[Item], names: ToolMap, options: ChatOptions) -> list[Message]:
    transcript = _Transcript(options, names, instructions)
    for item in items:
        transcript.add(item)
    return transcript.done()


@dataclass(slots=True)
class _Assistant:
    """An assistant message in the making."""

    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)


class _Transcript:
    """Items in, chat messages out."""

    def __init__(self, options: ChatOptions, names: ToolMap, instructions: str | None) -> None:
        self._options = options
        self._names = names
        self._system = [instructions] if instructions else []
        self._messages: list[Message] = []
        self._assistant: _Assistant | None = None
        self._attached: list[Part] = []

    def add(self, item: Item) -> None:
        handle = _HANDLERS.get(item.get("type") or "message")
        if handle is not None:
            handle(self, item)

    def done(self) -> list[Message]:
        self._flush()
        system = [{"role": "system", "content": "\n\n".join(self._system)}] if self._system else []
        return system + self._messages

    def message(self, item: Item) -> None:
        role = item.get("role")
        if role == "assistant":
            if text := all_text(item.get("content")):
                self._unanswered().texts.append(text)
        elif role in ("system", "developer"):
            self._instructed(all_text(item.get("content")))
        else:
            self._put("user", _content(item.get("content")))

    def agent_message(self, item: Item) -> None:
        """What another agent wrote to this one (codex sub-agents)."""
        self._put("user", all_text(item.get("content")))

    def reasoning(self, item: Item) -> None:
        text = all_text(item.get("content")) or all_text(item.get("summary"))
        if text:
            self._unanswered().reasoning.append(text)

    def call(self, item: Item) -> None:
        if item["type"] == "custom_tool_call":
            arguments = wrapped(item.get("input") or "")
        else:
            arguments = item.get("arguments") or "{}"
        function = {"name": self._names.of_call(item), "arguments": arguments}
        self._open().calls.append({"id": item.get("call_id") or "", "type": "function", "function": function})

    def output(self, item: Item) -> None:
        """A tool message. Chat allows text only in it: pictures and files go into a user message after
        the whole group, since nothing may stand between tool messages of one group."""
        content = _content(item.get("output"))
        attached = [part for part in content if part["type"] != "text"] if isinstance(content, list) else []
        text = all_text(item.get("output")) or ("(The output is attached below.)" if attached else "")
        self._close_assistant()
        self._attached += attached
        self._messages.append({"role": "tool", "tool_call_id": item.get("call_id") or "", "content": text})

    def _instructed(self, text: str) -> None:
        at_head = not self._messages and self._assistant is None
        if text and (at_head or self._options.system == "leading"):
            self._system.append(text)
        else:
            self._put("system", text)

    def _put(self, role: str, content: str | list[Part]) -> None:
        if content:
            self._flush()
            self._messages.append({"role": role, "content": content})

    def _open(self) -> _Assistant:
        if self._assistant is None:
            self._flush()
            self._assistant = _Assistant()
        return self._assistant

    def _unanswered(self) -> _Assistant:
        """The assistant message that more text or reasoning belongs to. One that has its text is over,
        unless it has calls: what a model says between its calls and their outputs stays with them."""
        if self._assistant and self._assistant.texts and not self._assistant.calls:
            self._flush()
        return self._open()

    def _flush(self) -> None:
        """End the assistant message, or the group of tool messages, that is under way."""
        self._close_assistant()
        if self._attached:
            self._messages.append({"role": "user", "content": self._attached})
            self._attached = []

    def _close_assistant(self) -> None:
        pending, self._assistant = self._assistant, None
        if pending is None or not (pending.texts or pending.calls):
            return
        text, reasoning = "\n".join(pending.texts), "\n".join(pending.reasoning)
        if reasoning and self._options.reasoning == "text":
            text = f"<think>\n{reasoning}\n</think>\n\n{text}".rstrip("\n")
        message: Message = {"role": "assistant", "content": text or None}
        if reasoning and self._options.reasoning == "reasoning_content":
            message["reasoning_content"] = reasoning
        if pending.calls:
            message["tool_calls"] = pending.calls
        self._messages.append(message)


_HANDLERS: Mapping[str, Callable[[_Transcript, Item], None]] = {
    "message": _Transcript.message,
    "agent_message": _Transcript.agent_message,
    "reasoning": _Transcript.reasoning,
    "function_call": _Transcript.call,
    "custom_tool_call": _Transcript.call,
    "function_call_output": _Transcript.output,
    "custom_tool_call_output": _Transcript.output,
}


def _content(content: object) -> str | list[Part]:
    """A string where there is only text, since many local servers take no other form."""
    parts = [made for part in parts_of(content) if (made := _part(part))]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: Mapping[str, Any]) -> Part | None:
    match part.get("type"):
        case "input_image":
            return _image(part)
        case "input_file":
            return _file(part)
        case "input_audio":
            return {"type": "input_audio", "input_audio": part.get("input_audio")}
    text = part_text(part)
    return {"type": "text", "text": text} if text else None


_DETAILS = {"low": "low", "high": "high", "original": "high"}


def _image(part: Mapping[str, Any]) -> Part:
    url = part.get("image_url")
    if not url:
        raise InvalidRequest(
            "This model takes an image only as 'image_url' (a URL or a data URL), not as 'file_id'.", param="input"
        )
    image = {"url": url}
    detail = part.get("detail")
    if isinstance(detail, str) and detail in _DETAILS:
        image["detail"] = _DETAILS[detail]
    return {"type": "image_url", "image_url": image}


def _file(part: Mapping[str, Any]) -> Part:
    file = {name: part[name] for name in ("file_data", "file_id", "filename") if part.get(name)}
    if not file.keys() & {"file_data", "file_id"}:
        raise InvalidRequest("This model takes a file only as 'file_data', not as 'file_url'.", param="input")
    return {"type": "file", "file": file}
