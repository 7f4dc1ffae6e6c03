"""What a run is given: a backend at work, a place to write, what the process shares; and the small values that it
and those around it make.

What must stay true: values only; a run never finds anything that is not handed in here.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from responses_ingress.core.deltas import Delta, Item
from responses_ingress.core.items import digest
from responses_ingress.errors import (
    Busy,
    ContextLengthExceeded,
    IngressError,
    ModelNotFound,
    PreviousNotCompleted,
    ServerRestarted,
    StoreUnavailable,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from responses_ingress.ids import Ids
from responses_ingress.store.database import Database
from responses_ingress.store.values import Entry, Keep, NewItem, Owner, Placement

logger = logging.getLogger(__name__)

_OURS: Mapping[str | None, type[IngressError]] = {
    error.code: error
    for error in (
        Busy,
        ContextLengthExceeded,
        ModelNotFound,
        PreviousNotCompleted,
        ServerRestarted,
        StoreUnavailable,
        UpstreamRefused,
        UpstreamTimeout,
    )
}
_STATUSES = {"rate_limit_exceeded": 429, "server_is_overloaded": 503}
_CANCEL_PATIENCE = 5.0
"""Seconds that an upstream is given to take a cancel."""

Deltas = AsyncGenerator[Sequence[Delta], None]


@dataclass(frozen=True, slots=True)
class Work:
    """A backend at work on a turn.

    backend:   its name.
    cancel:    passes a client's cancel on to what the backend remembers; None where it leaves nothing behind.
    resumable: another process can go on with it once it has remembered something.
    goes_on:   it goes on when nobody follows.
    journal:   what earlier processes have journaled of it.
    """

    deltas: Deltas
    backend: str
    cancel: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None
    resumable: bool = False
    goes_on: bool = False
    journal: Sequence[Entry] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """Where a run writes. A run without one (no session, `store: false`) writes nothing.

    input:   the new input items, for the branch.
    is_turn: the output goes to the branch too.
    begun:   done when the response's row is committed.
    lingers: somebody may ask the same again when it has ended.
    """

    database: Database
    placement: Placement
    owner: Owner
    store: bool
    input: Sequence[NewItem]
    is_turn: bool
    begun: "asyncio.Future[None]"
    lingers: bool = False

    async def wait(self) -> None:
        """Wait until the row is committed. Whoever is cancelled while waiting does not take that back."""
        if not self.begun.done():
            await asyncio.wait((self.begun,))
        self.begun.result()


@dataclass(frozen=True, slots=True)
class Kit:
    """What every run of a process shares. `on_deserted` is told the id of a run when its last follower leaves; `at`
    the named points of a run's life that are passed: tests end the process there."""

    ids: Ids
    flush_interval: float
    on_deserted: Callable[[str], None]
    keep: Keep = Keep()
    at: Callable[[str], None] = lambda _: None


async def cancel_upstream(response_id: str, cancelling: Awaitable[None]) -> None:
    """Wait for an upstream to take a cancel, but not for ever."""
    try:
        async with asyncio.timeout(_CANCEL_PATIENCE):
            await cancelling
    except (IngressError, TimeoutError) as error:
        logger.warning("the cancel of %s did not reach its upstream: %s", response_id, type(error).__name__)


def told_failure(response: Mapping[str, Any]) -> IngressError:
    """The error of a failed response, as an HTTP error: of what was raised only the code and the message are kept."""
    told = response["error"]
    kind = _OURS.get(told["code"], UpstreamError)
    return kind(told["message"], code=told["code"], status=_STATUSES.get(told["code"]))


def new_item(item: Item) -> NewItem:
    """The item as the store takes it."""
    return NewItem(item["id"], item["type"], digest(item), orjson.dumps(item))
