"""The backend for slow Responses providers: they take a request in the background, and are asked for its answer
until it is there, minutes or a day later.

What must stay true: upstream a response is created at most once: that it will be is yielded as memory before
it is, and its id before it is asked for; whoever has that memory can go on, in another process too; a provider
that cannot be reached is asked again until its time is up; ending the iteration does not end the work upstream
(`cancel` does), but for a response whose id nobody has got yet.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from responses_ingress.backends.exchange import model_names
from responses_ingress.backends.responses import PATH, Asker, without_ours
from responses_ingress.backends.upstream import Client, Upstream, may_have_begun, parse_json
from responses_ingress.core.deltas import Accepted, Delta, Finish, Remember
from responses_ingress.core.replay import ended_as
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.failures import read_error
from responses_ingress.dialects.responses import ResponsesReader
from responses_ingress.dialects.responses_encoder import ResponsesOptions
from responses_ingress.errors import (
    IngressError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)

logger = logging.getLogger(__name__)

_PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that say nothing of the response itself."""

_KEYS = frozenset({401, 403})
"""Statuses of a key, which operators change while responses are under way."""

_GONE = frozenset({404, 410})
_SETTLING = 60.0
"""Seconds in which a provider may not know yet, at every place, the response that it has created."""

_BUSY = 503

_SLOWER = 1.5
"""How much longer each wait is than the one before."""

_JITTER = 0.25
"""The part of a wait that is left to chance, so that many responses do not ask at once."""

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION = re.compile(r"(\d{1,6})([smhd])")

_EXPIRED = {"code": "upstream_expired", "message": "The upstream did not begin or end within its completion window."}


@dataclass(frozen=True, slots=True)
class BackgroundOptions:
    """How one provider is used in the background. Times are seconds.

    requests:          how it wants its requests; `chain` means nothing here.
    completion_window: how long the provider may take, in its own words (`24h`, `standard`), where a request's
                       `metadata.completion_window` does not say.
    window_in:         the request field that takes the window. OpenAI's is `background_options`.
    idempotency:       the provider honours `Idempotency-Key`, so that a create whose answer was lost can be
                       repeated, once.
    first_poll:        the first wait; each is longer by half, up to `longest_poll`. A `Retry-After` that asks
                       for more is followed.
    poll_timeout:      for one poll.
    patience:          how long a response may take whose window is no duration.
    margin:            how much longer than its window it may take, before it is given up and cancelled.
    cancel_timeout:    for telling the provider to cancel.
    """

    requests: ResponsesOptions = field(default_factory=ResponsesOptions)
    completion_window: str | None = None
    window_in: Literal["metadata", "background_options"] = "metadata"
    idempotency: bool = False
    first_poll: float = 1.0
    longest_poll: float = 30.0
    poll_timeout: float = 60.0
    patience: float = 86_400.0
    margin: float = 3_600.0
    cancel_timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Time and chance. `clock` is unix time, since a deadline outlives the process."""

    clock: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: Callable[[], float] = random.random


class _Look(NamedTuple):
    """What one poll brought: the response, or trouble that may pass. `wait` is what the provider asks for."""

    response: Mapping[str, Any] | None = None
    wait: float | None = None
    trouble: IngressError | None = None


class BackgroundBackend:
    """One provider that is polled."""

    resumable = True
    goes_on = True

    def __init__(self, upstream: Upstream, options: BackgroundOptions, pace: Pace | None = None) -> None:
        self._upstream = upstream
        self._options = options
        self._pace = pace or Pace()
        self._client = Client(upstream)
        self._creator = Client(upstream, keep=False)
        self._asker = Asker(self._creator, replace(options.requests, chain=False))
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return self._upstream.name

    async def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        state = turn.resume
        if state is None or "response_id" not in state:
            if state is None:
                state = {"creating": True, "items": len(turn.items), "until": self._deadline(turn)}
                yield [Remember(state)]
            else:
                self._check_repeated(state, turn)
            created = await self._create(turn)
            if _is_over(created):
                yield self._answer(created)
                return
            state = {"response_id": self._id_of(created), "until": state["until"], "since": self._pace.clock()}
            yield [Remember(state), *_accepted(created)]
        else:
            yield [Remember(state)]
        async with aclosing(self._waited(state, turn)) as looks:
            async for response in looks:
                yield self._answer(response) if _is_over(response) else [Accepted()]

    def _check_repeated(self, state: Mapping[str, Any], turn: Turn) -> None:
        """Another process may have created the response. Only the same request, with the same key, finds it."""
        if not self._options.idempotency or state.get("items") != len(turn.items):
            raise _unknown("The server was stopped while it was asked.")

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        """Tell the provider to end the response that `state` remembers. It raises nothing: there is nothing
        more that could be done. Where the response has no id yet, nothing can be told."""
        if "response_id" not in state:
            return
        try:
            async with asyncio.timeout(self._options.cancel_timeout):
                answer = await self._client.post(f"{_path(state)}/cancel", b"{}", bearer)
                answer.close()
        except (TimeoutError, IngressError) as error:
            logger.warning("upstream %s could not be told to cancel (%s)", self.name, type(error).__name__)
        else:
            if answer.status >= 400:
                logger.warning("upstream %s answered a cancel with status %d", self.name, answer.status)

    async def models(self) -> Sequence[str]:
        return await model_names(self._client)

    async def close(self) -> None:
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._creator.close()
        await self._client.close()

    # Creating

    async def _create(self, turn: Turn) -> dict[str, Any]:
        """The response as the provider created it. Whoever leaves while it does so leaves a response that nobody
        could find again: it is cancelled as soon as it has an id. With a key another process finds it."""
        creating = asyncio.create_task(self._created(turn))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            if self._options.idempotency:
                creating.cancel()
                raise
            leaving = asyncio.create_task(self._withdraw(creating, turn.bearer))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            raise

    async def _withdraw(self, creating: "asyncio.Task[dict[str, Any]]", bearer: str | None) -> None:
        with suppress(TimeoutError, IngressError):
            async with asyncio.timeout(self._options.cancel_timeout):
                created = await creating
            if not _is_over(created):
                await self.cancel({"response_id": created["id"]}, bearer)

    async def _created(self, turn: Turn) -> dict[str, Any]:
        try:
            return await self._ask(turn)
        except UpstreamError as error:
            if not _is_unknown(error):
                raise
            if not self._options.idempotency:
                raise _unknown(error.message) from error
        await self._pace.sleep(self._options.first_poll)
        try:
            return await self._ask(turn)
        except IngressError as error:
            # Whatever this refusal says, the first request may have begun.
            raise _unknown(error.message) from error

    async def _ask(self, turn: Turn) -> dict[str, Any]:
        key = turn.response_id if self._options.idempotency else None
        answer = await self._asker.ask(replace(turn, stream=False), self._more(turn), key)
        try:
            created = _as_object(self._upstream, await answer.read())
        finally:
            answer.close()
        if not _is_over(created) and not (isinstance(created.get("id"), str) and created["id"]):
            raise UpstreamInvalid(f"The upstream '{self.name}' began a response without an id.")
        return created

    def _id_of(self, created: Mapping[str, Any]) -> str:
        """Its id, which becomes a part of a path."""
        id = str(created["id"])
        if id in (".", "..") or "/" in id:
            raise UpstreamInvalid(f"The upstream '{self.name}' began a response with an id that cannot be asked for.")
        return id

    def _more(self, turn: Turn) -> dict[str, Any]:
        """The fields that make it a background response. It must be stored, or it could not be asked for."""
        more: dict[str, Any] = {"background": True, "store": True}
        window, place = self._window(turn), self._options.window_in
        if window is not None and place == "metadata":
            more["metadata"] = {"completion_window": window}
        elif window is not None:
            given = turn.parameters.get(place)
            more[place] = {**(given if isinstance(given, dict) else {}), "completion_window": window}
        return more

    def _window(self, turn: Turn) -> str | None:
        for name in ("metadata", self._options.window_in):
            given = turn.parameters.get(name)
            window = given.get("completion_window") if isinstance(given, dict) else None
            if isinstance(window, str):
                return window
        return self._options.completion_window

    def _deadline(self, turn: Turn) -> float:
        """When the response is given up, in unix time."""
        duration = _DURATION.fullmatch(self._window(turn) or "")
        patience = int(duration[1]) * _UNITS[duration[2]] if duration else self._options.patience
        return self._pace.clock() + patience + self._options.margin

    # Waiting

    async def _waited(self, state: Mapping[str, Any], turn: Turn) -> AsyncGenerator[Mapping[str, Any], None]:
        """The response when it is worked on, then ended. It is asked for at once where another process has waited
        already."""
        until, accepted = state.get("until"), False
        deadline = until if isinstance(until, int | float) else self._deadline(turn)
        delay = self._options.first_poll
        wait = self._shaken(delay) if turn.resume is None else 0.0
        while True:
            await self._pace.sleep(wait)
            look = await self._look_or_cancel(state, turn.bearer)
            if look.response is not None:
                if _is_over(look.response):
                    yield look.response
                    return
                if not accepted and _accepted(look.response):
                    accepted = True
                    yield look.response
            left = deadline - self._pace.clock()
            if left <= 0:
                await self.cancel(state, turn.bearer)
                raise _given_up(look.trouble)
            delay = min(delay * _SLOWER, self._options.longest_poll)
            wait = min(max(look.wait or 0.0, self._shaken(delay)), left)

    def _shaken(self, delay: float) -> float:
        return delay * (1 - _JITTER * self._pace.chance())

    async def _look_or_cancel(self, state: Mapping[str, Any], bearer: str | None) -> _Look:
        """One poll. What will not pass is raised, and the response, which may still run, cancelled."""
        since = state.get("since")
        new = isinstance(since, int | float) and self._pace.clock() - since < _SETTLING
        try:
            return await self._look(_path(state), bearer, new)
        except IngressError:
            await self.cancel(state, bearer)
            raise

    async def _look(self, path: str, bearer: str | None, new: bool) -> _Look:
        """One poll, of a response that may be `new`. Raises what will not pass."""
        try:
            async with asyncio.timeout(self._options.poll_timeout):
                status, body, wait = await self._get(path, bearer)
            if status < 400:
                return _Look(_as_object(self._upstream, body), wait)
        except TimeoutError:
            return _Look(trouble=UpstreamTimeout(f"The upstream '{self.name}' took too long to answer a poll."))
        except (UpstreamUnreachable, UpstreamTimeout, UpstreamTruncated, UpstreamInvalid) as error:
            return _Look(trouble=error)
        if status in _GONE and not (new and status == 404):
            raise _lost(self.name)
        refusal = read_error(status, body, wait)
        if status >= 500 or status == 404 or status in _PASSING | _KEYS:
            return _Look(None, wait, refusal)
        raise refusal

    async def _get(self, path: str, bearer: str | None) -> tuple[int, bytes, float | None]:
        answer = await self._client.get(path, bearer)
        try:
            body = await (answer.read() if answer.status < 400 else answer.read_refusal())
        finally:
            answer.close()
        return answer.status, body, answer.retry_after

    def _answer(self, response: Mapping[str, Any]) -> list[Delta]:
        """The whole answer, in one batch."""
        if response.get("status") == "expired":
            response = {**response, "status": "failed", "error": _EXPIRED}
        *deltas, finish = ResponsesReader(self.name).read_json(response)
        return [Accepted(), *deltas, without_ours(finish) if isinstance(finish, Finish) else finish]


def _as_object(upstream: Upstream, body: bytes) -> dict[str, Any]:
    """The response object in an answer's body."""
    response = parse_json(upstream, body)
    if not isinstance(response, dict):
        raise UpstreamInvalid(f"The upstream '{upstream.name}' answered with something that is no response.")
    return response


def _is_over(response: Mapping[str, Any]) -> bool:
    """Whether the response has ended. Providers have their own words for one that has not (`pending`)."""
    status = response.get("status")
    return status == "expired" or ended_as(response) is not None or (status is None and bool(response.get("error")))


def _accepted(response: Mapping[str, Any]) -> list[Delta]:
    """That it is worked on, where it is."""
    status = response.get("status")
    return [Accepted()] if isinstance(status, str) and status != "queued" else []


def _path(state: Mapping[str, Any]) -> str:
    return f"{PATH}/{quote(str(state.get('response_id')), safe='')}"


def _is_unknown(error: UpstreamError) -> bool:
    """Whether the provider may have begun what was asked for: it has neither refused nor been out of reach."""
    return not isinstance(error, UpstreamRefused) and error.status != _BUSY and may_have_begun(error)


def _unknown(why: str) -> UpstreamError:
    return UpstreamError(
        f"It is not known whether the upstream began the response, so it was not asked again. {why}",
        code="upstream_create_unknown",
    )


def _lost(name: str) -> UpstreamError:
    return UpstreamError(
        f"The upstream '{name}' does not know the response any more that it began.", code="upstream_response_gone"
    )


def _given_up(trouble: IngressError | None) -> UpstreamTimeout:
    why = f" The last that was heard of it: {trouble.message}" if trouble else ""
    return UpstreamTimeout(f"The upstream did not end the response in its time; it was told to cancel it.{why}")
