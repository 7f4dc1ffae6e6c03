"""A stranger's connection to the database, SQLite or PostgreSQL: it shares nothing with the server, and what it
finds is committed.

Its calls block, so that a test's loop can look at the database between two of its own steps; on PostgreSQL a
thread with a loop of its own asks the driver.
"""

import asyncio
import itertools
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import make_url

Json = dict[str, Any]
TABLES = ("threads", "branches", "items", "responses", "preambles", "journal")


class Stranger(Protocol):
    def rows(self, query: str, *values: Any) -> list[Json]:
        """What a query finds; `?` stands for a value."""
        ...

    def execute(self, statement: str, *values: Any) -> None: ...

    def lock(self) -> bool:
        """Begin a transaction that nobody else can write beside. False where somebody else is writing."""
        ...


@contextmanager
def stranger(url: str) -> Iterator[Stranger]:
    """A connection to the database at `url`."""
    connection = _Sqlite(url) if url.startswith("sqlite") else _Postgres(url)
    try:
        yield connection
    finally:
        connection.close()


class _Sqlite:
    def __init__(self, url: str) -> None:
        self._connection = sqlite3.connect(make_url(url).database or "", isolation_level=None, timeout=5)
        self._connection.row_factory = sqlite3.Row

    def rows(self, query: str, *values: Any) -> list[Json]:
        return [dict(row) for row in self._connection.execute(query, values)]

    def execute(self, statement: str, *values: Any) -> None:
        self._connection.execute(statement, values)

    def lock(self) -> bool:
        try:
            self._connection.execute("PRAGMA busy_timeout=0")
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True

    def close(self) -> None:
        self._connection.close()


class _Postgres:
    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connection = self._run(asyncpg.connect(re.sub(r"\+\w+", "", url, count=1)))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def rows(self, query: str, *values: Any) -> list[Json]:
        return [dict(row) for row in self._run(self._connection.fetch(_numbered(query), *values))]

    def execute(self, statement: str, *values: Any) -> None:
        if values:
            self._run(self._connection.execute(_numbered(statement), *values))
        else:
            self._run(self._connection.execute(statement))

    def lock(self) -> bool:
        self.execute("BEGIN")
        try:
            self.execute(f"LOCK TABLE {', '.join(TABLES)} IN EXCLUSIVE MODE NOWAIT")
        except asyncpg.LockNotAvailableError:
            self.execute("ROLLBACK")
            return False
        return True

    def close(self) -> None:
        self._run(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _numbered(query: str) -> str:
    numbers = itertools.count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", query)
