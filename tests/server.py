"""The real server for tests: in this process and loop, or as a process of its own through the CLI.

Both give a base URL as clients want it, up to and including `/v1`.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import uvicorn

from responses_ingress.app import create_app
from responses_ingress.settings import PREFIX, Settings

_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 15.0
_ACCEPT_WAIT = 30.0
_POLL = 0.02
_ROOT = Path(__file__).parents[1]
_MAIN = "from responses_ingress.cli import main; main()"


class _Server(uvicorn.Server):
    """Says when it listens, stops as soon as it is told, and leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[str]:
    """Serve with these settings on a free port, in the running loop; gives the base URL. Unless they say how long,
    it waits for what the upstream says first: what is a status does not depend on how busy the machine is."""
    if "accept_wait" not in settings.model_fields_set:
        settings = settings.model_copy(update={"accept_wait": _ACCEPT_WAIT})
    config = uvicorn.Config(
        create_app(settings),
        http="httptools",
        ws="websockets-sansio",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    # asyncio sends small writes at once only where the socket says that it is TCP; else each waits 40 ms.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listener]))
        ready = asyncio.create_task(server.ready.wait())
        try:
            await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                raise RuntimeError("The server did not start.") from serving.exception()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            ready.cancel()
            server.stop.set()
            await serving


class ServerProcess:
    """`responses-ingress serve` with these arguments, on a free port; an async context manager.

    It sees no setting of the surrounding environment; `environment` adds to what it sees. What it writes
    is in `log`."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self._arguments = arguments
        self._environment = environment or {}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __aexit__
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    @property
    def pid(self) -> int:
        return self._running.pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.terminate()
        if error is not None:
            print(self.log)  # pytest shows it with the failure
        self._log.close()

    async def start(self) -> None:
        """Start it, also again after it was stopped, and wait until it is ready."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _MAIN, "serve", "--port", str(self.port), *self._arguments),
            cwd=_ROOT,
            env={**inherited, **self._environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        async with asyncio.timeout(_START_TIMEOUT):
            while not await self._is_ready():
                if self._process.returncode is not None:
                    raise RuntimeError(f"The server ended with code {self._process.returncode}:\n{self.log}")
                await asyncio.sleep(_POLL)

    async def terminate(self) -> int:
        """Ask it to stop, wait until it has, and give its exit code."""
        if self._running.returncode is None:
            self._running.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                return await self._running.wait()
        except TimeoutError:
            await self.kill()
            raise RuntimeError(f"The server did not stop:\n{self.log}") from None

    def signal(self, number: signal.Signals) -> None:
        self._running.send_signal(number)

    async def ended(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        async with asyncio.timeout(_STOP_TIMEOUT):
            return await self._running.wait()

    async def said(self, text: str, times: int = 1) -> None:
        """Wait until its log holds `text` so often."""
        async with asyncio.timeout(_STOP_TIMEOUT):
            while self.log.count(text) < times:  # noqa: ASYNC110
                await asyncio.sleep(_POLL)

    async def kill(self) -> None:
        """End it without a word, as a crash would."""
        if self._running.returncode is None:
            self._running.send_signal(signal.SIGKILL)
        await self._running.wait()

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process

    async def _is_ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.request("GET", f"http://127.0.0.1:{self.port}/readyz") as answer:
                return answer.status == 200
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
