import asyncio
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from responses_ingress.cli import main, serve
from responses_ingress.settings import PREFIX, Settings
from responses_ingress.store import migrate
from tests.server import ServerProcess


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and none of the developer's own settings."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def tables(file: Path) -> set[str]:
    connection = sqlite3.connect(file)
    try:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    finally:
        connection.close()


def test_it_says_its_version() -> None:
    assert run("--version").output == f"responses-ingress, version {version('responses-ingress')}\n"


def test_every_flag_is_a_setting() -> None:
    assert {parameter.name for parameter in serve.params} - {"config"} <= Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--host", "0.0.0.0"), "'host' is 0.0.0.0"),
        (("serve", "--config", "none.toml"), "none.toml cannot be read"),
        (("serve", "--backend", "chat"), "'upstream' must give the address"),
        (("serve", "--database-url", "sqlite:///no/such/folder/x.db"), "unable to open database file"),
        (("serve", "--database-url", "postgresql://u:secret@127.0.0.1:1/x"), "u:***@127.0.0.1:1/x cannot be used"),
        (("migrate", "--database-url", "mysql://x"), "'database_url' must begin"),
        (("migrate", "--database-url", "postgresql://h:port/x"), "'database_url' is malformed"),
        (("migrate", "--revision", "nope"), "cannot be migrated"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1


def test_migrate_makes_the_schema(tmp_path: Path) -> None:
    result = run("migrate", "--database-url", "sqlite:///x.db")
    assert (result.exit_code, result.output) == (0, "The database sqlite:///x.db is at head.\n")
    assert {"responses", "threads", "alembic_version"} <= tables(tmp_path / "x.db")


def test_check_is_content_with_nothing_and_makes_nothing(tmp_path: Path) -> None:
    result = run("check")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "fine   settings",
        "fine   database: sqlite:///responses_ingress.db does not exist yet; serve will see to it",
        "fine   upstream echo (echo): models: echo",
    ]
    assert list(tmp_path.iterdir()) == []


def test_check_says_when_the_schema_is_there() -> None:
    run("migrate")
    assert "fine   database: sqlite:///responses_ingress.db has the newest schema" in run("check").output


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("prot = 1", "wrong  settings: Unknown setting 'prot'."),
        ("auto_migrate = false", "wrong  database: sqlite:///responses_ingress.db does not exist yet."),
        ("database_url = 'sqlite:///no/folder/x.db'", "does not exist."),
        ("database_url = 'postgresql://u:secret@127.0.0.1:1/x'", "wrong  database: The database postgresql://u:***@"),
        (
            "backend = 'chat'\nupstream = 'http://me:secret@127.0.0.1:1/v1'",
            "wrong  upstream default (chat, http://***@127.0.0.1:1/v1)",
        ),
        (
            "backend = 'chat'\nupstream = 'http://127.0.0.1:1/v1'",
            "wrong  upstream default (chat, http://127.0.0.1:1/v1)",
        ),
    ],
)
def test_check_says_what_is_wrong(tmp_path: Path, settings: str, says: str) -> None:
    (tmp_path / "c.toml").write_text(settings, encoding="utf-8")
    result = run("check", "--config", "c.toml")
    assert result.exit_code == 1
    assert says in result.output
    assert "secret" not in result.output


def test_verify_has_nothing_to_say_of_a_sound_database(tmp_path: Path) -> None:
    run("migrate")
    result = run("verify")
    told = "no findings in 0 threads, 0 branches, 0 items, 0 responses, 0 preambles, 0 journal\n"
    assert (result.exit_code, result.output) == (0, told)


def test_verify_tells_each_finding_in_a_line(tmp_path: Path) -> None:
    run("migrate")
    with closing(sqlite3.connect(tmp_path / "responses_ingress.db", isolation_level=None)) as connection:
        connection.execute("INSERT INTO branches VALUES ('b', '', 't', 'gone', 3, 3)")
    result = run("verify")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "branches b: its parent is missing",
        "branches b: nothing needs it",
        "2 findings in 0 threads, 1 branches, 0 items, 0 responses, 0 preambles, 0 journal",
    ]


def test_verify_makes_and_changes_nothing(tmp_path: Path) -> None:
    result = run("verify")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: The file {tmp_path}/responses_ingress.db does not exist.\n"
    assert list(tmp_path.iterdir()) == []
    sqlite3.connect(tmp_path / "responses_ingress.db").execute("CREATE TABLE t (x)")
    result = run("verify")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not migrated" in result.stderr


def test_check_does_not_wait_for_ever(deaf_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("responses_ingress.cli._PATIENCE", 0.1)
    result = run("check", "--backend", "chat", "--upstream", f"http://127.0.0.1:{deaf_port}/v1")
    assert result.exit_code == 1
    assert "It did not answer within 0.1 s." in result.output


async def test_serve_says_where_it_is_and_stops_when_told(tmp_path: Path) -> None:
    async with ServerProcess("--database-url", f"sqlite:///{tmp_path}/x.db") as server:
        assert f"Database  sqlite:///{tmp_path}/x.db" in server.log
        assert "Upstream  echo (echo)" in server.log
        assert f"Address   {server.url}" in server.log
        await server.terminate()
        assert "Application shutdown complete" in server.log


def test_serve_names_neither_passwords_nor_a_port_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    database = f"sqlite:///{tmp_path}/x.db"
    upstream = ("--backend", "chat", "--upstream", "http://me:secret@host/v1")
    assert run("serve", "--database-url", database, "--port", "0", *upstream).output.splitlines() == [
        f"Database  {database}",
        "Upstream  default (chat, http://***@host/v1)",
        "Address   http://127.0.0.1:<a free port>/v1",
    ]


async def test_several_workers_have_the_settings_of_the_first(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f"database_url = 'sqlite:///{tmp_path}/x.db'\n[api_keys]\na = 'key'\n", encoding="utf-8")
    async with ServerProcess("--config", str(config), "--workers", "2") as server:
        assert await status(server.port, "/v1/models") == 401
        assert await status(server.port, "/v1/models", "key") == 200
        assert await server.terminate() == 0
    assert await migrate.is_current(f"sqlite+aiosqlite:///{tmp_path}/x.db")


async def status(port: int, path: str, key: str = "") -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1])
