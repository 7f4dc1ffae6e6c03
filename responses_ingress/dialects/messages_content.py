"""Content of items as blocks of an Anthropic message: text, images, documents, sealed thinking.

What must stay true: no block is blank; what the API takes in no form is refused, never dropped, for it
would change what the message says. Knows nothing of items or of messages.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import orjson

from responses_ingress.core.items import part_text, parts_of
from responses_ingress.errors import InvalidRequest

Block = dict[str, Any]

THINKING = frozenset(("thinking", "redacted_thinking"))
"""Types of blocks that only the model may write."""


def thought_of(unsealed: str | None) -> Block | None:
    """The block that `messages_reader` had sealed. Clients hold it, so it may be anything by now."""
    try:
        block = orjson.loads(unsealed or "")
    except orjson.JSONDecodeError:
        return None
    match block:
        case {"type": "thinking", "thinking": str(text), "signature": str(signature)}:
            return {"type": "thinking", "thinking": text, "signature": signature}
        case {"type": "redacted_thinking", "data": str(data)}:
            return {"type": "redacted_thinking", "data": data}
    return None


def text_block(text: str) -> Block:
    return {"type": "text", "text": text}


def blocks_of(content: object) -> list[Block]:
    return [block for part in parts_of(content) if (block := _block(part))]


def _block(part: Mapping[str, Any]) -> Block | None:
    match part.get("type"):
        case "input_image":
            return {"type": "image", "source": _source(part.get("image_url"), "image")}
        case "input_file":
            return _document(part)
        case "input_audio":
            raise _refused("This model takes no audio.")
    text = part_text(part)
    return text_block(text) if text.strip() else None


def _source(url: object, what: str) -> dict[str, Any]:
    if isinstance(url, str) and url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    kind, data = _data(url)
    if not kind:
        raise _refused(f"This model takes an {what} only as a URL or as a base64 data URL, not as 'file_id'.")
    return {"type": "base64", "media_type": kind, "data": data}


def _data(url: object) -> tuple[str, str]:
    """The media type and the base64 data of a data URL; nothing for what is none."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    kind, *parameters = head.removeprefix("data:").split(";")
    if not comma or not head.startswith("data:") or "base64" not in parameters:
        return "", ""
    return kind or "text/plain", data


def _document(part: Mapping[str, Any]) -> Block:
    """PDF and plain text are what the API takes. OpenAI takes bare base64 too: of a PDF."""
    given = part.get("file_data")
    if given and isinstance(given, str) and not given.startswith("data:"):
        given = f"data:application/pdf;base64,{given}"
    source = _source(part.get("file_url") or given, "'input_file'")
    if source["type"] == "base64" and source["media_type"] != "application/pdf":
        source = {"type": "text", "media_type": "text/plain", "data": _plain(source)}
    title = part.get("filename")
    return {"type": "document", "source": source, **({"title": title} if title else {})}


def _plain(source: Mapping[str, Any]) -> str:
    if not source["media_type"].startswith(("text/", "application/json")):
        raise _refused(f"This model takes files of type PDF and text, not '{source['media_type'][:100]}'.")
    try:
        return base64.b64decode(source["data"], validate=True).decode("utf-8", "replace")
    except binascii.Error:
        raise _refused("The base64 data of a file is not valid.") from None


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="input")
