"""One model behind every kind of upstream: what it says in a turn, in the words of each kind, and how it fails.

What must stay true: the same `Saying` means the same in every kind; a cast knows of its upstream's dialect and of
nothing of ours.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from responses_ingress.core.deltas import Finish
from responses_ingress.core.replay import deltas_of
from tests.core.shapes import ENVELOPE, USAGE, call, custom_call, events_of, message, reasoning, text_item
from tests.responses_upstream import Provider, named, response
from tests.upstream import Answer, Close, Received, Reply, Stream, Upstream, call_chunks, chunk, usage, words

Json = dict[str, Any]
Frame = Mapping[str, Any] | bytes

Fault = Literal["error", "truncated", "silent"]
"""What happens behind the first word: the upstream tells of an error, breaks off, or says nothing more."""


class Piece(NamedTuple):
    """Something a model says. `name` is a called tool's; its arguments, or its input, are the `text`."""

    kind: Literal["text", "refusal", "reasoning", "function", "custom"]
    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Saying:
    """All that a model says in one turn."""

    pieces: Sequence[Piece]
    cut: bool = False
    """It has come to its limit of tokens."""

    @property
    def calls(self) -> bool:
        return any(piece.kind in ("function", "custom") for piece in self.pieces)


class Cast:
    """A model behind one kind of upstream. `settings` are those of the upstream, but for its url."""

    settings: Mapping[str, Any] = {}
    close: Close = "end"
    asks = 1
    """Requests that the first turn with tools takes."""
    codes: Mapping[Fault, str] = {
        "error": "server_error",
        "truncated": "upstream_truncated",
        "silent": "upstream_timeout",
    }
    refused: tuple[str, str | None] = ("completed", None)
    """Status and reason of an answer that the model refuses to give."""

    def __init__(self) -> None:
        self.server: Upstream = Upstream()

    def says(self, saying: Saying, stream: bool = True) -> None:
        """In its next turn."""
        self._next(Stream(self.frames(saying), close=self.close) if stream else Reply(self.whole(saying)))

    def fails(self, saying: Saying, fault: Fault) -> None:
        begun = self.begun(saying)
        if fault == "error":
            self._next(Stream([*begun, self.error()], close="end"))
        else:
            self._next(Stream(begun, close="eof" if fault == "truncated" else "silent"))

    def pauses(self, saying: Saying, hold: asyncio.Event) -> None:
        """Say the first word, and the others when `hold` is set."""
        begun = self.begun(saying)
        self._next(Stream([*begun, hold, *self.frames(saying)[len(begun) :]], close=self.close))

    def refuses(self, status: int, retry_after: int) -> None:
        """Instead of its next turn."""
        error = {"error": {"type": "some_error", "message": "Not now"}}
        self._next(Reply(error, status=status, headers={"retry-after": str(retry_after)}))

    def begun(self, saying: Saying) -> list[Frame]:
        """The frames up to the first word of the text."""
        frames = self.frames(saying)
        text = next(piece.text for piece in saying.pieces if piece.kind == "text").split(" ")[0].encode()
        return frames[: 1 + next(at for at, frame in enumerate(frames) if text in _bytes(frame))]

    @property
    def heard(self) -> Any:
        """What it was asked in its last turn."""
        return self.server.calls[-1].json

    async def left(self) -> None:
        """Wait until its client has left in the middle of its first turn."""
        await self.server.closed(0)

    def _next(self, answer: Answer) -> None:
        self.server.script(answer)

    def frames(self, saying: Saying) -> list[Frame]:
        raise NotImplementedError

    def whole(self, saying: Saying) -> Json:
        raise NotImplementedError

    def error(self) -> Frame:
        raise NotImplementedError


def _bytes(frame: Frame) -> bytes:
    return frame if isinstance(frame, bytes) else orjson.dumps(frame)


def flat(piece: Piece) -> str:
    """What a function is called with that stands for a custom tool."""
    return piece.text if piece.kind == "function" else orjson.dumps({"input": piece.text}).decode()


class Chat(Cast):
    settings: Mapping[str, Any] = {"kind": "chat"}
    close: Close = "done"

    def frames(self, saying: Saying) -> list[Frame]:
        frames: list[Frame] = [chunk({"role": "assistant", "content": ""})]
        calls = 0
        for piece in saying.pieces:
            if piece.kind in ("function", "custom"):
                turn = len(self.server.requests)
                frames += call_chunks(piece.name, flat(piece), turn=turn, index=calls)
                calls += 1
            else:
                field = {"text": "content", "reasoning": "reasoning_content"}.get(piece.kind, piece.kind)
                frames += [chunk({field: word}) for word in words(piece.text)]
        reason = "length" if saying.cut else "tool_calls" if saying.calls else "stop"
        return [*frames, chunk(finish=reason), {**chunk(), "choices": [], "usage": usage(10, 5)}]

    def whole(self, saying: Saying) -> Json:
        said: Json = {"role": "assistant", "content": None}
        calls: list[Json] = []
        for piece in saying.pieces:
            if piece.kind in ("function", "custom"):
                function = {"name": piece.name, "arguments": flat(piece)}
                calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
            else:
                said[{"text": "content", "reasoning": "reasoning_content"}.get(piece.kind, piece.kind)] = piece.text
        reason = "length" if saying.cut else "tool_calls" if calls else "stop"
        choice = {"index": 0, "message": said | ({"tool_calls": calls} if calls else {}), "finish_reason": reason}
        return {"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage(10, 5)}

    def error(self) -> Frame:
        return {"error": {"message": "It broke.", "type": "server_error"}}


class Emulated(Chat):
    """A chat server without tools, of which it is known: its model writes calls as it is taught."""

    settings: Mapping[str, Any] = {"kind": "chat", "tools": "emulated"}

    def frames(self, saying: Saying) -> list[Frame]:
        return super().frames(self._written(saying))

    def whole(self, saying: Saying) -> Json:
        written = self._written(saying)
        texts = [piece for piece in written.pieces if piece.kind == "text"]
        others = [piece for piece in written.pieces if piece.kind != "text"]
        joined = [Piece("text", "".join(piece.text for piece in texts))] if texts else []
        return super().whole(Saying([*others, *joined], written.cut))

    def _written(self, saying: Saying) -> Saying:
        pieces = [
            piece if piece.kind in ("text", "reasoning", "refusal") else Piece("text", _call_block(piece))
            for piece in saying.pieces
        ]
        return Saying(pieces, saying.cut)


def _call_block(piece: Piece) -> str:
    return f'\n<tool_call>\n{{"name": "{piece.name}", "arguments": {flat(piece)}}}\n</tool_call>'


class Toolless(Emulated):
    """A chat server without tools, of which it is not known: it refuses them."""

    settings: Mapping[str, Any] = {"kind": "chat"}
    asks = 2

    def __init__(self) -> None:
        super().__init__()
        self._answers: deque[Answer] = deque()
        self.server.answer = self._answer

    def _next(self, answer: Answer) -> None:
        self._answers.append(answer)

    def _answer(self, received: Received) -> Answer:
        if received.json.get("tools"):
            return Reply({"error": {"message": "m does not support tools"}}, status=400)
        return self._answers.popleft()


class Messages(Cast):
    settings: Mapping[str, Any] = {"kind": "messages", "thinking": "budget"}
    refused = ("incomplete", "content_filter")

    def frames(self, saying: Saying) -> list[Frame]:
        start = {"type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 10}}
        frames: list[Json] = [{"type": "message_start", "message": start}, {"type": "ping"}]
        for index, piece in enumerate(saying.pieces):
            frames += [
                {"type": "content_block_start", "index": index, "content_block": self._block(index, piece, empty=True)},
                *({"type": "content_block_delta", "index": index, "delta": delta} for delta in _deltas(piece)),
                {"type": "content_block_stop", "index": index},
            ]
        delta = {"stop_reason": _stop_reason(saying), "stop_sequence": None}
        frames += [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": 5}}, {"type": "message_stop"}]
        return [named(frame) for frame in frames]

    def whole(self, saying: Saying) -> Json:
        return {
            "type": "message",
            "role": "assistant",
            "content": [self._block(index, piece) for index, piece in enumerate(saying.pieces)],
            "stop_reason": _stop_reason(saying),
            "usage": {"input_tokens": 10, "output_tokens": 5},
        }

    def error(self) -> Frame:
        return named({"type": "error", "error": {"type": "api_error", "message": "It broke."}})

    def _block(self, index: int, piece: Piece, empty: bool = False) -> Json:
        text = "" if empty else piece.text
        if piece.kind == "reasoning":
            return {"type": "thinking", "thinking": text, "signature": "" if empty else "signed"}
        if piece.kind in ("text", "refusal"):
            return {"type": "text", "text": text}
        id = f"toolu_{len(self.server.requests)}_{index}"
        input = {} if empty else orjson.loads(flat(piece))
        return {"type": "tool_use", "id": id, "name": piece.name, "input": input}


def _deltas(piece: Piece) -> list[Json]:
    match piece.kind:
        case "reasoning":
            thoughts = [{"type": "thinking_delta", "thinking": word} for word in words(piece.text)]
            return [*thoughts, {"type": "signature_delta", "signature": "signed"}]
        case "text" | "refusal":
            return [{"type": "text_delta", "text": word} for word in words(piece.text)]
    return [{"type": "input_json_delta", "partial_json": part} for part in ("", *words(flat(piece)))]


def _stop_reason(saying: Saying) -> str:
    if saying.cut:
        return "max_tokens"
    if any(piece.kind == "refusal" for piece in saying.pieces):
        return "refusal"
    return "tool_use" if saying.calls else "end_turn"


class Responses(Cast):
    settings: Mapping[str, Any] = {"kind": "responses"}

    def __init__(self) -> None:
        super().__init__()
        self.provider = Provider()
        self.server = self.provider

    def frames(self, saying: Saying) -> list[Frame]:
        status, reason = ("incomplete", "max_output_tokens") if saying.cut else ("completed", None)
        finish = Finish("incomplete" if saying.cut else "completed", reason=reason, usage=USAGE, at=1_760_000_009)
        events = events_of([*deltas_of(self._output(saying)), finish], {**ENVELOPE, "id": "resp_theirs"})
        assert events[-1]["response"]["status"] == status
        return [named(event) for event in events]

    def whole(self, saying: Saying) -> Json:
        details = {"reason": "max_output_tokens"} if saying.cut else None
        status = "incomplete" if saying.cut else "completed"
        return response(status, *self._output(saying), usage=USAGE, incomplete_details=details)

    def error(self) -> Frame:
        return named({"type": "error", "error": {"code": "server_error", "message": "It broke.", "param": None}})

    def _output(self, saying: Saying) -> list[Json]:
        return [self._item(index, piece) for index, piece in enumerate(saying.pieces)]

    def _item(self, index: int, piece: Piece) -> Json:
        id = f"item_{index}"
        call_id = f"call_{len(self.server.requests)}_{index}"
        done = {"status": "completed", "call_id": call_id, "name": piece.name}
        match piece.kind:
            case "text":
                return text_item(piece.text, id)
            case "refusal":
                return {**message(id), "status": "completed", "content": [{"type": "refusal", "refusal": piece.text}]}
            case "reasoning":
                thought = {"type": "reasoning_text", "text": piece.text}
                return {**reasoning(id), "content": [thought], "encrypted_content": "gAAAA"}
            case "function":
                return {**call(id), **done, "arguments": piece.text}
        return {**custom_call(id), **done, "input": piece.text}


class Background(Responses):
    """A provider that is polled: in the middle of its work it has nothing to show, and a request that is not
    answered leaves open whether it has begun."""

    settings: Mapping[str, Any] = {"kind": "background", "first_poll": 0.01, "longest_poll": 0.01}
    codes: Mapping[Fault, str] = {
        "error": "server_error",
        "truncated": "upstream_create_unknown",
        "silent": "upstream_create_unknown",
    }

    def says(self, saying: Saying, stream: bool = True) -> None:
        self._begins()
        self.provider.looks(Reply(self.whole(saying)))

    def fails(self, saying: Saying, fault: Fault) -> None:
        if fault == "error":
            self._begins()
            error = {"code": "server_error", "message": "It broke."}
            self.provider.looks(Reply(response("failed", error=error)))
        elif fault == "truncated":
            body = orjson.dumps(response("queued"))
            self._next(Stream([body[:50]], close="eof", headers={"content-type": "application/json"}))
        else:
            self._next(Reply({}, hold=asyncio.Event()))

    def pauses(self, saying: Saying, hold: asyncio.Event) -> None:
        self._begins()
        self.provider.looks(Reply(self.whole(saying), hold=hold))

    async def left(self) -> None:
        await self.provider.cancelled()

    def _begins(self) -> None:
        self.provider.looks_over()
        self._next(Reply(response("queued")))
        self.provider.looks(Reply(response("queued")), Reply(response("in_progress")))


CASTS: Mapping[str, type[Cast]] = {
    "chat": Chat,
    "emulated": Emulated,
    "toolless": Toolless,
    "messages": Messages,
    "responses": Responses,
    "background": Background,
}
