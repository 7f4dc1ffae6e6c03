"""The backend for chat-completions servers: vLLM, Ollama, llama.cpp, vendors.

All that is chat is in dialects/chat; how an answer is read, in backends/exchange.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from responses_ingress.backends.exchange import LeftOut, deltas_of, model_names
from responses_ingress.backends.upstream import Client, Upstream
from responses_ingress.core.deltas import Delta
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatCall, ChatOptions, encode
from responses_ingress.dialects.chat_reader import ChatReader
from responses_ingress.dialects.failures import read_error


class ChatBackend:
    """One chat-completions server. `goes_on`: its runs go on when nobody follows them."""

    resumable = False

    def __init__(self, upstream: Upstream, options: ChatOptions, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._upstream = upstream
        self._options = options
        self._client = Client(upstream)
        self._left_out = LeftOut(upstream.name)

    @property
    def name(self) -> str:
        return self._upstream.name

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        call = encode(turn, self._options)
        self._left_out.tell(call.dropped)
        return self._stream(call, turn.bearer)

    async def _stream(self, call: ChatCall, bearer: str | None) -> AsyncGenerator[Sequence[Delta], None]:
        reader = ChatReader(call.tools)
        answer = await self._client.post("/chat/completions", orjson.dumps(call.body), bearer)
        if answer.status >= 400:
            raise read_error(answer.status, await answer.read_refusal(), answer.retry_after)

        def step(name: str | None, chunk: Any) -> list[Delta]:
            return reader.fail(chunk) if name == "error" else reader.feed(chunk)

        async with aclosing(deltas_of(answer, reader, step)) as batches:
            async for deltas in batches:
                yield deltas

    async def models(self) -> Sequence[str]:
        return await model_names(self._client)

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        pass

    async def close(self) -> None:
        await self._client.close()
