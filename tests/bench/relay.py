"""The practical ceiling: the least that a Python server can do between a Responses client and a
chat-completions upstream. No store, no validation, no error handling, no ids worth the name.

It has what any such server must have: uvicorn with uvloop and httptools, aiohttp, the request parsed and
translated, each upstream chunk parsed and made an event, and all that one read brings sent at once.

    python -m tests.bench.relay PORT http://127.0.0.1:UPSTREAM/v1
"""

import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import orjson
import uvicorn

Json = dict[str, Any]
Send = Callable[[Json], Awaitable[None]]
Receive = Callable[[], Awaitable[Json]]

_JSON_HEADERS = [(b"content-type", b"application/json")]
_SSE_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]


class Relay:
    """The ASGI application."""

    def __init__(self, upstream: str) -> None:
        self._url = f"{upstream}/chat/completions"
        self._session: aiohttp.ClientSession | None = None
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Json, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["method"] == "POST":
            await self._create(orjson.loads(await _read(receive)), send)
        else:
            await _reply(send, b'{"status":"ok"}')

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _create(self, request: Json, send: Send) -> None:
        assert self._session is not None
        body = orjson.dumps(to_chat(request))
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            if request.get("stream"):
                await self._relay(request, answer, send)
            else:
                await _reply(send, self._whole(request, orjson.loads(await answer.read())))

    def _whole(self, request: Json, chat: Json) -> bytes:
        number = next(self._numbers)
        text = chat["choices"][0]["message"]["content"]
        return orjson.dumps(_response(request, number, "completed", [_message(number, text)], chat["usage"]))

    async def _relay(self, request: Json, answer: aiohttp.ClientResponse, send: Send) -> None:
        stream = _Stream(request, next(self._numbers))
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        await _send_more(send, b"".join(stream.start()))
        buffer = b""
        async for data in answer.content.iter_any():
            *events, buffer = (buffer + data).split(b"\n\n")
            out = b"".join(filter(None, map(stream.translate, events)))
            if out:
                await _send_more(send, out)
        await send({"type": "http.response.body", "body": b"".join(stream.end())})


class _Stream:
    """Chat chunks in, Responses events out."""

    def __init__(self, request: Json, number: int) -> None:
        self._request = request
        self._number = number
        self._sequence = itertools.count()
        self._text: list[str] = []
        self._usage: Json | None = None
        self._message = _message(number, "")

    def start(self) -> Iterator[bytes]:
        opened = _response(self._request, self._number, "in_progress", [], None)
        yield self._event("response.created", {"response": opened})
        yield self._event("response.in_progress", {"response": opened})
        item = {**self._message, "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", {"output_index": 0, "item": item})
        yield self._event("response.content_part.added", self._at({"part": self._message["content"][0]}))

    def translate(self, event: bytes) -> bytes:
        if event == b"data: [DONE]":
            return b""
        chunk = orjson.loads(event[6:])
        self._usage = chunk.get("usage") or self._usage
        if not chunk["choices"]:
            return b""
        text = chunk["choices"][0]["delta"].get("content")
        if not text:
            return b""
        self._text.append(text)
        return self._event("response.output_text.delta", self._at({"delta": text, "logprobs": []}))

    def end(self) -> Iterator[bytes]:
        text = "".join(self._text)
        item = _message(self._number, text)
        yield self._event("response.output_text.done", self._at({"text": text, "logprobs": []}))
        yield self._event("response.content_part.done", self._at({"part": item["content"][0]}))
        yield self._event("response.output_item.done", {"output_index": 0, "item": item})
        ended = _response(self._request, self._number, "completed", [item], self._usage)
        yield self._event("response.completed", {"response": ended})

    def _at(self, fields: Json) -> Json:
        return {"item_id": self._message["id"], "output_index": 0, "content_index": 0, **fields}

    def _event(self, type: str, fields: Json) -> bytes:
        data = orjson.dumps({"type": type, "sequence_number": next(self._sequence), **fields})
        return b"event: %b\ndata: %b\n\n" % (type.encode(), data)


def _message(number: int, text: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{number:050x}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }


def _response(request: Json, number: int, status: str, output: list[Json], usage: Json | None) -> Json:
    return {
        "id": f"resp_{number:050x}",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": status,
        "model": request["model"],
        "output": output,
        "instructions": request.get("instructions"),
        "tools": request.get("tools", []),
        "usage": usage and _usage(usage),
    }


def _usage(usage: Json) -> Json:
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }


def to_chat(request: Json) -> Json:
    """The chat-completions request."""
    chat: Json = {"model": request["model"], "messages": _messages(request)}
    if request.get("stream"):
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True}
    tools = [made for tool in request.get("tools", ()) for made in _tools(tool)]
    if tools:
        chat["tools"] = tools
        chat["tool_choice"] = request.get("tool_choice", "auto")
    return chat


def _messages(request: Json) -> list[Json]:
    messages: list[Json] = []
    if request.get("instructions"):
        messages.append({"role": "system", "content": request["instructions"]})
    given = request["input"]
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": given}]
    for item in given:
        _add_item(messages, item)
    return messages


def _add_item(messages: list[Json], item: Json) -> None:
    type = item.get("type", "message")
    if type == "message":
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _text(item["content"])})
    elif type in ("function_call", "custom_tool_call"):
        arguments = item["arguments"] if type == "function_call" else orjson.dumps({"input": item["input"]}).decode()
        call = {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": arguments},
        }
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif type in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})


def _text(content: str | list[Json]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _tools(tool: Json) -> Iterator[Json]:
    if tool["type"] == "function":
        yield _function(tool["name"], tool.get("description"), tool["parameters"])
    elif tool["type"] == "custom":
        parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        yield _function(tool["name"], tool.get("description"), parameters)
    elif tool["type"] == "namespace":
        for nested in tool["tools"]:
            yield _function(f"{tool['name']}__{nested['name']}", nested.get("description"), nested["parameters"])


def _function(name: str, description: str | None, parameters: Json) -> Json:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


async def _read(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message["body"]
    if not message.get("more_body"):
        return body
    parts = [body]
    while message.get("more_body"):
        message = await receive()
        parts.append(message["body"])
    return b"".join(parts)


async def _reply(send: Send, body: bytes) -> None:
    headers = [*_JSON_HEADERS, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


if __name__ == "__main__":
    uvicorn.run(
        Relay(sys.argv[2]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        backlog=2048,
    )
