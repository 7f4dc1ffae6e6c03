"""Migrations: bringing a database to a schema, for the command line, the start of a server and tests.

What must stay true: a migration is one transaction, and one process at a time runs it (SQLite's write
lock, an advisory lock on PostgreSQL), so that several workers may start on an old database together.
Whatever keeps the database from being opened or migrated is a `SettingsError` in plain words.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from time import sleep

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from responses_ingress.errors import SettingsError
from responses_ingress.store.engine import is_sqlite, write_engine

_LOCK = 7_230_517_664
_ATTEMPTS, _PAUSE = 200, 0.05


def migrations_folder() -> Path:
    """Inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def head_revision() -> str | None:
    return ScriptDirectory(str(migrations_folder())).get_current_head()


def current_revision(connection: Connection) -> str | None:
    """None for a database without a schema of ours."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Within the connection's transaction."""
    command.upgrade(_config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    command.downgrade(_config(connection), revision)


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


async def migrate(url: str, revision: str = "head") -> None:
    """Bring the database at `url` up to `revision`."""
    async with transaction(url) as connection:
        await connection.run_sync(upgrade, revision)


async def is_current(url: str) -> bool:
    """Whether the database at `url` has the newest schema. A schema unknown here is a `SettingsError`."""
    async with transaction(url) as connection:
        return await connection.run_sync(_is_current)


async def ensure(url: str, *, auto: bool) -> None:
    """Make sure that the database at `url` has the newest schema: by migrating it where `auto` says so."""
    async with transaction(url) as connection:
        if await connection.run_sync(_is_current):
            return
        if not auto:
            raise SettingsError(f"The database {shown(url)} is not migrated. Run: responses-ingress migrate")
        await connection.run_sync(upgrade)


def _is_current(connection: Connection) -> bool:
    scripts = ScriptDirectory(str(migrations_folder()))
    current = current_revision(connection)
    if current is not None:
        scripts.get_revision(current)
    return current is not None and current == scripts.get_current_head()


@asynccontextmanager
async def transaction(url: str) -> AsyncIterator[AsyncConnection]:
    """A connection of its own that nobody else migrates beside."""
    name = shown(url)
    try:
        engine = write_engine(url)
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error.name} is not installed: pip install 'responses-ingress[postgres]'.") from None
    try:
        if is_sqlite(url):
            await asyncio.to_thread(_open_file, _parsed(url).database or "")
        async with engine.begin() as connection:
            if not is_sqlite(url):
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
    except CommandError as error:
        raise SettingsError(
            f"The database {name} cannot be migrated: {error}. Was it made by a newer version?"
        ) from None
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise SettingsError(f"The database {name} cannot be used: {_cause(error)}.") from error
    finally:
        await engine.dispose()


def _open_file(name: str) -> None:
    """Open an SQLite file with the bare driver first, and switch it to WAL.

    Processes that switch a fresh file at once are not made to wait for each other, as writers are, so one
    has to try again. And where the file cannot be opened it is said here: the async driver would leave a
    thread behind that writes a traceback when the loop is gone.
    """
    with closing(sqlite3.connect(name)) as connection:
        for left in reversed(range(_ATTEMPTS)):
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or not left:
                    raise
                sleep(_PAUSE)


def shown(url: str) -> str:
    """The URL as a person may see it: without driver and password."""
    parsed = _parsed(url)
    return parsed.set(drivername=parsed.get_backend_name()).render_as_string(hide_password=True)


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise SettingsError("'database_url' is malformed.") from None


def missing_file(url: str) -> Path | None:
    """The file of an SQLite database that is not there: opening it would make it."""
    file = Path(_parsed(url).database or "").absolute()
    return file if is_sqlite(url) and not file.exists() else None


def _cause(error: Exception) -> str:
    """The driver's own words, without SQLAlchemy's statement and link."""
    return str(getattr(error, "orig", None) or error)
