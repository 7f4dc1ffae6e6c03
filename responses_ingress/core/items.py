"""Items: what an element of `input` or `output` is to us, and when two of them are the same.

What must stay true: an item is the raw JSON dict it arrived as; nothing here drops a field of one. Two
items are the same when a client that carries its own history would send one for the other (`digest`).
Knows nothing of threads or storage.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import orjson

from responses_ingress.core.deltas import Item

OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output"})
CALLS = frozenset({"function_call", "custom_tool_call"})

# What decides whether two items are the same, by type. Measured on codex 0.60 to 0.169: clients drop or
# rewrite ids, statuses, phases, annotations, logprobs and unknown fields when they send history back.
# `encrypted_content` is left out because OpenAI encrypts it anew in the terminal event; the reasoning
# text because some clients drop it. What is left of a reasoning item tells little: its place decides.
_IDENTITY: dict[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "reasoning": ("summary",),
    "function_call": ("call_id", "name", "namespace", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "namespace", "input"),
    "custom_tool_call_output": ("call_id", "output"),
}
_NOT_IDENTITY = frozenset({"id", "status", "phase", "encrypted_content", "internal_chat_message_metadata_passthrough"})
_PART_NOT_IDENTITY = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint", "detail"})

_MODEL_MADE = frozenset({"reasoning", "compaction", "mcp_list_tools", "mcp_approval_request", "program"})

# Items that a client must send back for the history to make sense. All others (reasoning, hosted calls)
# codex and the SDKs drop silently in some version or another.
_ANCHORS = frozenset({"message", "compaction", "additional_tools"}) | CALLS | OUTPUTS

PLACES_OF_PARTS = ("content", "summary", "output")
"""Fields that are lists of parts, where they are lists."""


def packed(value: Any) -> bytes:
    """`value` as JSON that is to be kept for a while: orjson (3.13) leaves what it made in a buffer of 4 to 14
    times the size."""
    return bytes(memoryview(orjson.dumps(value)))


def user_message(text: str) -> Item:
    """The message item that a string `input` stands for."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def is_anchor(type: str) -> bool:
    """Whether a client that carries its own history is sure to send an item of this type back."""
    return type in _ANCHORS


def is_model_made(item: Mapping[str, Any]) -> bool:
    """Whether only a model can have made this item, so that its sender carries its own history."""
    type: str = item["type"]
    if type == "message":
        return item.get("role") == "assistant"
    return type in _MODEL_MADE or type.endswith("_call")


def digest(item: Item) -> bytes:
    """16 bytes that are equal for items that are the same (see `_IDENTITY`)."""
    type = item["type"]
    fields = _IDENTITY.get(type)
    if fields is None:
        kept = {key: value for key, value in item.items() if key not in _NOT_IDENTITY and value is not None}
    else:
        kept = {key: _plain(item, key) for key in fields if item.get(key) is not None}
        kept["type"] = type
    return blake2b(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()


def _plain(item: Item, key: str) -> Any:
    """The field without what clients rewrite: part lists for strings, parts without annotations."""
    value = item[key]
    if key == "content" and isinstance(value, str):
        return [{"type": _text_part(item), "text": value}]
    if isinstance(value, list):
        return [_plain_part(part) if isinstance(part, dict) else part for part in value]
    return value


def _plain_part(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in _PART_NOT_IDENTITY and value is not None}


def _text_part(item: Mapping[str, Any]) -> str:
    return "output_text" if item.get("role") == "assistant" else "input_text"


def listed(item: Item) -> Item:
    """The item as the list endpoints show it: content as parts, a status on every message."""
    if item["type"] != "message":
        return item
    shown = {"status": "completed", **item}
    if isinstance(item.get("content"), str):
        part: dict[str, Any] = {"type": _text_part(item), "text": item["content"]}
        if part["type"] == "output_text":
            part |= {"annotations": [], "logprobs": []}
        shown["content"] = [part]
    return shown


def parts_of(content: object) -> list[Mapping[str, Any]]:
    """The parts of a message's content or of a tool's output, whichever way it is given."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def part_text(part: Mapping[str, Any]) -> str:
    """What a part says, a refusal too; "" for a part that is no text."""
    text = part.get("text") or part.get("refusal")
    return text if isinstance(text, str) else ""


def all_text(content: object) -> str:
    """All text in a content or an output, a part a line. (vLLM and others join parts like this too.)"""
    return "\n".join(text for part in parts_of(content) if (text := part_text(part)))


def last_user_text(items: Iterable[Item]) -> str:
    """The text of the last user message, or ""."""
    texts = [text_of(item) for item in items if item["type"] == "message" and item.get("role") == "user"]
    return texts[-1] if texts else ""


def text_of(item: Mapping[str, Any]) -> str:
    """All text in a message's content or a tool output, joined."""
    content = item.get("content", item.get("output"))
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def seal(backend: str, content: str) -> str:
    """Encrypted content as clients and the store see it: tagged with the backend that made it."""
    return f"{backend}:{content}"


def sealed(backend: str, item: Item) -> Item:
    """`item` with all encrypted content in it sealed: its own, and that of its parts."""
    made = _sealed(backend, item)
    for place in PLACES_OF_PARTS:
        if isinstance(item.get(place), list):
            made[place] = [_sealed(backend, part) if isinstance(part, dict) else part for part in item[place]]
    return made


def _sealed(backend: str, holder: Mapping[str, Any]) -> dict[str, Any]:
    content = holder.get("encrypted_content")
    return {**holder, "encrypted_content": seal(backend, content)} if isinstance(content, str) else {**holder}


def unseal(backend: str, content: str | None) -> str | None:
    """What `backend` had sealed. Only it gets it back; to any other, None, it does not exist."""
    tag = f"{backend}:"
    return content[len(tag) :] if content is not None and content.startswith(tag) else None
