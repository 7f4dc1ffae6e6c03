"""The backend for servers that speak the Responses API themselves: OpenAI, OpenRouter, DeepSeek, vLLM, another
one of ours.

All that is dialect is in dialects/responses and responses_encoder; here is when things happen. What must
stay true: an upstream is asked again only where it has refused, before anything was yielded and once for
each reason; nothing that is ours to say (model, tools, metadata, ids) is taken from an upstream's answer.
"""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import orjson

from responses_ingress.backends.exchange import deltas_of, model_names
from responses_ingress.backends.upstream import Answer, Client, Upstream
from responses_ingress.core.deltas import Close, Delta, Finish, Item, Remember
from responses_ingress.core.envelope import DEFAULTS
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.responses import ResponsesReader
from responses_ingress.dialects.responses_encoder import (
    ResponsesOptions,
    complaint,
    continued,
    encode,
    memory_of,
)

logger = logging.getLogger(__name__)

PATH = "/responses"

_MOST_PLAIN = 256
"""Models remembered: where a route passes on any name, a client could name ever new ones."""

_OURS = frozenset([*DEFAULTS, "model", "conversation", "prompt", "input", "output_text"]) - {"service_tier"}
"""Fields of a response that tell of the request: the client's was another one than the upstream's."""

_NO_OPEN_REASONING = ("openai.com", "azure.com", "chatgpt.com")
"""Hosts whose models refuse reasoning that is not encrypted."""


def options_for(url: str, options: ResponsesOptions) -> ResponsesOptions:
    """`options` with what is known of the upstream at `url`."""
    host = urlsplit(url).hostname or ""
    if any(host == known or host.endswith(f".{known}") for known in _NO_OPEN_REASONING):
        return replace(options, open_reasoning=False)
    return options


class Asker:
    """Asks one upstream for turns. A refusal that leaving something out would mend is mended."""

    def __init__(self, client: Client, options: ResponsesOptions) -> None:
        self._client = client
        self._name = client.upstream.name
        self.options = options_for(client.upstream.url, options)
        self._plain: dict[str, None] = {}
        """Models that have no encrypted reasoning to ask for."""

    async def ask(self, turn: Turn, more: Mapping[str, Any] | None = None, key: str | None = None) -> Answer:
        """The answer to `turn`, which is no refusal; the caller closes it. `more` are fields for the body.
        `key` makes an idempotency key, together with what is sent."""
        options = self.options
        if turn.model in self._plain:
            options = replace(options, encrypted_reasoning=False)
        previous = continued(turn, options, self._name)
        while True:
            call = encode(turn, options, self._name, previous)
            body = orjson.dumps({**call.body, **(more or {})})
            answer = await self._client.post(PATH, body, turn.bearer, _headers(key, body))
            if answer.status < 400:
                if not options.encrypted_reasoning and self.options.encrypted_reasoning:
                    self._plain[turn.model] = None
                    if len(self._plain) > _MOST_PLAIN:
                        del self._plain[next(iter(self._plain))]
                self._tell(turn, call.foreign)
                return answer
            said = await answer.read_refusal()
            field = complaint(answer.status, said)
            if field == "previous_response_id" and previous is not None:
                logger.info("upstream %s cannot continue its response; %s goes whole", self._name, turn.response_id)
                previous = None
            elif field == "include" and options.encrypted_reasoning:
                options = replace(options, encrypted_reasoning=False)
            else:
                raise read_error(answer.status, said, answer.retry_after)

    def _tell(self, turn: Turn, foreign: int) -> None:
        if foreign:
            text = "upstream %s does not get the encrypted content of %d items of %s: another backend made it"
            logger.info(text, self._name, foreign, turn.response_id)


def _headers(key: str | None, body: bytes) -> dict[str, str]:
    """A refused body that was mended is another request, and must not be answered as the first one was."""
    if key is None:
        return {}
    return {"idempotency-key": f"{key}-{blake2b(body, digest_size=8).hexdigest()}"}


class ResponsesBackend:
    """One Responses server, which streams, or answers when it is done. `goes_on`: its runs go on when nobody
    follows them."""

    resumable = False

    def __init__(self, upstream: Upstream, options: ResponsesOptions, *, goes_on: bool = False) -> None:
        self.goes_on = goes_on
        self._upstream = upstream
        self._client = Client(upstream)
        self._asker = Asker(self._client, options)

    @property
    def name(self) -> str:
        return self._upstream.name

    async def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        reader = ResponsesReader(self.name)
        ending = _Ending(turn, self._asker.options, self.name)
        answer = await self._asker.ask(turn)

        def step(name: str | None, event: Any) -> list[Delta]:
            return reader.feed(_typed(name, event))

        async with aclosing(deltas_of(answer, reader, step)) as batches:
            async for deltas in batches:
                yield ending.passed(deltas, reader.envelope)

    async def models(self) -> Sequence[str]:
        return await model_names(self._client)

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        pass

    async def close(self) -> None:
        await self._client.close()


class _Ending:
    """Watches an answer, for what is to be remembered of it when it ends."""

    def __init__(self, turn: Turn, options: ResponsesOptions, backend: str) -> None:
        self._turn = turn
        self._options = options
        self._backend = backend
        self._output: dict[int, Item | None] = {}

    def passed(self, deltas: Sequence[Delta], envelope: Mapping[str, Any] | None) -> Sequence[Delta]:
        """`deltas` as they leave the backend. `envelope` is the upstream's response object."""
        if self._options.chain:
            self._output |= {delta.index: delta.item for delta in deltas if type(delta) is Close}
        finish = deltas[-1]
        if not isinstance(finish, Finish):
            return deltas
        return [*deltas[:-1], *self._memory(finish, envelope or {}), without_ours(finish)]

    def _memory(self, finish: Finish, envelope: Mapping[str, Any]) -> list[Delta]:
        output = self._output | dict(finish.items or {})
        items = [output[index] for index in sorted(output)]
        known = [item for item in items if item is not None]
        if finish.status != "completed" or len(known) < len(items):
            return []
        state = memory_of(self._turn, self._options, self._backend, envelope.get("id"), known)
        return [Remember(state)] if state else []


def without_ours(finish: Finish) -> Finish:
    """`finish` without what only our own server knows of the response."""
    echo = {name: value for name, value in (finish.echo or {}).items() if name not in _OURS}
    return replace(finish, echo=echo or None)


def _typed(name: str | None, event: Any) -> Any:
    """`event` with its type: some name an event on its own line only."""
    nameless = name is not None and isinstance(event, dict) and "type" not in event and not event.get("error")
    return {"type": name, **event} if nameless else event
