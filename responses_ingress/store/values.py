"""What the store is given: where a turn belongs, what begins, what ended, who writes.

What must stay true: values only, frozen; payloads are JSON bytes already. They know nothing of SQL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from responses_ingress.core.request import Retry


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a turn belongs.

    branch_id, position: what it continues: the branch (maybe another thread's) up to a position.
    root:        the id of the branch that a new thread begins with; None where the thread is not new.
    first:       the position of its first input item; below `position` where the client sent history.
    new_branch:  the id for a branch, should it need one of its own.
    holder:      which branch of that one's line holds what comes right before `position`, where that is known to
                 be another; a branch of its own grows out of it.
    exclusive:   the thread is a session, and this needs its one running turn. `seen` is then its active
                 branch and that branch's head as they were read, or None where it did not exist.
    """

    tenant: str
    thread_id: str
    thread_key: str | None
    branch_id: str
    position: int
    first: int
    new_branch: str
    root: str | None = None
    exclusive: bool = False
    seen: tuple[str, int] | None = None
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item on its way to a branch."""

    item_id: str
    type: str
    digest: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Owner:
    """Who runs a response, and under which lease."""

    name: str
    epoch: int
    lease: float


@dataclass(frozen=True, slots=True)
class NewResponse:
    """The row of a response that begins, or waits in the queue.

    request:  what another process needs to run it, where one may have to.
    followed: somebody follows its events from the beginning.
    """

    id: str
    previous_response_id: str | None
    status: str
    model: str
    backend: str
    background: bool
    store: bool
    envelope: bytes
    preamble: tuple[bytes, bytes] | None
    input: bytes
    created_at: int
    lineage: bytes | None = None
    request: bytes | None = None
    retry: Retry | None = None
    followed: bool = False


class Entry(NamedTuple):
    """A row of the journal: the number of the first event it makes, how many it makes, its deltas."""

    first: int
    events: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Keep:
    """How long what has ended stays, in seconds. journal: cursors stay good, and a repeated request attaches.
    response: from its last use on."""

    journal: float = 600.0
    response: float = 30 * 86_400.0


DEFAULT_KEEP = Keep()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a response ended. `input` and `output` are its items, for the branch or for its own row.

    echo:    what of its envelope has changed.
    journal: the last row of its journal, which tells the end; None where no journal is kept.
    store:   it is kept, and can be asked for by its id.
    lingers: for a while after the end somebody may come back for its events, or ask the same again.
    """

    status: str
    input: Sequence[NewItem]
    output: Sequence[NewItem]
    echo: bytes | None = None
    error: bytes | None = None
    usage: bytes | None = None
    incomplete: str | None = None
    completed_at: int | None = None
    memory: bytes | None = None
    journal: Entry | None = None
    keep: Keep = DEFAULT_KEEP
    store: bool = True
    lingers: bool = True

    @property
    def moves_branch(self) -> bool:
        return self.status in ("completed", "incomplete")
