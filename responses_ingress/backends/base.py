"""What a backend is, and how a model name finds one.

What must stay true: a backend yields deltas in batches, one batch for what one read brought; it raises
an `IngressError` for whatever goes wrong, before the first batch or in the middle; cancelling the
iteration cancels the work upstream. It must not know of the store or the web.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from responses_ingress.core.deltas import Delta
from responses_ingress.core.turn import Turn
from responses_ingress.errors import ModelNotFound


class Backend(Protocol):
    """One way of producing deltas."""

    @property
    def name(self) -> str: ...

    @property
    def resumable(self) -> bool:
        """Whether `Remember` lets another process go on with a turn: the turn then comes with `resume`."""
        ...

    @property
    def goes_on(self) -> bool:
        """Whether its runs go on when nobody follows them any more."""
        ...

    def stream(self, turn: Turn) -> AsyncGenerator[Sequence[Delta], None]:
        """The turn's deltas, in batches; the last one is a `Finish`.

        Called before the response begins: raises `InvalidRequest` at once for a turn that the upstream cannot
        be asked for. Nothing is sent before the first batch is asked for.
        """
        ...

    async def models(self) -> Sequence[str]:
        """The model names this backend knows of. Raises `UpstreamError` when it cannot be asked."""
        ...

    async def cancel(self, state: Mapping[str, Any], bearer: str | None) -> None:
        """Pass a client's cancel on to the work that `state`, a turn's last `Remember`, tells of. Only a backend
        that is resumable has such work: closing the iteration ends any other."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Route:
    """A model name pattern (`fnmatch`) and where it leads; `model` is the upstream's name, or None to
    pass on the name that was asked for."""

    pattern: str
    backend: Backend
    model: str | None = None


def find_backend(routes: Sequence[Route], name: str) -> Backend | None:
    """The backend of that name, wherever model names lead by now."""
    return next((route.backend for route in routes if route.backend.name == name), None)


def find_route(routes: Sequence[Route], model: str) -> tuple[Backend, str]:
    """The backend for `model` and the name it knows it by. The first pattern that matches wins."""
    for route in routes:
        if fnmatchcase(model, route.pattern):
            return route.backend, route.model or model
    raise ModelNotFound(f"The requested model '{model[:200]}' does not exist.", param="model")
