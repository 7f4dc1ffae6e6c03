"""The response object apart from its output: what a request makes of it, and its short stored form.

What must stay true: all 31 fields that Open Responses demands are present in every response; what is
stored is only what differs from the defaults, and `restore(reduce(envelope))` gives it back. Pure.
"""

from collections.abc import Mapping
from typing import Any

from responses_ingress.core.request import Request

Envelope = dict[str, Any]

DEFAULTS: Mapping[str, Any] = {
    "object": "response",
    "background": False,
    "completed_at": None,
    "error": None,
    "frequency_penalty": 0.0,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "output": [],
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "auto",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": None,
    "user": None,
}
"""What a response says of a field its request left out. `usage`, `output` and the like change later."""

_ECHOED = (
    "frequency_penalty",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "presence_penalty",
    "previous_response_id",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "temperature",
    "tool_choice",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
)

_REPEATED = ("instructions", "tools")
"""Fields that come again with every turn of a thread, and are large: stored once (`split_repeated`)."""


def open_envelope(request: Request, id: str, created_at: int) -> Envelope:
    """The response object at its creation."""
    given = request.body
    envelope: Envelope = {"id": id, "created_at": created_at, "status": "in_progress", **DEFAULTS}
    for field in _ECHOED:
        if given.get(field) is not None:
            envelope[field] = given[field]
    envelope |= {"model": request.model, "store": request.store, "background": request.background}
    if request.background:
        envelope["status"] = "queued"
    if given.get("reasoning"):
        envelope["reasoning"] = {**DEFAULTS["reasoning"], **given["reasoning"]}
    if given.get("text"):
        envelope["text"] = {**DEFAULTS["text"], **given["text"]}
        if envelope["text"]["format"] is None:
            envelope["text"]["format"] = DEFAULTS["text"]["format"]
    if request.tools:
        envelope["tools"] = [_echo_tool(tool) for tool in request.tools]
    if request.conversation is not None:
        envelope["conversation"] = {"id": request.conversation}
    return envelope


def _echo_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Function tools are echoed with all their fields, which both contracts demand."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": None, **tool}


_COLUMNS = frozenset(
    ["id", "created_at", "status", "model", "background", "store", "previous_response_id"]
    + ["output", "usage", "error", "completed_at", "incomplete_details"]
)


def reduce(envelope: Mapping[str, Any]) -> Envelope:
    """What must be stored of an envelope: fields that differ from `DEFAULTS` and have no column."""
    return {
        field: value
        for field, value in envelope.items()
        if field not in _COLUMNS and (field not in DEFAULTS or value != DEFAULTS[field])
    }


def restore(reduced: Mapping[str, Any]) -> Envelope:
    """The envelope that `reduce` made `reduced` of, but for the fields that have columns."""
    return {**DEFAULTS, **reduced}


def changed(envelope: Mapping[str, Any], response: Mapping[str, Any]) -> Envelope:
    """The fields without a column that differ in `response`, which is what became of `envelope`."""
    return {
        field: value
        for field, value in response.items()
        if field not in _COLUMNS and (field not in envelope or envelope[field] != value)
    }


def split_repeated(reduced: Envelope) -> tuple[Envelope, Envelope]:
    """`reduced` without the fields that repeat from turn to turn, and those fields."""
    repeated = {field: reduced[field] for field in _REPEATED if field in reduced}
    rest = {field: value for field, value in reduced.items() if field not in repeated}
    return rest, repeated
