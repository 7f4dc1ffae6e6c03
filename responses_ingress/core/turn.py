"""The turn: the frozen value a backend receives, and all it receives.

A backend reads the turn and yields deltas; it never sees the store, a connection or the client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from responses_ingress.core.deltas import Item


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a backend.

    model:      the upstream's own name for the model.
    context:    history before this request, oldest first.
    new:        the items this request adds.
    tools:      as the client gave them (Responses shape).
    parameters: the request's other fields, as the client gave them and only where it gave them
                (`temperature`, `text`, `reasoning`, `max_output_tokens`, unknown ones too).
    stream:     a follower reads the answer as it comes.
    memory:     what the backend of the response that this turn goes on from asked to have remembered, if
                anything; of a session, that of its last turn.
    bearer:     the client's own credential, for upstreams that are set to pass it on.
    resume:     what an earlier process had remembered of this same turn: go on from there instead of
                asking again.
    """

    response_id: str
    thread_id: str
    model: str
    instructions: str | None = None
    context: Sequence[Item] = ()
    new: Sequence[Item] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    memory: Mapping[str, Any] | None = None
    bearer: str | None = None
    resume: Mapping[str, Any] | None = None

    @property
    def items(self) -> list[Item]:
        """Context, then new items."""
        return [*self.context, *self.new]
