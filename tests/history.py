"""What the database holds, read as a stranger would: plain sqlite3, no code of the server.

A child branch's own items begin at its `parent_position`; what lies before them belongs to its ancestors.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

Item = dict[str, Any]


def history(database: Path, key: str) -> list[Item]:
    """The items of the active branch of the thread that clients call `key`, oldest first."""
    with closing(_open(database)) as connection:
        row = connection.execute("SELECT active_branch FROM threads WHERE key = ?", (key,)).fetchone()
        assert row is not None, f"no thread {key}, but {threads(database)}"
        return _branch(connection, row[0])


def branches(database: Path, key: str) -> list[list[Item]]:
    """The histories of all branches of the thread, in the order the branches were made."""
    query = "SELECT b.id FROM branches b JOIN threads t ON t.id = b.thread_id WHERE t.key = ? ORDER BY b.rowid"
    with closing(_open(database)) as connection:
        return [_branch(connection, branch) for (branch,) in connection.execute(query, (key,))]


def threads(database: Path) -> list[str | None]:
    """The keys of all threads; None for one that no client named."""
    with closing(_open(database)) as connection:
        return [key for (key,) in connection.execute("SELECT key FROM threads ORDER BY rowid")]


def responses(database: Path, key: str) -> list[dict[str, Any]]:
    """The facts of a thread's responses, oldest first."""
    query = (
        "SELECT r.id, r.status, r.store, r.first, r.own, r.output_at, r.stop FROM responses r"
        " JOIN threads t ON t.id = r.thread_id WHERE t.key = ? ORDER BY r.rowid"
    )
    with closing(_open(database)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, (key,))]


def stored_items(database: Path) -> list[Item]:
    """Every item of the database, whichever branch it lies on."""
    with closing(_open(database)) as connection:
        rows = connection.execute("SELECT payload FROM items ORDER BY rowid")
        return [orjson.loads(payload) for (payload,) in rows]


def brief(items: list[Item]) -> list[tuple[str, str]]:
    """Items as (kind, text), without what an agent sends of itself (developer messages, environment)."""
    return [
        pair
        for pair in map(_brief, items)
        if pair[0] != "developer" and not pair[1].startswith("<environment_context>")
    ]


def _brief(item: Item) -> tuple[str, str]:
    kind = item["type"]
    if kind == "message":
        return item["role"], _text(item["content"])
    if kind == "reasoning":
        return kind, _text([*(item.get("summary") or ()), *(item.get("content") or ())])
    for name in ("arguments", "input", "output"):
        if name in item:
            return kind, _text(item[name])
    return kind, ""


def _text(content: str | list[Item]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _branch(connection: sqlite3.Connection, branch: str) -> list[Item]:
    """The items of a branch and of its ancestors, from position 0 on without a gap."""
    rows: list[tuple[int, bytes]] = []
    step: str | None = branch
    below = None
    while step is not None:
        parent, start, head = connection.execute(
            "SELECT parent_branch, parent_position, head FROM branches WHERE id = ?", (step,)
        ).fetchone()
        own = connection.execute(
            "SELECT position, payload FROM items WHERE branch_id = ? AND position < ? ORDER BY position",
            (step, head if below is None else below),
        ).fetchall()
        assert below is not None or start + len(own) == head, f"head {head}, but {len(own)} items from {start}"
        rows = own + rows
        below = start if below is None else min(start, below)
        step = parent
    assert [position for position, _ in rows] == list(range(len(rows))), "positions have gaps"
    return [orjson.loads(payload) for _, payload in rows]


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True)
