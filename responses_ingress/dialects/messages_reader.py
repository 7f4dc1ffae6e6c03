"""Anthropic messages, their side to ours: events, a whole message or an error become deltas.

What must stay true: a message without a stop reason is truncated, never completed; a call that the end cut
short is never told as done; thinking keeps what its backend needs to take it back (`sealed`); blocks of
kinds we do not know (server tools, compaction) are passed over. Knows nothing of HTTP, SSE or time.
`messages` is the way there.

Texts that follow each other are one text: answers with citations come in dozens of blocks, cut in the
middle of sentences (recorded: model_web_search_tool_stream).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from responses_ingress.core.deltas import Close, Delta, Finish, Item, Kind, Note, Open, Status, Text
from responses_ingress.core.items import seal
from responses_ingress.dialects.failures import in_band
from responses_ingress.dialects.line import Call, Entry, Piece, Prose
from responses_ingress.dialects.tools import ToolMap
from responses_ingress.errors import UpstreamInvalid, UpstreamTruncated

Json = dict[str, Any]

# pause_turn comes with server tools only, which are never asked for: what was said is the answer. After a
# refusal the text so far stands, as with a content filter.
_ENDINGS: Mapping[str, tuple[Status, str | None]] = {
    "end_turn": ("completed", None),
    "stop_sequence": ("completed", None),
    "tool_use": ("completed", None),
    "pause_turn": ("completed", None),
    "max_tokens": ("incomplete", "max_output_tokens"),
    "model_context_window_exceeded": ("incomplete", "max_output_tokens"),
    "refusal": ("incomplete", "content_filter"),
}


class _Thought(Prose):
    """Thinking, open or redacted. `secret` is what its block holds besides the text."""

    def __init__(self, kind: Kind, secret: Json) -> None:
        super().__init__("reasoning")
        self.kind = kind
        self.secret = secret
        self._texts: list[str] = []

    def deltas(self, piece: Piece) -> list[Delta]:
        self._texts.append(piece.text)
        return super().deltas(piece)

    def final(self, backend: str) -> Item:
        """The item with the block in it: clients drop or change the text, and then the signature is wrong."""
        text = "".join(self._texts)
        item = self.skeleton()
        if text:
            item["summary" if self.kind == "summary_text" else "content"] = [{"type": self.kind, "text": text}]
        if "data" in self.secret:
            block = {"type": "redacted_thinking", **self.secret}
        elif self.secret.get("signature"):
            block = {"type": "thinking", "thinking": text, **self.secret}
        else:
            return item
        return {**item, "encrypted_content": seal(backend, orjson.dumps(block).decode())}


class MessagesReader:
    """One answer. `feed` every event, then `end`; or `read_json` once. `summarized`: thinking is told as the
    summary that the client asked for, else as reasoning text."""

    def __init__(self, tools: ToolMap, backend: str, *, summarized: bool = False) -> None:
        self._tools = tools
        self._backend = backend
        self._thinking: Kind = "summary_text" if summarized else "reasoning_text"
        self._out: list[Delta] = []
        self._next = 0
        self._entry: Entry | None = None
        """The item under way. It may go on over several blocks, and a call waits to be known as whole."""
        self._block = ""
        """The type of the block under way ("other" for one that is passed over), and its index."""
        self._index: int | None = None
        self._input: Json = {}
        self._pieces = 0
        self._length = 0
        """Of the message's text; where the block's text begins in it; what it cites."""
        self._start = 0
        self._citations: list[Json] = []
        self._used: Json = {}
        self._reason: str | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the answer is whole: its stop reason has come."""
        return self._reason is not None

    @property
    def ended(self) -> bool:
        """Whether its `Finish` has been given."""
        return self._ended

    def feed(self, event: Any) -> list[Delta]:
        """The deltas of one event. Raises `UpstreamInvalid` for what is none, `UpstreamTruncated` for an end
        without a stop reason."""
        event = _object(event)
        handle = _EVENTS.get(str(event.get("type")))
        if handle is None or self._ended:
            return []
        handle(self, event)
        return self._take()

    def end(self) -> list[Delta]:
        """The stream is over. Raises `UpstreamTruncated` if it broke off."""
        if not self._ended:
            self._finish()
        return self._take()

    def fail(self, body: Any) -> list[Delta]:
        """The upstream says, inside of a 200, that it failed."""
        self._ended = True
        self._out.append(Finish("failed", error=in_band(body), usage=_usage(self._used)))
        return self._take()

    def read_json(self, body: Any) -> list[Delta]:
        """All deltas of a message that was not streamed. Raises as `feed` does."""
        if _object(body).get("type") == "error" or body.get("error"):
            return self.fail(body)
        if not isinstance(body.get("content"), list):
            raise _invalid()
        self._count(body.get("usage"))
        for block in body["content"]:
            self._begin(_object(block))
            self._stop()
        reason = body.get("stop_reason")
        self._reason = str(reason) if reason else None
        return self.end()

    # Events

    def _message_start(self, event: Json) -> None:
        self._count(_object(event.get("message")).get("usage"))

    def _block_start(self, event: Json) -> None:
        self._begin(_object(event.get("content_block")))
        self._index = event.get("index")

    def _block_delta(self, event: Json) -> None:
        delta = _object(event.get("delta"))
        block, handle = _DELTAS.get(str(delta.get("type")), (self._block, None))
        if not self._block or event.get("index") != self._index:
            raise _invalid()
        if self._block == "other" or handle is None:
            return
        if block != self._block:
            raise _invalid()
        handle(self, delta)

    def _block_stop(self, event: Json) -> None:
        if self._block and event.get("index") == self._index:
            self._stop()

    def _message_delta(self, event: Json) -> None:
        self._count(event.get("usage"))
        reason = _object(event.get("delta")).get("stop_reason")
        if reason and self._reason is None:
            self._reason = str(reason)

    def _message_stop(self, event: Json) -> None:
        self._finish()

    def _error(self, event: Json) -> None:
        self._out = self.fail(event)

    # Blocks

    def _begin(self, block: Json) -> None:
        if self._block:
            self._stop()
        type = str(block.get("type"))
        begin = _BLOCKS.get(type)
        if begin is None:
            self._close()
            self._block = "other"
        else:
            self._block = type
            begin(self, block)

    def _stop(self) -> None:
        block, self._block = self._block, ""
        if block == "text":
            self._cite()
        elif block == "tool_use":
            self._stop_call()
        elif block != "other":
            self._close()

    def _begin_text(self, block: Json) -> None:
        if not isinstance(self._entry, Prose) or self._entry.type != "message":
            self._close()
            self._entry = Prose("message")
            self._length = 0
        self._start = self._length
        self._text(block)
        citations = block.get("citations")
        self._citations = [_object(citation) for citation in citations] if isinstance(citations, list) else []

    def _begin_thinking(self, block: Json) -> None:
        self._open(_Thought(self._thinking, {}))
        self._thought(block)
        self._sign(block)

    def _begin_redacted(self, block: Json) -> None:
        self._open(_Thought(self._thinking, {"data": _string(block.get("data"))}))

    def _begin_call(self, block: Json) -> None:
        call = Call(self._tools)
        call.id, call.name = _string(block.get("id")), _string(block.get("name"))
        if not call.name:
            raise _invalid()
        self._input, self._pieces = _object(block.get("input") or {}), 0
        self._open(call)

    def _stop_call(self) -> None:
        """Only arguments that streamed prove that they are whole. A call of which that is not known stays
        open: what comes next tells whether the end cut it short."""
        entry = self._entry
        if not self._pieces and self._input:
            self._say(Piece(None, orjson.dumps(self._input).decode()))
        elif entry is not None and self._pieces and entry.is_whole():
            self._close()

    def _cite(self) -> None:
        entry = self._entry
        if entry is not None and entry.state == "open":
            notes = (_note(citation, self._start, self._length) for citation in self._citations)
            self._out += [Note(entry.index, note) for note in notes if note]

    # Deltas of blocks

    def _text(self, delta: Json) -> None:
        text = _string(delta.get("text") or "")
        self._length += len(text)
        self._say(Piece("output_text", text))

    def _thought(self, delta: Json) -> None:
        self._say(Piece(self._thinking, _string(delta.get("thinking") or "")))

    def _sign(self, delta: Json) -> None:
        signature = _string(delta.get("signature") or "")
        if isinstance(self._entry, _Thought) and signature:
            self._entry.secret["signature"] = signature

    def _arguments(self, delta: Json) -> None:
        piece = _string(delta.get("partial_json") or "")
        self._pieces += bool(piece)
        self._say(Piece(None, piece))

    def _citation(self, delta: Json) -> None:
        self._citations.append(_object(delta.get("citation")))

    # Items

    def _say(self, piece: Piece) -> None:
        entry = self._entry
        if entry is None or not piece.text:
            return
        if entry.state == "waiting":
            self._enter(entry)
        self._out += entry.deltas(piece)

    def _open(self, entry: Entry) -> None:
        self._close()
        self._entry = entry
        self._enter(entry)

    def _enter(self, entry: Entry) -> None:
        entry.state, entry.index = "open", self._next
        self._next += 1
        self._out.append(Open(entry.index, entry.skeleton()))

    def _close(self) -> None:
        entry, self._entry = self._entry, None
        if entry is None or entry.state != "open":
            return
        if rest := entry.rest():
            self._out.append(Text(entry.index, rest))
        self._out.append(Close(entry.index, entry.final(self._backend) if isinstance(entry, _Thought) else None))

    # The end

    def _count(self, usage: Any) -> None:
        """Usage is told twice, and what is told last holds (recorded: with server tools it grows)."""
        if isinstance(usage, dict):
            self._used |= {name: value for name, value in usage.items() if value is not None}

    def _finish(self) -> None:
        if self._reason is None:
            raise UpstreamTruncated("The upstream's answer broke off: it ended without a stop reason.")
        status, why = _ENDINGS.get(self._reason, ("failed", None))
        if status == "completed" and self._block == "tool_use" and self._entry and not self._entry.is_whole():
            raise UpstreamTruncated("The upstream's answer broke off in the middle of a call.")
        if self._block:
            self._stop()
        error = None
        if status == "completed":
            self._close()
        elif status == "failed":
            message = f"The upstream ended for an unknown reason: '{self._reason[:100]}'."
            error = {"code": "upstream_invalid", "message": message}
        self._ended = True
        self._out.append(Finish(status, why, error, _usage(self._used)))

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out


_EVENTS: Mapping[str, Callable[[MessagesReader, Json], None]] = {
    "message_start": MessagesReader._message_start,
    "content_block_start": MessagesReader._block_start,
    "content_block_delta": MessagesReader._block_delta,
    "content_block_stop": MessagesReader._block_stop,
    "message_delta": MessagesReader._message_delta,
    "message_stop": MessagesReader._message_stop,
    "error": MessagesReader._error,
}

_BLOCKS: Mapping[str, Callable[[MessagesReader, Json], None]] = {
    "text": MessagesReader._begin_text,
    "thinking": MessagesReader._begin_thinking,
    "redacted_thinking": MessagesReader._begin_redacted,
    "tool_use": MessagesReader._begin_call,
}


class _DeltaKind(NamedTuple):
    """The type of block that a delta goes into, and how."""

    block: str
    handle: Callable[[MessagesReader, Json], None]


_DELTAS: Mapping[str, _DeltaKind] = {
    "text_delta": _DeltaKind("text", MessagesReader._text),
    "citations_delta": _DeltaKind("text", MessagesReader._citation),
    "thinking_delta": _DeltaKind("thinking", MessagesReader._thought),
    "signature_delta": _DeltaKind("thinking", MessagesReader._sign),
    "input_json_delta": _DeltaKind("tool_use", MessagesReader._arguments),
}


def _note(citation: Json, start: int, end: int) -> Json | None:
    """A citation of a page, or of an uploaded file; of a document in the request there is nothing to name."""
    url, file = citation.get("url"), citation.get("file_id")
    if isinstance(url, str):
        title = citation.get("title")
        place = {"start_index": start, "end_index": end}
        return {"type": "url_citation", **place, "url": url, "title": title if isinstance(title, str) else ""}
    if isinstance(file, str):
        name = citation.get("document_title")
        filename = name if isinstance(name, str) else ""
        return {"type": "file_citation", "file_id": file, "filename": filename, "index": end}
    return None


def _usage(used: Json) -> Json | None:
    """The Responses usage object: there, cached tokens are part of the input."""
    if not used:
        return None
    read, wrote = _number(used, "cache_read_input_tokens"), _number(used, "cache_creation_input_tokens")
    total_read, written = _number(used, "input_tokens") + read + wrote, _number(used, "output_tokens")
    thought = _number(used.get("output_tokens_details"), "thinking_tokens")
    return {
        "input_tokens": total_read,
        "input_tokens_details": {"cached_tokens": read, "cache_write_tokens": wrote},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": total_read + written,
    }


def _number(used: Any, name: str) -> int:
    value = used.get(name) if isinstance(used, dict) else None
    return int(value) if isinstance(value, (int, float)) and value > 0 else 0


def _object(value: Any) -> Json:
    if not isinstance(value, dict):
        raise _invalid()
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _invalid()
    return value


def _invalid() -> UpstreamInvalid:
    return UpstreamInvalid("The upstream's answer is no message of the Anthropic API.")
