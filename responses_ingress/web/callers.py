"""Who is calling: the tenant a key belongs to, and the thread and lineage the headers tell.

What must stay true: keys are compared as hashes in constant time, all of them every time; a key of ours
is never passed on to an upstream; nothing a client writes in a header names another tenant's thread.
Sources: codex 0.60 to 0.169 as measured ("Codex identity").
"""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import orjson

from responses_ingress.core.request import Caller, Retry, digest16
from responses_ingress.errors import InvalidValue, Unauthorized

# First that is present. `session-id` is shared by a root agent and its sub-agents, `thread-id` is the
# thread; older codex has underscores, the oldest `conversation_id`.
_THREAD_HEADERS = ("thread-id", "session-id", "session_id", "conversation_id")
_MOST_KEY = 512
_MOST_METADATA = 16_384

_KINDS = frozenset({"turn", "prewarm", "memory", "compaction"})
_SUBAGENT_KINDS = {"compact": "compaction", "memory_consolidation": "memory"}
_LINEAGE = (
    "forked_from_thread_id",
    "parent_thread_id",
    "session_id",
    "root_turn_id",
    "window_id",
    "window_number",
    "history_initialization",
    "subagent_kind",
    "agent_name",
)


@dataclass(frozen=True, slots=True)
class Keyring:
    """The API keys: (tenant, SHA-256 of the key). Empty: everybody is the one tenant ""."""

    keys: Sequence[tuple[str, bytes]] = ()

    def tenant(self, headers: Mapping[str, str]) -> tuple[str, str | None]:
        """The caller's tenant, and the bearer that is the caller's own. Raises `Unauthorized`."""
        bearer = _bearer(headers)
        if not self.keys:
            return "", bearer
        key_tenant, bearer_tenant = self._find(headers.get("x-api-key")), self._find(bearer)
        tenant = bearer_tenant if key_tenant is None else key_tenant
        if tenant is None:
            raise Unauthorized("Incorrect API key provided.")
        return tenant, bearer if bearer_tenant is None else None

    def _find(self, key: str | None) -> str | None:
        if not key:
            return None
        digest = sha256(key.encode()).digest()
        found = None
        for tenant, stored in self.keys:
            if hmac.compare_digest(digest, stored):
                found = tenant
        return found


def _bearer(headers: Mapping[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def read_caller(headers: Mapping[str, str], tenant: str, bearer: str | None, body: bytes = b"") -> Caller:
    """What the headers tell of the thread and of retries; `body` is the request's own. Raises `InvalidValue` for
    a thread name or an idempotency key that cannot be one."""
    key = _thread_key(headers)
    retry = _retry(headers, tenant, key or "", body)
    if key is None:
        return Caller(tenant=tenant, bearer=bearer, retry=retry)
    metadata = _turn_metadata(headers)
    lineage = {name: metadata[name] for name in _LINEAGE if isinstance(metadata.get(name), str | int)}
    parent = headers.get("x-codex-parent-thread-id")
    if parent:
        lineage.setdefault("parent_thread_id", parent)
    window = headers.get("x-codex-window-id")
    if window:
        lineage.setdefault("window_id", window)
    forked_from, turn_id = metadata.get("forked_from_thread_id"), metadata.get("turn_id")
    return Caller(
        tenant=tenant,
        thread_key=key,
        kind=_kind(headers, metadata),
        lineage=lineage,
        forked_from=forked_from if isinstance(forked_from, str) and _is_name(forked_from) else None,
        bearer=bearer,
        turn_id=turn_id if isinstance(turn_id, str) and turn_id else None,
        retry=retry,
    )


def _retry(headers: Mapping[str, str], tenant: str, thread: str, body: bytes) -> Retry | None:
    """The SDKs send no key, but count their tries: what comes with a count is known by its whole body."""
    key, count = headers.get("idempotency-key"), headers.get("x-stainless-retry-count", "")
    if key:
        if not _is_name(key):
            raise InvalidValue(f"The header 'idempotency-key' takes at most {_MOST_KEY} printable characters.")
        return Retry(digest16(b"key", tenant.encode(), key.encode()), digest16(body), attaches=True)
    if not (count.isdecimal() and body):
        return None
    name = digest16(b"body", tenant.encode(), thread.encode(), body)
    return Retry(name, attaches=len(count) > 1 or count > "0")


def _thread_key(headers: Mapping[str, str]) -> str | None:
    for name in _THREAD_HEADERS:
        key = headers.get(name, "")
        if not _is_name(key):
            raise InvalidValue(
                f"The header '{name}' is no name for a thread: at most {_MOST_KEY} printable characters."
            )
        if key:
            return key
    return None


def _is_name(key: str) -> bool:
    return len(key) <= _MOST_KEY and key.isprintable()


def _turn_metadata(headers: Mapping[str, str]) -> Mapping[str, Any]:
    """Codex's turn metadata, or nothing where it is missing, too large or no JSON object."""
    raw = headers.get("x-codex-turn-metadata", "")
    if not raw or len(raw) > _MOST_METADATA:
        return {}
    try:
        metadata = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _kind(headers: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
    kind = metadata.get("request_kind")
    if isinstance(kind, str) and kind in _KINDS:
        return kind
    return _SUBAGENT_KINDS.get(headers.get("x-openai-subagent", ""), "turn")


def is_codex(headers: Mapping[str, str]) -> bool:
    """Whether the client is codex, whose idle timer only data events reset."""
    if headers.get("originator", "").startswith("codex") or headers.get("user-agent", "").startswith("codex"):
        return True
    return any(name.startswith("x-codex-") for name in headers)  # programs around it have an originator of their own
