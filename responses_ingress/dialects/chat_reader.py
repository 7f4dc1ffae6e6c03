"""Chat completions, their side to ours: chunks, a whole completion or an error become deltas.

What must stay true: items never interleave, so one that begins while a tool call is unfinished waits
until that call is whole; no text and no call is lost; a stream without a finish reason is truncated,
never completed. Knows nothing of HTTP, SSE or time. `chat` is the way there.

The habits of servers that this reader puts up with are those of the recorded answers of 14 vendors
(`tests/recorded/test_chat_streams.py`) and a few that others are known for; each is named where it is met.
"""

from typing import Any

import orjson

from responses_ingress.core.deltas import Delta, Finish, Kind, Status, Text
from responses_ingress.dialects.failures import in_band
from responses_ingress.dialects.line import Calls, Line, Piece
from responses_ingress.dialects.tools import ToolMap
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated

Json = dict[str, Any]

# The documented reasons, and those of Together (eos) and Mistral (model_length).
_ENDINGS: dict[str, tuple[Status, str | None]] = {
    "stop": ("completed", None),
    "eos": ("completed", None),
    "tool_calls": ("completed", None),
    "function_call": ("completed", None),
    "length": ("incomplete", "max_output_tokens"),
    "model_length": ("incomplete", "max_output_tokens"),
    "content_filter": ("incomplete", "content_filter"),
}

# What a delta can hold besides text.
_OTHER = frozenset(
    ("reasoning_content", "reasoning", "reasoning_details", "refusal", "annotations", "tool_calls", "function_call")
)


class ChatReader:
    """One answer. `feed` every chunk, then `end`; or `read_json` once."""

    def __init__(self, tools: ToolMap) -> None:
        self._line = Line()
        self._calls = Calls(tools)
        self._notes: list[Json] = []
        self._usage: Json | None = None
        self._reason: str | None = None
        self._ended = False
        self._plain: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is whole: its finish reason has come. Its usage may be still to come."""
        return self._reason is not None

    @property
    def ended(self) -> bool:
        """Whether its `Finish` has been given."""
        return self._ended

    def feed(self, chunk: Any) -> list[Delta]:
        """The deltas of one chunk. Raises `UpstreamInvalid` for what is none."""
        # By far the most chunks are text for the message that is open: no state changes with them.
        if self._plain is not None and (text := _plain_text(chunk)):
            return [Text(self._plain, text)]
        if self._ended:
            return []
        deltas = self._read(_object(chunk))
        self._plain = None if self._ended else self._line.open_text()
        return deltas

    def end(self) -> list[Delta]:
        """The stream is over. Raises `UpstreamTruncated` if it broke off."""
        if self._ended:
            return []
        if self._reason is None:
            raise UpstreamTruncated("The upstream's answer broke off: it ended without a finish reason.")
        return self._finish(self._reason)

    def fail(self, body: Any) -> list[Delta]:
        """The upstream says, inside of a 200, that it failed: `{"error": …}`, or the data of an `error` event."""
        self._ended, self._plain = True, None
        return [*self._line.take(), Finish("failed", error=in_band(body), usage=_usage(self._usage))]

    def read_json(self, body: Any) -> list[Delta]:
        """All deltas of a completion that was not streamed. Raises `UpstreamInvalid` for what is none."""
        self._usage = _usage_in(_object(body))
        if body.get("error"):
            return self.fail(body)
        choice = _choice(body)
        if choice is None:
            raise _invalid()
        message = dict(_object(choice.get("message")))
        # Here one entry is one call, whatever its id and index say (Mistral, Together: 0 for each).
        calls = _objects(message.get("tool_calls"))
        message["tool_calls"] = [{**call, "index": number} for number, call in enumerate(calls)]
        self._take(message, choice)
        # Snowflake gives an empty reason; a body that came whole is not truncated.
        return self._finish(str(choice.get("finish_reason") or "stop"))

    def _read(self, chunk: Json) -> list[Delta]:
        self._usage = _usage_in(chunk) or self._usage
        if chunk.get("error"):
            return self.fail(chunk)
        # None: usage, Azure's prompt filter results, OpenAI's moderation.
        choice = _choice(chunk)
        if choice is not None:
            self._take(choice.get("delta") or {}, choice)
            reason = choice.get("finish_reason")
            # OpenRouter says it twice.
            if reason and self._reason is None:
                self._reason = str(reason)
                self._line.drain(everything=_ending(self._reason)[0] == "completed")
        return self._line.take()

    def _take(self, delta: Any, choice: Json) -> None:
        delta = _object(delta)
        logprobs = _logprobs(choice)
        for kind, text in _prose(delta):
            self._line.say(Piece(kind, text, logprobs if kind == "output_text" else None))
        if self._notes or delta.get("annotations"):
            self._note(delta.get("annotations"))
        if calls := delta.get("tool_calls"):
            for given in _objects(calls):
                self._call(given)
        # What calls were before there were several. Snowflake sends an empty one with every message.
        legacy = delta.get("function_call")
        if legacy and any(_object(legacy).values()):
            self._call({"index": 0, "function": legacy})

    def _call(self, given: Json) -> None:
        function = _object(given.get("function") or {})
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        index = given.get("index")
        call = self._calls.find(
            index if isinstance(index, int) else None,
            id=str(given.get("id") or ""),
            name=str(function.get("name") or ""),
            arguments=arguments,
        )
        self._line.put(call, Piece(None, arguments))

    def _note(self, annotations: Any) -> None:
        """OpenRouter's citations come before the text they are about."""
        self._notes += [note for given in _dicts(annotations) if (note := _citation(given))]
        index = self._line.open_text()
        if index is not None:
            self._line.note(index, self._notes)
            self._notes = []

    def _finish(self, reason: str) -> list[Delta]:
        self._ended, self._plain = True, None
        status, why = _ending(reason)
        self._line.drain(everything=status == "completed")
        error = None
        if status == "failed":
            error = {"code": "upstream_invalid", "message": f"The upstream ended for an unknown reason: '{reason}'."}
        return [*self._line.take(), Finish(status, why, error, _usage(self._usage))]


def _ending(reason: str) -> tuple[Status, str | None]:
    return _ENDINGS.get(reason, ("failed", None))


def _plain_text(chunk: Any) -> str | None:
    """The text of a chunk that holds nothing else, or None. Malformed ones are for the slow path to refuse."""
    try:
        if chunk.get("usage") or "error" in chunk or "x_groq" in chunk:
            return None
        choice = chunk["choices"][0]
        delta = choice["delta"]
        if choice.get("finish_reason") or choice.get("logprobs") or choice.get("index"):
            return None
        text = delta["content"] if delta.keys().isdisjoint(_OTHER) else None
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    return text if type(text) is str else None


def _prose(delta: Json) -> list[tuple[Kind, str]]:
    found: list[tuple[Kind, str]] = []
    if reasoning := _reasoning(delta):
        found.append(("reasoning_text", reasoning))
    content = delta.get("content")
    if isinstance(content, list):
        found += [made for part in content if (made := _content_part(_object(part)))[1]]
    elif content:
        found.append(("output_text", _string(content)))
    if delta.get("refusal"):
        found.append(("refusal", _string(delta["refusal"])))
    return found


def _reasoning(delta: Json) -> str:
    """Some servers say the same in two fields (OpenRouter): the first that holds text counts."""
    for name in ("reasoning_content", "reasoning"):
        text = delta.get(name)
        if text and isinstance(text, str):
            return text
    return _joined(delta.get("reasoning_details"), "text", "summary")


def _content_part(part: Json) -> tuple[Kind, str]:
    """Mistral: `{"type": "thinking", "thinking": [{"type": "text", …}]}` among text parts."""
    if part.get("type") == "thinking":
        thinking = part.get("thinking")
        return "reasoning_text", thinking if isinstance(thinking, str) else _joined(thinking, "text")
    return "output_text", _joined([part], "text")


def _joined(parts: Any, *fields: str) -> str:
    texts = (part.get(field) for part in _dicts(parts) for field in fields)
    return "".join(text for text in texts if isinstance(text, str))


def _logprobs(choice: Json) -> list[Any] | None:
    logprobs = choice.get("logprobs")
    return logprobs.get("content") or None if isinstance(logprobs, dict) else None


def _citation(annotation: Json) -> Json | None:
    nested = annotation.get("url_citation")
    if not isinstance(nested, dict):
        return None
    return {
        "type": "url_citation",
        "start_index": nested.get("start_index") or 0,
        "end_index": nested.get("end_index") or 0,
        "url": nested.get("url") or "",
        "title": nested.get("title") or "",
    }


def _choice(body: Json) -> Json | None:
    """The first choice; more than one is never asked for."""
    for choice in _objects(body.get("choices")):
        if not choice.get("index"):
            return choice
    return None


def _usage_in(body: Json) -> Json | None:
    groq = body.get("x_groq")
    usage = body.get("usage") or (groq.get("usage") if isinstance(groq, dict) else None)
    return usage if isinstance(usage, dict) else None


def _usage(given: Json | None) -> Json | None:
    """The Responses usage object. Cached tokens also where DeepSeek, Together and Mistral put them."""
    if given is None:
        return None
    read, wrote = _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    of_prompt, of_answer = given.get("prompt_tokens_details"), given.get("completion_tokens_details")
    cached = _count(of_prompt, "cached_tokens") or _count(
        given, "prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens"
    )
    return {
        "input_tokens": read,
        "input_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": _count(of_prompt, "cache_write_tokens"),
        },
        "output_tokens": wrote,
        "output_tokens_details": {"reasoning_tokens": _count(of_answer, "reasoning_tokens")},
        "total_tokens": _count(given, "total_tokens") or read + wrote,
    }


def _count(given: Any, *names: str) -> int:
    """The first of the numbers that is there and not 0."""
    values = (given.get(name) for name in names) if isinstance(given, dict) else ()
    return next((int(value) for value in values if isinstance(value, (int, float)) and value > 0), 0)


def _dicts(value: Any) -> list[Json]:
    """For what is not worth failing over: the objects in a list, if it is one."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise _invalid()
    return value


def _objects(value: Any) -> list[Json]:
    if value is not None and not isinstance(value, list):
        raise _invalid()
    return [_object(entry) for entry in value or ()]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid()
    return value


def _invalid() -> UpstreamInvalid:
    return UpstreamInvalid("The upstream's answer is no chat completion.")
