"""GET /v1/upstreams: how the upstreams fare, for those who run the server.

What must stay true: no address, key or word of a request is shown. All that is told is what this process has
seen; it asks no upstream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from responses_ingress.errors import Forbidden
from responses_ingress.web.callers import Keyring
from responses_ingress.web.exchange import Exchange


@dataclass(frozen=True, slots=True)
class UpstreamStatus:
    """One upstream, now. Times are unix time.

    last_error:    code and time of the last failure that was not the request's.
    tools:         how models get their tools, as it is set; None where the upstream has nothing to say about it.
    without_tools: the models that it was found to have no tools for.
    """

    name: str
    kind: str
    in_flight: int = 0
    waiting: int = 0
    max_concurrent: int | None = None
    max_waiting: int | None = None
    last_success: float | None = None
    last_error: tuple[str, float] | None = None
    tools: str | None = None
    without_tools: Sequence[str] = ()
    completion_window: str | None = None


@dataclass(frozen=True, slots=True)
class Upstreams:
    """`admins` are tenants; where there are no keys, everybody is one."""

    status: Callable[[], Sequence[UpstreamStatus]]
    keyring: Keyring
    admins: frozenset[str] = frozenset()

    async def list(self, exchange: Exchange) -> None:
        tenant, _ = self.keyring.tenant(exchange.headers)
        if self.keyring.keys and tenant not in self.admins:
            raise Forbidden("Only the tenants that 'admins' names may see the upstreams.")
        await exchange.reply({"object": "list", "data": [_shown(status) for status in self.status()]})


def _shown(status: UpstreamStatus) -> dict[str, Any]:
    error = status.last_error
    return {
        "id": status.name,
        "object": "upstream",
        "kind": status.kind,
        "health": _health(status),
        "in_flight": status.in_flight,
        "waiting": status.waiting,
        "max_concurrent": status.max_concurrent,
        "max_waiting": status.max_waiting,
        "last_success": None if status.last_success is None else int(status.last_success),
        "last_error": None if error is None else {"code": error[0], "at": int(error[1])},
        "tools": status.tools and {"mode": status.tools, "emulated_for": list(status.without_tools)},
        "completion_window": status.completion_window,
    }


def _health(status: UpstreamStatus) -> str:
    """Whether the last turn went well."""
    if status.last_error is None:
        return "unknown" if status.last_success is None else "ok"
    return "failing" if status.last_error[1] >= (status.last_success or 0) else "ok"
