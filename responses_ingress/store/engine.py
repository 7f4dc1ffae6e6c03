"""Engines: how a process talks to its database.

What must stay true on SQLite: WAL; every writing transaction begins IMMEDIATE (the driver's deferred
default silently loses read-modify-writes); readers have connections of their own and no transactions:
items are never rewritten, and who reads a response's row and something beside it looks at the row again.
"""

from time import monotonic
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

_BUSY_TIMEOUT_MS = 10_000
_READERS = 4
_REST = 1.0
"""Seconds after which a connection is tried before it is used. (SQLAlchemy's own way, every time, is three of the
writer's twelve round trips to PostgreSQL.)"""

PATIENCE = 15.0
"""Seconds that a worker waits for PostgreSQL's answer, and it for what a transaction does next. A connection that is
lost in silence, as when a host or a network is gone, would else be waited for as long as TCP tries, a quarter of an
hour and more; and the locks of a worker that is gone would stay."""

_CONNECT = 10.0


def is_sqlite(url: str) -> bool:
    return url.startswith("sqlite")


def write_engine(url: str, synchronous: str = "normal", patience: float | None = None, spare: int = 0) -> AsyncEngine:
    """One connection for writing. patience: seconds that PostgreSQL has for a statement. spare: how many more there
    may be while that one waits."""
    engine = create_async_engine(url, pool_size=1, max_overflow=spare, hide_parameters=True, **_options(url, patience))
    if is_sqlite(url):
        _on_connect(engine, synchronous)
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    else:
        _on_use(engine)
    return engine


def read_engine(url: str, synchronous: str = "normal", patience: float | None = None) -> AsyncEngine:
    """Connections for reading, outside any transaction."""
    options = {**_options(url, patience), "isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
    engine = create_async_engine(url, pool_size=_READERS, max_overflow=_READERS, hide_parameters=True, **options)
    if is_sqlite(url):
        _on_connect(engine, synchronous)
    else:
        _on_use(engine)
    return engine


def listen_engine(url: str, patience: float | None = None) -> AsyncEngine:
    """PostgreSQL: the one connection that listens. It stays open for as long as the process."""
    options = {"poolclass": NullPool, "isolation_level": "AUTOCOMMIT", "hide_parameters": True}
    return create_async_engine(url, **options, connect_args=_arguments(patience))


def _options(url: str, patience: float | None) -> dict[str, Any]:
    return {} if is_sqlite(url) else {"connect_args": _arguments(patience)}


def _arguments(patience: float | None) -> dict[str, Any]:
    """What asyncpg is given. Without `patience` there is no limit, as migrations need."""
    if patience is None:
        return {"timeout": _CONNECT}
    settings = {"idle_in_transaction_session_timeout": str(round(patience * 1000))}
    return {"timeout": min(_CONNECT, patience), "command_timeout": patience, "server_settings": settings}


def _on_use(engine: AsyncEngine) -> None:
    """Have the pool replace a connection that was lost while nobody used it."""
    dialect = engine.dialect

    def rest(_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info["rests_since"] = monotonic()

    def use(connection: DBAPIConnection, entry: ConnectionPoolEntry, _proxy: object) -> None:
        driver: Any = entry.driver_connection
        if driver.is_closed():
            raise InvalidatePoolError
        if monotonic() - entry.info.get("rests_since", monotonic()) > _REST:
            try:
                dialect.do_ping(connection)
            except (dialect.loaded_dbapi.Error, OSError) as error:
                raise InvalidatePoolError from error

    event.listen(engine.sync_engine, "checkin", rest)
    event.listen(engine.sync_engine, "checkout", use)


def _on_connect(engine: AsyncEngine, synchronous: str) -> None:
    def set_up(connection: DBAPIConnection, _record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy, not the driver, begins transactions
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={_BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            f"synchronous={synchronous.upper()}",
            "wal_autocheckpoint=10000",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    event.listen(engine.sync_engine, "connect", set_up)
