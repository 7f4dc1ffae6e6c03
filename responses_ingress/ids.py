"""Ids and the clock, the only source of randomness and time; both are injected where they are used.

Form (recorded OpenAI traffic since 2025-10): prefix + `_` + 50 hex = 16 hex partition + 2 hex version
+ 8 hex unix time + 24 hex random. Every id made inside a thread carries the thread's partition, so an
id alone names its shard.
"""

import os
import time
from collections.abc import Callable
from hashlib import blake2b

Clock = Callable[[], float]
"""Seconds since the epoch, as `time.time`."""

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "web_search_call": "ws",
    "file_search_call": "fs",
    "code_interpreter_call": "ci",
    "image_generation_call": "ig",
    "mcp_call": "mcp",
    "mcp_list_tools": "mcpl",
    "mcp_approval_request": "mcpr",
    "tool_search_call": "tsc",
    "tool_search_output": "tso",
    "compaction": "cmp",
}
"""Item type -> id prefix; any other type gets `item`."""

_FRESH, _NAMED = "00", "01"


class Ids:
    """Makes ids. Random bytes are drawn in blocks: a system call per id would hand the GIL to the
    writer thread each time."""

    def __init__(self, clock: Clock = time.time, random: Callable[[int], bytes] = os.urandom) -> None:
        self.clock = clock
        self._random = random
        self._block = ""
        self._used = 0

    def _hex(self, length: int) -> str:
        start, self._used = self._used, self._used + length
        if self._used > len(self._block):
            self._block = self._random(4096).hex()
            start, self._used = 0, length
        return self._block[start : self._used]

    def partition(self) -> str:
        """A fresh thread partition: 16 hex."""
        return self._hex(16)

    def make(self, prefix: str, partition: str) -> str:
        return f"{prefix}_{partition}{_FRESH}{int(self.clock()):08x}{self._hex(24)}"

    def item(self, type: str, partition: str) -> str:
        return self.make(PREFIXES.get(type, "item"), partition)

    def branch(self, partition: str) -> str:
        """A branch id. No client sees it, so it is short: it stands in every item's row."""
        return partition + self._hex(12)

    def call(self) -> str:
        """A `call_id` for a call the upstream left unnamed."""
        return f"call_{self._hex(24)}"

    def request(self) -> str:
        """The value of the `x-request-id` header."""
        return f"req_{self._hex(32)}"


def named_thread(tenant: str, key: str) -> str:
    """The id of the thread that a client names by `key`: the same for the same tenant and key, so that
    finding or creating it needs no look-up and two workers cannot make two."""
    digest = blake2b(f"{tenant}\0{key}".encode(), digest_size=24).hexdigest()
    return f"thread_{digest[:16]}{_NAMED}{digest[16:]}"


def root_branch(thread_id: str) -> str:
    """The branch that a thread without a name begins with: the same each time that its first response begins."""
    return partition_of(thread_id) + "0" * 12


def is_named(thread_id: str) -> bool:
    """Whether a client has named the thread, so that it has a row."""
    return thread_id[-34:-32] == _NAMED


def partition_of(id: str) -> str:
    """The partition an id of ours carries, or "" where it carries none."""
    _, _, tail = id.rpartition("_")
    return tail[:16] if len(tail) == 50 else ""
