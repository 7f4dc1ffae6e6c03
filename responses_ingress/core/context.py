"""Which items a turn is about: how a client's own history lies along a stored branch.

What must stay true: nothing is stored twice and nothing is lost. Only positions are compared here,
digest by digest; a real repeat ("again" sent twice) is safe because its place differs. Pure.
"""

from collections.abc import Sequence
from typing import NamedTuple

from responses_ingress.core.items import is_anchor


class Stored(NamedTuple):
    """What alignment needs of a stored item."""

    type: str
    digest: bytes


class Alignment(NamedTuple):
    """Where a client's history leaves the branch.

    position: the number of stored items it shares with the branch. Below the branch's length the client
              has rewritten history (compaction, edit, rollback), and a new branch starts there.
    tail:     how many of its leading items are stored already; the rest is new.
    """

    position: int
    tail: int


def align(stored: Sequence[Stored], sent: Sequence[bytes]) -> Alignment:
    """The longest common beginning of `stored` and the digests of what was `sent`.

    Stored items that clients are known to drop (reasoning, hosted calls) may be missing in `sent`. They
    count as shared when what follows them is.
    """
    position = tail = 0
    for at, item in enumerate(stored):
        if tail < len(sent) and item.digest == sent[tail]:
            tail += 1
            position = at + 1
        elif is_anchor(item.type):
            return Alignment(position, tail)
    return Alignment(len(stored) if tail < len(sent) else position, tail)
