"""The Responses dialect, our side to theirs: a turn becomes the body of one `POST /responses`.

What must stay true: every item goes out as it is stored and in order, without what only another server
understands: ids, nulls, content that another backend encrypted; every request field that is not ours to
answer passes as it is, unknown ones too; a turn continues a response of the upstream only where that
stands for exactly the turn's context. Knows nothing of HTTP. The way back is `responses`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import orjson

from responses_ingress.core.channels import is_half_a_call
from responses_ingress.core.deltas import Item
from responses_ingress.core.items import CALLS, OUTPUTS, PLACES_OF_PARTS, digest, is_anchor, unseal
from responses_ingress.core.turn import Turn
from responses_ingress.ids import is_named

_ENCRYPTED = "reasoning.encrypted_content"

_OURS = frozenset(
    ["model", "input", "instructions", "tools", "tool_choice", "include", "stream", "stream_options", "store"]
    + ["previous_response_id", "conversation", "background", "metadata", "prompt"]
)
"""Request fields that are written here, or that this server answers itself."""

_NAMED_BY_ID = frozenset(["mcp_approval_request"])
"""Items that another item refers to by id."""

_BARE = frozenset(["type", "id", "status"])
"""All that is left of an item, such as a compaction, whose whole content is another backend's."""

_TOLD_ONLY = {"reasoning": ("status",), "compaction": ("status",)}
_ACTIONS_TOLD_ONLY = {"web_search_call": ("sources",)}
"""What OpenAI tells of an item, or of its `action`, and calls an unknown parameter when it is sent back."""


@dataclass(frozen=True, slots=True)
class ResponsesOptions:
    """How one upstream wants its requests.

    chain:               continue from the upstream's own `previous_response_id` where it stands for the
                         whole context, instead of sending that again. The upstream then stores what it
                         answers; in a thread that a client has named also with `store: false`.
    open_reasoning:      give back reasoning that is not encrypted. DeepSeek and vLLM want it; OpenAI's own
                         models refuse a request that has it ("array too long").
    encrypted_reasoning: ask for reasoning in encrypted form, so that it can be given back.
    item_ids:            send our item ids, for servers that insist on some. OpenAI refuses ids that it has
                         not stored; vLLM makes up those that are missing.
    """

    chain: bool = False
    open_reasoning: bool = True
    encrypted_reasoning: bool = True
    item_ids: bool = False


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """body: the request. foreign: how many items had content that another backend encrypted."""

    body: dict[str, Any]
    foreign: int


def encode(turn: Turn, options: ResponsesOptions, backend: str, previous: str | None = None) -> ResponsesCall:
    """The request for `turn`: with its whole context, or as a continuation of the upstream's response
    `previous`. `backend` is the name that content was sealed with."""
    given = turn.parameters
    items = _answerable(turn.items if previous is None else turn.new)
    sent = [_sent(item, options, backend) for item in items]
    body = {name: value for name, value in given.items() if name not in _OURS and value is not None}
    body |= {"model": turn.model, "input": [item for item in sent if item is not None]}
    body |= {"stream": turn.stream, "store": _stores(turn, options)}
    body |= _written(turn, options)
    if previous is not None:
        body["previous_response_id"] = previous
    return ResponsesCall(body, sum(_is_foreign(item, backend) for item in items))


def _written(turn: Turn, options: ResponsesOptions) -> dict[str, Any]:
    """The fields that are sent only where they say something."""
    given = turn.parameters
    include = list(given.get("include") or ())
    if options.encrypted_reasoning and _ENCRYPTED not in include:
        include.append(_ENCRYPTED)
    chosen = "tool_choice" in given or turn.tool_choice != "auto"
    fields: dict[str, Any] = {
        "instructions": turn.instructions,
        "tools": turn.tools,
        "tool_choice": turn.tool_choice if chosen else None,
        "include": include,
        "stream_options": given.get("stream_options") if turn.stream else None,
    }
    return {name: value for name, value in fields.items() if value}


def _stores(turn: Turn, options: ResponsesOptions) -> bool:
    """Whether the upstream is to store its answer: only where a later turn can find it again, by the thread's name
    or by the response's id."""
    return options.chain and (is_named(turn.thread_id) or turn.parameters.get("store") is not False)


# Items


def _answerable(items: Sequence[Item]) -> list[Item]:
    """`items` without calls that an incomplete response cut short: no client ran them, and providers refuse a
    call without its output."""
    answered = {item.get("call_id") for item in items if item["type"] in OUTPUTS}
    return [
        item
        for item in items
        if item["type"] not in CALLS or not is_half_a_call(item) or item.get("call_id") in answered
    ]


def _is_foreign(item: Item, backend: str) -> bool:
    return _is_locked(item, backend) or any(_is_locked(part, backend) for part in _all_parts(item))


def _is_locked(holder: Mapping[str, Any], backend: str) -> bool:
    sealed = holder.get("encrypted_content")
    return isinstance(sealed, str) and unseal(backend, sealed) is None


def _all_parts(item: Item) -> Iterable[Mapping[str, Any]]:
    lists = (item.get(place) for place in PLACES_OF_PARTS)
    return (part for parts in lists if isinstance(parts, list) for part in parts if isinstance(part, dict))


def _sent(item: Item, options: ResponsesOptions, backend: str) -> Item | None:
    """`item` as the upstream gets it, or None where nothing of it would be of use there."""
    kept = _acceptable(item)
    if not _open_parts(kept, backend):
        return None
    if not options.item_ids and item["type"] not in _NAMED_BY_ID:
        kept.pop("id", None)
    sealed = kept.pop("encrypted_content", None)
    own = unseal(backend, sealed) if isinstance(sealed, str) else sealed
    if own is not None:
        kept["encrypted_content"] = own
    if item["type"] == "reasoning":
        return _reasoning(kept, options)
    return kept if sealed == own or kept.keys() - _BARE else None


def _acceptable(item: Item) -> Item:
    """`item` without what strict providers refuse: nulls where they mean nothing, and what is only told. Elsewhere,
    as in a tool's schema, a null has a meaning."""
    type = item["type"]
    kept = _without(item, _TOLD_ONLY.get(type, ()))
    for name in PLACES_OF_PARTS:
        if isinstance(kept.get(name), list):
            kept[name] = [_without(part) if isinstance(part, dict) else part for part in kept[name]]
    if isinstance(kept.get("action"), dict):
        kept["action"] = _without(kept["action"], _ACTIONS_TOLD_ONLY.get(type, ()))
    return kept


def _open_parts(kept: Item, backend: str) -> bool:
    """Unseal the parts in `kept`, and leave out those of another backend. False where that leaves nothing of it;
    the output of a call stays, since a call needs one."""
    for place in PLACES_OF_PARTS:
        parts = kept.get(place)
        if not isinstance(parts, list):
            continue
        kept[place] = [
            _opened(part, backend) for part in parts if not isinstance(part, dict) or not _is_locked(part, backend)
        ]
        if parts and not kept[place]:
            if place != "output":
                return False
            kept[place] = ""
    return True


def _opened(part: Any, backend: str) -> Any:
    sealed = part.get("encrypted_content") if isinstance(part, dict) else None
    return {**part, "encrypted_content": unseal(backend, sealed)} if isinstance(sealed, str) else part


def _without(fields: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and name not in names}


def _reasoning(kept: Item, options: ResponsesOptions) -> Item | None:
    if not options.open_reasoning:
        kept.pop("content", None)
        return {"summary": [], **kept} if kept.get("encrypted_content") else None
    useful = any(kept.get(name) for name in ("encrypted_content", "content", "summary"))
    return {"summary": [], **kept} if useful else None


# Chains


def continued(turn: Turn, options: ResponsesOptions, backend: str) -> str | None:
    """The upstream's response that `turn` continues, where its memory stands for exactly the turn's context.

    An approval names a request by an id of ours, which the upstream does not know: it needs both.
    """
    memory = turn.memory or {}
    response_id = memory.get("response_id")
    if not turn.new or not isinstance(response_id, str) or not _stores(turn, options):
        return None
    if any(item["type"] == "mcp_approval_response" for item in turn.new):
        return None
    known = (memory.get("backend"), memory.get("model"), memory.get("context"))
    return response_id if known == (backend, turn.model, _context_digest(turn.context)) else None


def memory_of(
    turn: Turn, options: ResponsesOptions, backend: str, response_id: object, output: Sequence[Item]
) -> dict[str, Any] | None:
    """What to remember of a completed response, so that the thread's next turn can continue it."""
    if not _stores(turn, options) or not isinstance(response_id, str) or any(map(is_half_a_call, output)):
        return None
    context = _context_digest([*turn.items, *output])
    return {"backend": backend, "model": turn.model, "response_id": response_id, "context": context}


def _context_digest(items: Iterable[Item]) -> str:
    """A digest of a history, which clients that carry it themselves send without reasoning and hosted calls."""
    digests = (digest(item) for item in items if is_anchor(item["type"]))
    return blake2b(b"".join(digests), digest_size=16).hexdigest()


# Refusals


def complaint(status: int, body: bytes) -> Literal["previous_response_id", "include"] | None:
    """The field of ours that an upstream's refusal is about, if it is one of those we could do without.

    OpenAI answers 400 to a response it has forgotten or, without data retention, never keeps; vLLM answers
    404. To models without reasoning OpenAI answers 400, param `include`.
    """
    error = _error_in(body)
    param = str(error.get("param") or "")
    if status == 404 or error.get("code") == "previous_response_not_found" or param == "previous_response_id":
        return "previous_response_id"
    if status == 400 and param.startswith("include"):
        return "include"
    return None


def _error_in(body: bytes) -> Mapping[str, Any]:
    try:
        whole = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    error = whole.get("error", whole) if isinstance(whole, dict) else None
    return error if isinstance(error, dict) else {}
