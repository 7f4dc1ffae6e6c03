"""The backend for servers of the Anthropic Messages API.

All that is of that API is in dialects/messages; how an answer is read, in backends/exchange. A request that is
refused because of the earlier thinking in it is asked once more without: a key, a model or the instructions may
have changed since.
"""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from responses_ingress.backends.exchange import LeftOut, deltas_of, model_names
from responses_ingress.backends.upstream import Answer, Client, Upstream
from responses_ingress.core.deltas import Delta
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.messages import MessagesCall, MessagesOptions, encode, refuses_thinking
from responses_ingress.dialects.messages_reader import MessagesReader

logger = logging.getLogger(__name__)

_VERSION = ("anthropic-version", "2023-06-01")


class MessagesBackend:
    """One server of the Messages API. `goes_on`: its runs go on when nobody follows them."""

    resumable = False

    def __init__(self, upstream: Upstream, options: MessagesOptions, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._upstream = _versioned(upstream)
        self._options = options
        self._client = Client(self._upstream)
        self._left_out = LeftOut(upstream.name)

    @property
    def name(self) -> str:
        return self._upstream.name

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        call = encode(turn, self._options, self.name)
        self._left_out.tell(call.dropped, *(["reasoning of other backends"] if call.foreign else []))
        return self._stream(turn, call)

    async def _stream(self, turn: Turn, call: MessagesCall) -> AsyncGenerator[Sequence[Delta], None]:
        reader = MessagesReader(call.tools, self.name, summarized=call.summarized)
        answer = await self._ask(turn, call)

        def step(name: str | None, event: Any) -> list[Delta]:
            return reader.fail(event) if name == "error" else reader.feed(event)

        async with aclosing(deltas_of(answer, reader, step)) as batches:
            async for deltas in batches:
                yield deltas

    async def _ask(self, turn: Turn, call: MessagesCall) -> Answer:
        """The answer to the call, or to the call without earlier thinking. Raises what the upstream refuses."""
        answer = await self._client.post("/messages", orjson.dumps(call.body), turn.bearer)
        if answer.status < 400:
            return answer
        body = await answer.read_refusal()
        if call.recalls and refuses_thinking(answer.status, body):
            logger.info("upstream %s refuses its earlier thinking and is asked again without", self.name)
            return await self._ask(turn, encode(turn, self._options, self.name, recall=False))
        raise read_error(answer.status, body, answer.retry_after)

    async def models(self) -> Sequence[str]:
        return await model_names(self._client, "/models?limit=1000")  # without a limit there are 20 on a page

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        pass

    async def close(self) -> None:
        await self._client.close()


def _versioned(upstream: Upstream) -> Upstream:
    """The upstream with the header that the API demands, unless the operator has set it."""
    name, version = _VERSION
    if any(header.lower() == name for header in upstream.headers):
        return upstream
    return replace(upstream, headers={name: version, **upstream.headers})
