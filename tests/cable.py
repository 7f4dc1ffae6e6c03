"""A connection that can be cut, or go silent: what a client is connected through in place of its server."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

_POSTGRES = 5432


class Cable:
    """Leads to the server of a URL; an async context manager. `url` is where to connect to instead."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        self.mend()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"{self._target.scheme}://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection: both ends see that."""
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Let nothing through, and nobody see that."""
        self._open.clear()

    def mend(self) -> None:
        """Let everything through again, also what was held up."""
        self._open.set()

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._lead(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._open.wait()
        with contextlib.suppress(OSError):
            from_there, to_there = await self._reach()
            self._writers.add(to_there)
            await asyncio.gather(self._pass(reader, to_there), self._pass(from_there, writer))
        writer.close()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        folder = parse_qs(self._target.query).get("host")
        if folder is not None:  # PostgreSQL's socket
            return await asyncio.open_unix_connection(f"{folder[0]}/.s.PGSQL.{_POSTGRES}")
        return await asyncio.open_connection(self._target.hostname, self._target.port or _POSTGRES)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
