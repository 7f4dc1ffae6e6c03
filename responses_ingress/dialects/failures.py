"""What upstreams say when they fail, as our errors: HTTP error bodies and errors inside of a 200.

What must stay true: a client learns whether it can mend the request (4xx), wait (429, 503) or must give
up; a full context has one code, `context_length_exceeded`, whatever the upstream calls it, because
clients compact on it; trouble with the upstream's own key never looks like trouble with the client's.
Knows nothing of which upstream it was.
"""

import re
from typing import Any, NamedTuple

import orjson

from responses_ingress.errors import ContextLengthExceeded, IngressError, UpstreamError, UpstreamRefused

_LONGEST = 500
_KEPT = frozenset({400, 401, 403, 404, 413, 429})
_MAPPED = {408: 504, 503: 503, 504: 504, 529: 503}
_OWN_KEY = frozenset({401, 403})
_NO_ACCESS = "The upstream refused its credentials."
"""All that is said of them: what upstreams say shows parts of the operator's key, or whose it is."""

_OVERFLOW = re.compile(
    "|".join(
        (
            r"context.(length|window).exceeded",  # the code of OpenAI, Azure, Groq, DeepSeek
            r"exceed_context_size",  # llama.cpp's type
            r"maximum context length",  # OpenAI, vLLM, OpenRouter, Mistral, SGLang
            r"(exceed\w*|longer than|greater than) .{0,60}context (length|window|size|limit)",  # LM Studio, Ollama
            r"context (length|window|size|limit) .{0,40}exceed",
            r"maximum (model|prompt) length",  # vLLM, xAI
            r"(prompt|input) (is )?too long",  # Anthropic, Bedrock, Ollama
            r"too long to fit into the model",  # older vLLM
            r"input token count .{0,80}exceed",  # Gemini
            r"reduce the length of the (messages|prompt)",  # Groq, OpenAI
            r"exceeded model token limit",  # Moonshot
            r"`inputs` (tokens|must have less)",  # TGI
        )
    ),
    re.IGNORECASE | re.DOTALL,
)
# Gemini and xAI say it with 400. Nothing else names the code or the words.
_KEY_TROUBLE = re.compile(r"(invalid|incorrect).api.?key|api.?key.not.valid|authentication_error", re.IGNORECASE)
_OVERLOADED = re.compile(r"overloaded", re.IGNORECASE)  # Anthropic, whose status for it is 529
_RATE_LIMIT = re.compile(r"rate.?limit|too many requests", re.IGNORECASE)


class _Trouble(NamedTuple):
    """What could be read of an error. `code` and `kind` are the upstream's own, `number` its status."""

    message: str
    code: str = ""
    kind: str = ""
    number: int = 0

    @property
    def is_overflow(self) -> bool:
        return not self.is_rate_limit and bool(_OVERFLOW.search(f"{self.code} {self.kind} {self.message}"))

    @property
    def is_own_key(self) -> bool:
        return self.number in _OWN_KEY or bool(_KEY_TROUBLE.search(f"{self.code} {self.kind} {self.message}"))

    @property
    def is_overloaded(self) -> bool:
        return self.number == 529 or bool(_OVERLOADED.search(f"{self.code} {self.kind}"))

    @property
    def is_rate_limit(self) -> bool:
        return self.number == 429 or bool(_RATE_LIMIT.search(f"{self.code} {self.kind}"))


def read_error(status: int, body: bytes, retry_after: float | None = None) -> IngressError:
    """The error for an upstream's answer with a status other than 200."""
    trouble = _read(body)._replace(number=status)
    if trouble.is_own_key:
        return UpstreamRefused(_NO_ACCESS, status=_status(status), retry_after=retry_after)
    code = _code(trouble)
    what = "refused the request" if status < 500 else "failed"
    message = _sentence(f"The upstream {what} (status {status})", trouble.message)
    if code == "context_length_exceeded":
        return ContextLengthExceeded(message, param="input")
    mapped = _status(status)
    kind = UpstreamRefused if 400 <= mapped < 500 else UpstreamError
    return kind(message, code=code, status=mapped, retry_after=retry_after)


def in_band(body: Any) -> dict[str, str]:
    """The error of a failed response, for an error object in the middle of a 200."""
    trouble = _find(body)
    if trouble.is_own_key:
        return {"code": "upstream_refused", "message": _NO_ACCESS}
    code = "server_error"
    if trouble.is_rate_limit or _RATE_LIMIT.search(trouble.message):
        code = "rate_limit_exceeded"
    elif trouble.is_overflow:
        code = "context_length_exceeded"
    elif trouble.is_overloaded:
        code = "server_is_overloaded"
    name = trouble.code or trouble.kind or (f"status {trouble.number}" if trouble.number else "")
    what = f"The upstream reported an error ({name})" if name else "The upstream reported an error"
    return {"code": code, "message": _sentence(what, trouble.message)}


def _sentence(what: str, said: str) -> str:
    whole = f"{what}: {said}" if said else what
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."


def _status(status: int) -> int:
    if status in _KEPT:
        return status
    return _MAPPED.get(status, 400 if 400 <= status < 500 else 502)


def _code(trouble: _Trouble) -> str | None:
    if trouble.is_overflow:
        return "context_length_exceeded"
    if trouble.is_overloaded:
        return "server_is_overloaded"
    return trouble.code or ("rate_limit_exceeded" if trouble.is_rate_limit else None)


def _read(body: bytes) -> _Trouble:
    try:
        return _find(orjson.loads(body))
    except orjson.JSONDecodeError:
        text = body[: 4 * _LONGEST].decode("utf-8", "replace").strip()
        return _Trouble("" if text.startswith("<") else text[:_LONGEST])


def _find(body: Any) -> _Trouble:
    """The error in a body: under `error` (OpenAI and most), bare (vLLM, Mistral), in `detail` (FastAPI), in
    a list (Gemini), or just a string (Ollama)."""
    if isinstance(body, list) and body:
        return _find(body[0])
    if isinstance(body, str):
        return _Trouble(body[:_LONGEST])
    if not isinstance(body, dict):
        return _Trouble("")
    for key in ("error", "detail"):
        if isinstance(body.get(key), (dict, list, str)) and body[key]:
            inner = _find(body[key])
            if inner.message:
                return inner
    code, kind = body.get("code"), body.get("type")
    number = code if isinstance(code, int) else body.get("status_code")
    return _Trouble(
        _message(body)[:_LONGEST],
        code=code if isinstance(code, str) else "",
        kind=kind if isinstance(kind, str) else "",
        number=number if isinstance(number, int) else 0,
    )


def _message(error: dict[str, Any]) -> str:
    """OpenRouter's own message is always the same; what the provider behind it said is in `metadata.raw`."""
    message = error.get("message") or error.get("msg")
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return " ".join(text for text in (message, raw) if isinstance(text, str) and text)
