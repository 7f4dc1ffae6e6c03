"""The migrations on SQLite: they make what the tables say, whatever tables there are."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, LargeBinary, MetaData, inspect

from responses_ingress.errors import SettingsError
from responses_ingress.settings import CONFIG
from responses_ingress.store import migrate
from responses_ingress.store.tables import metadata

ROOT = Path(__file__).parents[2]
SCRIPTS = ScriptDirectory(str(migrate.migrations_folder()))
T = TypeVar("T")
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
BROKEN = """
import sqlalchemy as sa
from alembic import op

revision = "broken"
down_revision = {down!r}

def upgrade():
    op.create_table("half", sa.Column("id", sa.Text(), primary_key=True))
    raise RuntimeError("in the middle")
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/x.db"


async def on(url: str, work: Callable[..., T], *arguments: Any) -> T:
    async with migrate.transaction(url) as connection:
        return await connection.run_sync(work, *arguments)


def differences(connection: Connection) -> list[Any]:
    found: list[Any] = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)
    return found


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names()) - {"alembic_version"}


def value(column: Column[Any]) -> Any:
    if isinstance(column.type, LargeBinary):
        return b"\x00x"
    return column.type.python_type(1)


def fill(connection: Connection) -> None:
    """One row in every table there is."""
    found = MetaData()
    found.reflect(connection)
    for table in found.sorted_tables:
        if table.name != "alembic_version":
            connection.execute(table.insert(), {column.name: value(column) for column in table.columns})


def rows(connection: Connection) -> dict[str, int]:
    return {name: len(connection.exec_driver_sql(f'SELECT * FROM "{name}"').all()) for name in tables(connection)}


async def test_from_empty_to_head_is_what_the_tables_say(url: str) -> None:
    await migrate.migrate(url)
    assert await on(url, differences) == []
    assert await on(url, tables) == set(metadata.tables)


async def test_down_to_base_leaves_nothing_and_up_again_everything(url: str) -> None:
    await migrate.migrate(url)
    await on(url, migrate.downgrade, "base")
    assert await on(url, tables) == set()
    await migrate.migrate(url)
    assert await on(url, differences) == []


@pytest.mark.parametrize("revision", REVISIONS)
async def test_rows_survive_the_way_to_head_and_back(url: str, revision: str) -> None:
    await migrate.migrate(url, revision)
    await on(url, fill)
    before = await on(url, rows)
    await migrate.migrate(url)
    at_head = await on(url, rows)
    assert before.items() <= at_head.items()
    await on(url, migrate.downgrade, revision)
    assert await on(url, rows) == before


async def test_several_processes_may_start_on_an_empty_database(url: str) -> None:
    await asyncio.gather(*(migrate.ensure(url, auto=True) for _ in range(4)))
    assert await migrate.is_current(url)


async def test_without_leave_to_migrate_it_says_what_to_run(url: str) -> None:
    with pytest.raises(SettingsError, match="Run: responses-ingress migrate"):
        await migrate.ensure(url, auto=False)
    assert not await migrate.is_current(url)


async def test_a_schema_from_the_future_is_refused(url: str) -> None:
    await migrate.migrate(url)
    await on(url, lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'later'"))
    for attempt in (migrate.is_current(url), migrate.ensure(url, auto=True), migrate.migrate(url)):
        with pytest.raises(SettingsError, match="newer version"):
            await attempt


async def test_a_file_that_is_no_database_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, " * 100, encoding="utf-8")
    with pytest.raises(SettingsError, match="file is not a database"):
        await migrate.ensure(url, auto=True)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A migration behind the newest one that fails half-way."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrate.migrations_folder(), folder)
    (folder / "versions" / "broken.py").write_text(BROKEN.format(down=migrate.head_revision()), encoding="utf-8")
    monkeypatch.setattr(migrate, "migrations_folder", lambda: folder)
    yield


@pytest.mark.usefixtures("broken")
async def test_a_migration_that_fails_leaves_nothing_behind(url: str) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        await migrate.migrate(url)
    assert await on(url, tables) == set()


@pytest.mark.parametrize("by", ["file", "environment"])
def test_alembic_in_the_checkout_has_the_servers_settings(tmp_path: Path, url: str, by: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"database_url = 'sqlite:///{tmp_path}/x.db'", encoding="utf-8")
    chosen = ["-x", f"config={config}"] if by == "file" else []
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *chosen, "upgrade", "head"],
        cwd=ROOT,
        env={**os.environ, CONFIG: "" if chosen else str(config)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert asyncio.run(migrate.is_current(url))


def test_alembic_reports_a_wrong_setting_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", "config=none.toml", "current"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "none.toml cannot be read" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
