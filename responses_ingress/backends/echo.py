"""The embedded backend for trying things out: no model, no network.

It streams the last user text back word by word and says how many earlier items it was given. A text
`call NAME ARGUMENTS` makes that tool call (function, custom or namespaced), and a tool's output is
repeated; so a client can make its whole round trip with no model.
"""

import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Item, Open, Part, Text
from responses_ingress.core.items import OUTPUTS, last_user_text, text_of
from responses_ingress.core.turn import Turn

_CALL = re.compile(r"\s*call\s+(?P<name>[\w.-]+)\s*(?P<arguments>.*)", re.DOTALL)
_WORDS = re.compile(r"\s*\S+|\s+$")


class EchoBackend:
    """Answers for any model name."""

    name = "echo"
    resumable = False
    goes_on = False

    async def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        yield [Accepted()]
        items = turn.items
        item, text = _wanted_call(turn, items) or _message(items)
        for deltas in _streamed(item, text):
            yield deltas
        read = sum(len(text_of(given).split()) for given in items)
        yield [Finish("completed", usage=_usage(read, len(text.split())))]

    async def models(self) -> Sequence[str]:
        return ["echo"]

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        pass

    async def close(self) -> None:
        pass


def _usage(read: int, written: int) -> dict[str, int]:
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}


def _message(items: Sequence[Item]) -> tuple[Item, str]:
    """An assistant message that repeats what came last."""
    last = items[-1] if items else {"type": "message"}
    text = text_of(last) if last["type"] in OUTPUTS else last_user_text(items)
    earlier = max(0, len(items) - 1)
    skeleton: Item = {"type": "message", "status": "in_progress", "role": "assistant", "content": []}
    return skeleton, f"{text}\n({earlier} earlier items)"


def _wanted_call(turn: Turn, items: Sequence[Item]) -> tuple[Item, str] | None:
    """The call that the last item, a user's text, asks for."""
    if not items or items[-1]["type"] != "message" or items[-1].get("role") != "user":
        return None
    asked = _CALL.fullmatch(text_of(items[-1]))
    if asked is None:
        return None
    namespace, _, name = asked["name"].rpartition(".")
    return _call(_find_tool(_tools(turn, items), name, namespace), name, namespace, asked["arguments"])


def _call(kind: tuple[str, str], name: str, namespace: str, arguments: str) -> tuple[Item, str]:
    type, found = kind
    where = {"namespace": namespace or found} if namespace or found else {}
    call: Item = {"type": type, "status": "in_progress", "call_id": "", "name": name, **where}
    if type == "custom_tool_call":
        return {**call, "input": ""}, arguments
    return {**call, "arguments": ""}, arguments or "{}"


def _tools(turn: Turn, items: Sequence[Item]) -> Iterator[Any]:
    yield from turn.tools
    for item in items:
        if item["type"] == "additional_tools":
            yield from item["tools"]


def _find_tool(tools: Iterator[Any], name: str, namespace: str) -> tuple[str, str]:
    """The type of call that the tool takes, and the namespace it is in. A function where there is none."""
    for tool in tools:
        if tool["type"] == "namespace" and namespace in ("", tool["name"]):
            for inner in tool["tools"]:
                if inner.get("name") == name:
                    return _call_type(inner), tool["name"]
        elif tool.get("name") == name and not namespace:
            return _call_type(tool), ""
    return "function_call", namespace


def _call_type(tool: Any) -> str:
    return "custom_tool_call" if tool["type"] == "custom" else "function_call"


def _streamed(item: Item, text: str) -> Iterator[list[Delta]]:
    yield [Open(0, item), Part(0, "output_text")] if item["type"] == "message" else [Open(0, item)]
    for word in _WORDS.findall(text):
        yield [Text(0, word)]
    yield [Close(0)]
