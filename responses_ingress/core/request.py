"""The request of POST /v1/responses as a checked value.

What must stay true: the parsed dict stays the truth (`body`); checking reads it and never rewrites a
field a client sent. A wrong request is refused with the code and the dotted path that `decisions`
names, before anything is stored. Pydantic sees the top level only: items and tools are checked by hand
because their types are open-ended and many (a typed union costs ten times the parse).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from responses_ingress.core.deltas import Item
from responses_ingress.core.items import user_message
from responses_ingress.errors import (
    IngressError,
    InvalidType,
    InvalidValue,
    MissingParameter,
    MutuallyExclusive,
    NotFound,
    UnknownParameter,
    UnsupportedParameter,
)

Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What one POST asks for. `body` holds every field as the client sent it."""

    body: Mapping[str, Any]
    model: str
    input: Sequence[Item]
    tools: Sequence[Tool] = ()
    previous_response_id: str | None = None
    conversation: str | None = None
    store: bool = True
    background: bool = False
    stream: bool = False
    unknown: Sequence[str] = ()

    @property
    def instructions(self) -> str | None:
        return self.body.get("instructions")


@dataclass(frozen=True, slots=True)
class Retry:
    """By what a request is known when it comes again. name: 16 bytes, the tenant's own. body: digest of what is
    asked, where another body under the same name is refused. attaches: this one means the response that was
    begun under its name, where there is one; else it only leaves its name for those that come."""

    name: bytes
    body: bytes | None = None
    attaches: bool = False


def digest16(*parts: bytes) -> bytes:
    """16 bytes that tell these parts from any others."""
    whole = blake2b(digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8))
        whole.update(part)
    return whole.digest()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the headers say.

    thread_key: the session the client names, or None.
    kind:       codex's request kind; only a `turn` becomes part of the thread.
    lineage:    what codex tells of forks, parents and windows; stored as it is.
    forked_from: the thread key this thread was copied from, where codex says so.
    bearer:     the client's own credential, for upstreams that are set to pass it on.
    turn_id:    codex's name for the turn; all requests of the turn have it.
    retry:      by what the request is known when it comes again, as far as the headers tell.
    """

    tenant: str = ""
    thread_key: str | None = None
    kind: str = "turn"
    lineage: Mapping[str, Any] = field(default_factory=dict)
    forked_from: str | None = None
    bearer: str | None = None
    turn_id: str | None = None
    retry: Retry | None = None


_MOST_NAME = 512
_Name = Annotated[str, StringConstraints(max_length=_MOST_NAME, pattern=r"^[^\x00]*$")]
"""What becomes a column or is looked up there. PostgreSQL takes no NUL, and nothing long into an index."""
_Metadata = dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]]


class _Conversation(BaseModel):
    id: _Name


class _Body(BaseModel):
    """The top level of the body. Every field may be null unless it is required."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: _Name = Field(min_length=1)
    input: Any = None
    instructions: str | None = None
    previous_response_id: _Name | None = None
    conversation: _Name | _Conversation | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: Annotated[_Metadata, Field(max_length=16)] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=16)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    context_management: list[Any] | None = None
    prompt: Any = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=128)] | None = None
    user: str | None = None
    moderation: dict[str, Any] | None = None
    access_programs: Any = None
    image: Any = None
    client_metadata: dict[str, Any] | None = None


KNOWN_FIELDS = frozenset(_Body.model_fields)


def parse_request(
    body: object,
    *,
    max_items: int = 10_000,
    strict: bool = False,
    extra: frozenset[str] = frozenset(),
) -> Request:
    """Check `body`, the parsed JSON of a create request. Raises `InvalidRequest` and its kin.

    extra: fields beyond the API's that an upstream is set to be given.
    """
    if not isinstance(body, dict):
        raise InvalidType("The request body must be a JSON object.")
    if body.get("messages") is not None and "input" not in body:
        raise UnsupportedParameter("Unsupported parameter: 'messages'. The Responses API takes 'input' instead.")
    _check_top(body)
    unknown = [name for name in body if name not in KNOWN_FIELDS and name not in extra]
    if strict and unknown:
        raise UnknownParameter(f"Unknown parameter: '{unknown[0][:100]}'.", param=unknown[0][:100])
    items = _check_input(body["input"], max_items)
    tools = _check_tools(body.get("tools") or ())
    _check_formats(body)
    conversation = body.get("conversation")
    request = Request(
        body=body,
        model=body["model"],
        input=items,
        tools=tools,
        previous_response_id=body.get("previous_response_id") or None,
        conversation=conversation["id"] if isinstance(conversation, dict) else conversation,
        store=body.get("store") is not False,
        background=body.get("background") is True,
        stream=body.get("stream") is True,
        unknown=unknown,
    )
    _check_state(request)
    return request


def _check_top(body: dict[str, Any]) -> None:
    try:
        _Body.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from None
    if "input" not in body or body["input"] is None:
        raise MissingParameter("Missing required parameter: 'input'.", param="input")


_TYPES = {
    "string_type": "a string",
    "bool_type": "a boolean",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": ("below_min_value", ">=", "ge"),
    "less_than_equal": ("above_max_value", "<=", "le"),
}


_NOT_PATH = ("str", "constrained-str", "_Conversation", "[key]", "dict[str,any]")


def _first_error(error: ValidationError) -> IngressError:
    """Our error for pydantic's first complaint."""
    first = error.errors(include_url=False, include_input=True)[0]
    path = [part for part in first["loc"] if part not in _NOT_PATH]
    param = ".".join(str(part)[:100] for part in path)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return MissingParameter(f"Missing required parameter: '{param}'.", param=param)
    if kind in _TYPES:
        return InvalidType(f"Invalid type for '{param}': expected {_TYPES[kind]}.", param=param)
    if kind in _BOUNDS:
        code, sign, key = _BOUNDS[kind]
        number = "integer" if isinstance(context[key], int) else "decimal"
        return InvalidValue(
            f"Invalid '{param}': expected a value {sign} {context[key]:g}.", param=param, code=f"{number}_{code}"
        )
    if kind == "too_long":
        return InvalidValue(
            f"Invalid '{param}': at most {context['max_length']} properties are allowed.",
            param=param,
            code="object_above_max_properties",
        )
    if kind == "string_too_long":
        return InvalidValue(
            f"Invalid '{param}': at most {context['max_length']} characters are allowed.",
            param=param,
            code="string_above_max_length",
        )
    if kind == "string_pattern_mismatch":
        return InvalidValue(f"Invalid value for '{param}': it holds a NUL character.", param=param)
    return InvalidValue(f"Invalid value for '{param}': {first['msg']}.", param=param)


def _check_state(request: Request) -> None:
    if request.previous_response_id is not None and request.conversation is not None:
        raise MutuallyExclusive("'previous_response_id' and 'conversation' cannot be used together.")
    if request.body.get("prompt") is not None:
        raise NotFound("Prompt not found: this server stores no prompts.")
    if not request.input and request.previous_response_id is None and request.conversation is None:
        raise MissingParameter("One of 'input', 'previous_response_id' or 'conversation' must be given.")


def _check_input(given: object, max_items: int) -> list[Item]:
    if isinstance(given, str):
        return [user_message(given)] if given else []
    if not isinstance(given, list):
        raise InvalidType("Invalid type for 'input': expected a string or an array of items.", param="input")
    if len(given) > max_items:
        raise InvalidValue(
            f"Invalid 'input': at most {max_items} items are allowed.", param="input", code="array_above_max_length"
        )
    return [_check_item(item, f"input[{at}]") for at, item in enumerate(given)]


# Fields an item of a known type cannot do without. Anything else is left to the backend.
_REQUIRED: dict[str, tuple[tuple[str, type | tuple[type, ...]], ...]] = {
    "function_call": (("call_id", str), ("name", str), ("arguments", str)),
    "function_call_output": (("call_id", str), ("output", (str, list))),
    "custom_tool_call": (("call_id", str), ("name", str), ("input", str)),
    "custom_tool_call_output": (("call_id", str), ("output", (str, list))),
    "additional_tools": (("tools", list),),
    "item_reference": (("id", str),),
}
_MOST_TYPE = 128
_ROLES = ("user", "assistant", "system", "developer")
# Fields that are lists of parts where they are lists. In other items they can be anything.
_LISTS: dict[str, tuple[str, ...]] = {
    "message": ("content",),
    "reasoning": ("summary", "content"),
    "function_call_output": ("output",),
    "custom_tool_call_output": ("output",),
}


def _check_item(item: object, path: str) -> Item:
    if not isinstance(item, dict):
        raise InvalidType(f"Invalid type for '{path}': expected an object.", param=path)
    item = _typed(item, path)
    type = item["type"]
    id = item.get("id")
    if isinstance(id, str) and (not 0 < len(id) <= _MOST_NAME or "\0" in id):
        raise InvalidValue(
            f"Invalid value for '{path}.id': expected 1 to {_MOST_NAME} characters and no NUL.", param=f"{path}.id"
        )
    if type == "message":
        _check_message(item, path)
    for name, kinds in _REQUIRED.get(type, ()):
        _check_field(item, name, kinds, path)
    if type == "additional_tools":
        _check_tools(item["tools"], f"{path}.tools")
    for name in _LISTS.get(type, ()):
        if isinstance(item.get(name), list):
            _check_parts(item[name], f"{path}.{name}")
    return item


def _typed(item: Item, path: str) -> Item:
    """The item with its `type`, which clients leave out of messages and references."""
    type = item.get("type")
    if isinstance(type, str):
        if len(type) > _MOST_TYPE or "\0" in type:
            raise InvalidValue(
                f"Invalid value for '{path}.type': at most {_MOST_TYPE} characters without NUL are allowed.",
                param=f"{path}.type",
            )
        return item
    if type is not None:
        raise InvalidType(f"Invalid type for '{path}.type': expected a string.", param=f"{path}.type")
    if "role" in item:
        return {**item, "type": "message"}
    if isinstance(item.get("id"), str):
        return {**item, "type": "item_reference"}
    raise MissingParameter(f"Missing required parameter: '{path}.type'.", param=f"{path}.type")


def _check_message(item: Item, path: str) -> None:
    role = item.get("role")
    if role is None:
        raise MissingParameter(f"Missing required parameter: '{path}.role'.", param=f"{path}.role")
    if role not in _ROLES:
        raise InvalidValue(
            f"Invalid value for '{path}.role': expected one of {', '.join(_ROLES)}.", param=f"{path}.role"
        )
    if not isinstance(item.get("content"), str | list | None):
        raise InvalidType(f"Invalid type for '{path}.content': expected a string or an array.", param=f"{path}.content")


def _check_field(item: Item, name: str, kinds: type | tuple[type, ...], path: str) -> None:
    if item.get(name) is None:
        raise MissingParameter(f"Missing required parameter: '{path}.{name}'.", param=f"{path}.{name}")
    if not isinstance(item[name], kinds):
        raise InvalidType(f"Invalid type for '{path}.{name}'.", param=f"{path}.{name}")


def _check_parts(parts: list[Any], path: str) -> None:
    for at, part in enumerate(parts):
        if not isinstance(part, dict):
            raise InvalidType(f"Invalid type for '{path}[{at}]': expected an object.", param=f"{path}[{at}]")
        if not isinstance(part.get("type"), str):
            raise MissingParameter(f"Missing required parameter: '{path}[{at}].type'.", param=f"{path}[{at}].type")
        if not isinstance(part.get("text"), str | None):
            raise InvalidType(f"Invalid type for '{path}[{at}].text': expected a string.", param=f"{path}[{at}].text")


def _check_tools(tools: Sequence[Any], path: str = "tools") -> Sequence[Tool]:
    for at, tool in enumerate(tools):
        where = f"{path}[{at}]"
        if not isinstance(tool, dict):
            raise InvalidType(f"Invalid type for '{where}': expected an object.", param=where)
        if not isinstance(tool.get("type"), str):
            raise MissingParameter(f"Missing required parameter: '{where}.type'.", param=f"{where}.type")
        if tool["type"] in ("function", "custom", "namespace"):
            _check_field(tool, "name", str, where)
        if tool["type"] == "namespace":
            _check_field(tool, "tools", list, where)
            _check_tools(tool["tools"], f"{where}.tools")
    return tools


_FORMATS = ("text", "json_object", "json_schema")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_CHOICES = ("auto", "none", "required")


def _check_formats(body: Mapping[str, Any]) -> None:
    """The small nested objects whose values decide what a backend is asked for."""
    format = (body.get("text") or {}).get("format")
    if format is not None:
        if not isinstance(format, dict):
            raise InvalidType("Invalid type for 'text.format': expected an object.", param="text.format")
        _check_choice(format.get("type"), _FORMATS, "text.format.type")
        if format["type"] == "json_schema":
            _check_field(format, "name", str, "text.format")
            _check_field(format, "schema", dict, "text.format")
    effort = (body.get("reasoning") or {}).get("effort")
    if effort is not None:
        _check_choice(effort, _EFFORTS, "reasoning.effort")
    choice = body.get("tool_choice")
    if isinstance(choice, str):
        _check_choice(choice, _CHOICES, "tool_choice")
    elif choice is not None and not isinstance(choice.get("type"), str):
        raise MissingParameter("Missing required parameter: 'tool_choice.type'.", param="tool_choice.type")


def _check_choice(value: object, allowed: Sequence[str], param: str) -> None:
    if value is None:
        raise MissingParameter(f"Missing required parameter: '{param}'.", param=param)
    if value not in allowed:
        raise InvalidValue(f"Invalid value for '{param}': expected one of {', '.join(allowed)}.", param=param)
