"""Processes: how they stop, how they are replaced, and what their exit codes say."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from responses_ingress.serving import CANNOT_START
from tests.served import FAILS, GRACE, STOPPED
from tests.server import free_port

_ROOT = Path(__file__).parents[1]
_MAIN = "from tests.served import main; main()"
LONG = {GRACE: "60"}


@dataclass(slots=True)
class Served:
    """A running `tests.served`, in a process group of its own."""

    process: asyncio.subprocess.Process
    port: int

    async def ask(self, path: str = "/") -> int:
        """The process that answers. Raises OSError where none does."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            answer = await reader.read()
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError
        return int(answer.split(b"\r\n\r\n")[1])

    async def answering(self) -> int:
        """Wait until somebody answers; who."""
        while True:
            with contextlib.suppress(OSError):
                return await self.ask()
            await asyncio.sleep(0.02)

    async def said(self, text: str, times: int = 1) -> str:
        """Read what it writes until it has said `text` so often; all that was read."""
        assert self.process.stdout is not None
        read = ""
        while read.count(text) < times:
            line = await self.process.stdout.readline()
            assert line, f"it ended without saying {text!r}:\n{read}"
            read += line.decode()
        return read

    async def refuses(self) -> None:
        """Wait until nobody takes connections any more."""
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def served(workers: int, environment: Mapping[str, str] | None = None) -> AsyncIterator[Served]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _MAIN, str(port), str(workers)),
        cwd=_ROOT,
        env={**os.environ, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield Served(process, port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_stops_it_and_that_is_a_success(workers: int, number: signal.Signals) -> None:
    async with served(workers) as server:
        await server.answering()
        server.process.send_signal(number)
        await server.said(STOPPED)
        assert await server.process.wait() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_second_signal_ends_it_at_once(workers: int) -> None:
    async with served(workers, LONG) as server:
        await server.said("Application startup complete", workers)
        server.process.send_signal(signal.SIGTERM)
        await server.said(STOPPED, workers)
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 128 + signal.SIGTERM


async def test_a_signal_to_all_its_processes_at_once_is_one_signal() -> None:
    """As a terminal does on Ctrl-C, and systemd when it stops a service: a worker is then told twice."""
    async with served(2, {GRACE: "1"}) as server:
        await server.said("Application startup complete", 2)
        os.killpg(server.process.pid, signal.SIGINT)
        assert "Finished server process" in await server.said("Finished server process", 2)
        assert await server.process.wait() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_while_it_stops_connections_are_refused_and_not_left_to_wait(workers: int) -> None:
    async with served(workers, LONG) as server:
        await server.said("Application startup complete", workers)
        server.process.send_signal(signal.SIGTERM)
        await server.said(STOPPED, workers)
        await server.refuses()


async def test_a_worker_that_dies_is_replaced() -> None:
    async with served(2) as server:
        await server.said("Application startup complete", 2)
        for _ in range(2):
            with contextlib.suppress(OSError):
                await server.ask("/crash")
        await server.said("Application startup complete", 2)
        assert await server.answering()
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_what_cannot_start_ends_with_a_code_that_says_so(workers: int, tmp_path: Path) -> None:
    (fails := tmp_path / "fails").touch()
    async with served(workers, {FAILS: str(fails)}) as server:
        await server.said("It does not want to.")
        assert await server.process.wait() == CANNOT_START


async def test_a_replacement_that_cannot_start_is_tried_again_and_the_others_go_on(tmp_path: Path) -> None:
    """As when a worker dies while the database is away."""
    fails = tmp_path / "fails"
    async with served(2, {FAILS: str(fails)}) as server:
        await server.said("Application startup complete", 2)
        fails.touch()
        with contextlib.suppress(OSError):
            await server.ask("/crash")
        await server.said("It does not want to.", 2)
        assert await server.answering()
        fails.unlink()
        await server.said("Application startup complete")
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0


async def test_workers_end_when_the_process_that_watches_them_is_gone() -> None:
    """Nobody would replace them, and the port would stay taken."""
    async with served(2) as server:
        await server.said("Application startup complete", 2)
        server.process.kill()
        await server.said("Finished server process", 2)
        await server.refuses()
