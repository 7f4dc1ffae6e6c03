"""Anthropic messages, our side to theirs: a turn becomes one `/v1/messages` request.

What must stay true:
- roles alternate; every call is answered in the message right after it, before anything else in there;
  no text is blank and no id comes twice: each of these is refused;
- a request only adds to the one before it (no later text moves into `system`), because the cache and the
  signatures of thinking hold for what stands before them
  (platform.claude.com, "Preserved thinking": the prefix check);
- thinking goes back as it came, and only to the backend that made it.
What the API has no form for is left out (hosted calls, foreign reasoning) or, where that would silently
change the meaning of a message, refused. Knows nothing of HTTP. The way back is `messages_reader`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from responses_ingress.core.deltas import Item
from responses_ingress.core.items import CALLS, OUTPUTS, all_text, unseal
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.messages_content import THINKING, Block, blocks_of, text_block, thought_of
from responses_ingress.dialects.tools import Function, Toolbox, ToolMap, toolbox

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MessagesOptions:
    """How one upstream wants its messages requests.

    max_tokens:  sent where the client sets no `max_output_tokens`; the API demands a number.
    thinking:    what a reasoning effort becomes. `adaptive`: the effort itself, for Claude 4.6 and later;
                 `budget`: a number of tokens, for Claude 4.6 and earlier; `off`: nothing.
    system:      where system and developer messages go that stand behind the first user message. `user`: into
                 the user's message, marked; `in_place`: as messages of role `system` (Claude Opus 4.8 and
                 later); `leading`: into the system prompt, which invalidates the cache and the signatures.
    json_schema: how a JSON schema is asked for: `native`, or by `instruction` where the model has no support.
    cache:       whether to mark what should be cached.
    forward:     further request fields to pass on as they are.
    """

    max_tokens: int = 32_000
    thinking: Literal["adaptive", "budget", "off"] = "adaptive"
    system: Literal["user", "in_place", "leading"] = "user"
    json_schema: Literal["native", "instruction"] = "native"
    cache: bool = True
    forward: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MessagesCall:
    """body: the request. tools, summarized: what the reader needs to read the answer. dropped: types of the
    hosted tools that were left out. recalls: whether earlier thinking is in the body. foreign: whether other
    backends' reasoning was left out."""

    body: dict[str, Any]
    tools: ToolMap
    summarized: bool
    dropped: Sequence[str]
    recalls: bool
    foreign: bool


def encode(turn: Turn, options: MessagesOptions, backend: str, *, recall: bool = True) -> MessagesCall:
    """The request for `turn`; without `recall` no earlier thinking is in it. Raises `InvalidRequest` for what
    the API cannot express."""
    given, items = turn.parameters, turn.items
    box = toolbox(turn.tools, items, turn.tool_choice)
    transcript = _Transcript(box.names, options, backend if recall else None)
    transcript.instruct(turn.instructions or "")
    transcript.instruct(_wanted_format(given, options))
    for at, (item, partner) in enumerate(_paired(items)):
        if at == len(turn.context):
            transcript.mark()
        transcript.add(item, partner)
    transcript.finish()

    body: dict[str, Any] = {name: given[name] for name in options.forward if given.get(name) is not None}
    body |= {"model": turn.model, "max_tokens": given.get("max_output_tokens") or options.max_tokens}
    if transcript.system:
        body["system"] = [text_block("\n\n".join(transcript.system))]
    body |= {"messages": transcript.messages, "stream": turn.stream}
    body |= _tools(box, transcript, given.get("parallel_tool_calls"))
    body |= _output_config(given, options) | _thinking(body, given, options)
    body |= _sampling(given, body)
    if options.cache:
        _cache(body, transcript)
    summarized = bool((given.get("reasoning") or {}).get("summary"))
    return MessagesCall(body, box.names, summarized, box.dropped, transcript.recalls, transcript.foreign)


_UNREADABLE = re.compile(
    rb"signature.{0,40}thinking|thinking.{0,80}cannot be modified|expected .{0,3}thinking", re.IGNORECASE | re.DOTALL
)


def refuses_thinking(status: int, body: bytes) -> bool:
    """Whether this is the refusal of thinking that was made for another account, model or conversation, or of
    which a part is missing."""
    return status == 400 and bool(_UNREADABLE.search(body))


# The request around the messages


def _tools(box: Toolbox, transcript: "_Transcript", parallel: object) -> dict[str, Any]:
    if not box.functions:
        # Calls in the history are refused where no tools are offered; codex compacts without any.
        stubs = [{"name": name, "input_schema": {"type": "object"}} for name in transcript.called]
        return {"tools": stubs, "tool_choice": {"type": "none"}} if stubs else {}
    choice: dict[str, Any] = {"type": {"required": "any"}.get(box.choice.mode, box.choice.mode)}
    if box.choice.name is not None:
        choice = {"type": "tool", "name": box.choice.name}
    if parallel is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    said = {} if choice == {"type": "auto"} else {"tool_choice": choice}
    return {"tools": [_tool(function) for function in box.functions], **said}


def _tool(function: Function) -> dict[str, Any]:
    """Never `strict`: what OpenAI takes as strict (bounds, patterns, many tools) is refused here."""
    tool: dict[str, Any] = {"name": function.name}
    if function.description:
        tool["description"] = function.description
    return {**tool, "input_schema": {**function.parameters, "type": "object"}}


_LEVELS = {"minimal": "low"}
_BUDGETS = {"minimal": 1024, "low": 4096, "medium": 8192, "high": 16_384, "xhigh": 32_768, "max": 65_536}
_LEAST_BUDGET = 1024


def _output_config(given: Mapping[str, Any], options: MessagesOptions) -> dict[str, Any]:
    config: dict[str, Any] = {}
    effort = (given.get("reasoning") or {}).get("effort")
    if effort not in (None, "none") and options.thinking == "adaptive":
        config["effort"] = _LEVELS.get(effort, effort)
    format = (given.get("text") or {}).get("format") or {}
    if format.get("type") == "json_schema" and options.json_schema == "native":
        config["format"] = {"type": "json_schema", "schema": format.get("schema")}
    return {"output_config": config} if config else {}


def _thinking(body: Mapping[str, Any], given: Mapping[str, Any], options: MessagesOptions) -> dict[str, Any]:
    """A client that wants a summary wants reasoning too."""
    wanted = given.get("reasoning") or {}
    effort, summary = wanted.get("effort"), wanted.get("summary")
    if options.thinking == "off" or not (effort or summary):
        return {}
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if options.thinking == "adaptive":
        # Newer models keep their thinking to themselves unless they are asked to show it.
        return {"thinking": {"type": "adaptive", **({"display": "summarized"} if summary else {})}}
    # The budget is part of `max_tokens`, and half of it is for the answer.
    most = body["max_tokens"]
    budget = max(_LEAST_BUDGET, min(_BUDGETS[effort or "medium"], most // 2))
    forced = (body.get("tool_choice") or {}).get("type") in ("any", "tool")
    if forced or budget >= most or _began_without_thinking(body["messages"]):
        return {}
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def _began_without_thinking(messages: Sequence[Message]) -> bool:
    """Whether calls are being answered that were made without thinking: it cannot begin in the middle ("a
    final assistant message must start with a thinking block")."""
    first: Message | None = None
    for message in reversed(messages):
        if message["role"] == "assistant":
            first = message
        elif any(block["type"] != "tool_result" for block in message["content"]):
            break
    return first is not None and first["content"][0]["type"] not in THINKING


def _sampling(given: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """One of the two at most, and neither with thinking: anything else is refused. 1 is the default, which
    models that take neither are not to be bothered with."""
    if body.get("thinking", {}).get("type") in ("adaptive", "enabled"):
        return {}
    temperature, top_p = given.get("temperature"), given.get("top_p")
    if temperature is not None and temperature < 1:
        return {"temperature": temperature}
    return {"top_p": top_p} if top_p is not None and top_p < 1 else {}


def _wanted_format(given: Mapping[str, Any], options: MessagesOptions) -> str:
    format = (given.get("text") or {}).get("format") or {}
    if format.get("type") == "json_object":
        return "Answer with one JSON object and nothing else."
    if format.get("type") == "json_schema" and options.json_schema == "instruction":
        schema = orjson.dumps(format.get("schema")).decode()
        return f"Answer with nothing else than JSON that matches this JSON schema:\n{schema}"
    return ""


def _cache(body: Mapping[str, Any], transcript: "_Transcript") -> None:
    """Mark the ends of what stays: tools, system prompt, the messages before the new items, and all messages,
    for the turn after this one. Four marks are allowed."""
    ends = [*body.get("tools", ())[-1:], *body.get("system", ())[-1:], *transcript.marks]
    ends.append(transcript.messages[-1]["content"][-1])
    for block in ends:
        if block.get("type") not in THINKING:
            block["cache_control"] = {"type": "ephemeral"}


# The messages

_OPENING = "(The conversation begins.)"
_GO_ON = "(Go on.)"
_ABORTED = "aborted"
"""What codex says itself of a call whose output was lost."""

_ILLEGAL_ID = re.compile(r"[^A-Za-z0-9_-]")


def _paired(items: Sequence[Item]) -> list[tuple[Item, Item | None]]:
    """Each item with its partner: a call with its output, an output with its call. Servers that number their
    calls anew with each answer use an id again and again; the first call that waits is meant."""
    partners: list[Item | None] = [None] * len(items)
    waiting: dict[object, list[int]] = {}
    for at, item in enumerate(items):
        id = str(item.get("call_id"))
        if item.get("type") in CALLS:
            waiting.setdefault(id, []).append(at)
        elif item.get("type") in OUTPUTS and waiting.get(id):
            call = waiting[id].pop(0)
            partners[at], partners[call] = items[call], item
    return list(zip(items, partners, strict=True))


class _Transcript:
    """Items in, messages out. `backend`: whose thinking to put in, if any."""

    def __init__(self, names: ToolMap, options: MessagesOptions, backend: str | None) -> None:
        self.system: list[str] = []
        self.messages: list[Message] = []
        self.marks: list[Block] = []
        self.called: dict[str, None] = {}
        self.recalls = self.foreign = False
        self._names = names
        self._mode = options.system
        self._backend = backend
        self._ids: set[str] = set()
        self._unanswered: list[tuple[str, Item | None]] = []

    def add(self, item: Item, partner: Item | None) -> None:
        handle = _HANDLERS.get(item.get("type") or "message")
        if handle is not None:
            handle(self, item, partner)

    def mark(self) -> None:
        """The stable part ends here."""
        if self.messages:
            self.marks.append(self.messages[-1]["content"][-1])

    def finish(self) -> None:
        """The API wants a user's message first, and newer models want one last."""
        self._answer()
        if not self.messages or self.messages[0]["role"] != "user":
            self.messages.insert(0, {"role": "user", "content": [text_block(_OPENING)]})
        if self.messages[-1]["role"] == "assistant":
            self._say("user", [text_block(_GO_ON)])

    def instruct(self, text: str) -> None:
        if not text.strip():
            return
        if not self.messages or self._mode == "leading":
            self.system.append(text)
        elif self._mode == "in_place":
            self._say("system", [text_block(text)])
        else:
            self._say("user", [text_block(f"<system>\n{text}\n</system>")])

    def message(self, item: Item, _: Item | None) -> None:
        role, content = item.get("role"), item.get("content")
        if role in ("system", "developer"):
            self.instruct(all_text(content))
        else:
            self._say("assistant" if role == "assistant" else "user", blocks_of(content))

    def agent_message(self, item: Item, _: Item | None) -> None:
        """What another agent wrote to this one (codex sub-agents)."""
        self._say("user", blocks_of(all_text(item.get("content"))))

    def reasoning(self, item: Item, _: Item | None) -> None:
        sealed = item.get("encrypted_content")
        if self._backend is None or not sealed or not isinstance(sealed, str):
            return
        block = thought_of(unseal(self._backend, sealed))
        if block is None:
            self.foreign = True
        else:
            self.recalls = True
            self._say("assistant", [block])

    def call(self, item: Item, output: Item | None) -> None:
        name, id = self._names.of_call(item), self._new_id(str(item.get("call_id") or "call"))
        arguments = {"input": item.get("input") or ""} if item["type"] == "custom_tool_call" else _arguments(item)
        self._say("assistant", [{"type": "tool_use", "id": id, "name": name, "input": arguments}])
        self.called[name] = None
        self._unanswered.append((id, output))

    def output(self, item: Item, call: Item | None) -> None:
        """It stands in the answer to its call already, unless it has none."""
        self._answer()
        if call is None:
            self._say("user", blocks_of(item.get("output")))

    def _say(self, role: str, blocks: Sequence[Block]) -> None:
        if blocks:
            if role != "assistant":
                self._answer()
            self._content(role).extend(blocks)

    def _content(self, role: str) -> list[Block]:
        """Of the last message, which is one of `role`."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": []})
        content: list[Block] = self.messages[-1]["content"]
        return content

    def _answer(self) -> None:
        """End the assistant's message: its calls get their outputs."""
        calls, self._unanswered = self._unanswered, []
        if calls:
            self._content("user").extend(_result(id, output) for id, output in calls)

    def _new_id(self, id: str) -> str:
        legal = unique = _ILLEGAL_ID.sub("_", id)
        while unique in self._ids:
            unique = f"{legal}_{len(self._ids)}"
        self._ids.add(unique)
        return unique


_HANDLERS: Mapping[str, Callable[[_Transcript, Item, Item | None], None]] = {
    "message": _Transcript.message,
    "agent_message": _Transcript.agent_message,
    "reasoning": _Transcript.reasoning,
    "function_call": _Transcript.call,
    "custom_tool_call": _Transcript.call,
    "function_call_output": _Transcript.output,
    "custom_tool_call_output": _Transcript.output,
}


def _arguments(item: Item) -> dict[str, Any]:
    """Models sometimes write what is no object; the API takes nothing else."""
    text = item.get("arguments") or "{}"
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"arguments": text}
    return arguments if isinstance(arguments, dict) else {"arguments": text}


def _result(id: str, output: Item | None) -> Block:
    block: Block = {"type": "tool_result", "tool_use_id": id}
    if output is None:
        return {**block, "content": _ABORTED, "is_error": True}
    content = blocks_of(output.get("output"))
    return {**block, "content": content} if content else block
