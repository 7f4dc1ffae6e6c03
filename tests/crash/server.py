"""A server that dies and comes back on the same port, over the same database."""

import asyncio
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from responses_ingress.settings import Settings
from tests.crash.program import Forks, serve
from tests.server import free_port

_POLL = 0.01
_START_TIMEOUT, _DEATH_TIMEOUT = 20.0, 15.0


class MortalServer:
    """One server process after another; an async context manager. `folder` is for its log and its trap."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings.model_copy(update={"port": free_port()})
        self._environment = {**settings.to_environment(), "RESPONSES_INGRESS_PORT": str(self.settings.port)}
        self._trap = folder / f"trap-{self.settings.port}"
        self._log = folder / f"log-{self.settings.port}"
        self._process = self._new()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}/v1"

    @property
    def database(self) -> str:
        """The URL of its database, with the driver."""
        return self.settings.async_database_url

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        print(self._log.read_text(encoding="utf-8"))  # pytest shows it with a failure

    async def start(self) -> None:
        """Start it, disarmed, and wait until it is ready."""
        self._trap.unlink(missing_ok=True)
        self._process = self._new()
        self._process.start()
        async with asyncio.timeout(_START_TIMEOUT):
            while not await self._is_ready():
                assert self._process.is_alive(), self._log.read_text(encoding="utf-8")
                await asyncio.sleep(_POLL)

    def arm(self, point: str, count: int = 1) -> None:
        """Let it die when it passes `point` for the `count`th time from now on."""
        written = self._trap.with_suffix(".new")
        written.write_text(f"{count} {point}", encoding="utf-8")
        written.rename(self._trap)

    async def died(self) -> None:
        """Wait until it has died."""
        async with asyncio.timeout(_DEATH_TIMEOUT):
            while self._process.is_alive():  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(_POLL)

    async def kill(self) -> None:
        """End it without a word."""
        if self._process.pid is not None and self._process.is_alive():
            self._process.kill()
        if self._process.pid is not None:
            await self.died()

    def _new(self) -> BaseProcess:
        return Forks.Process(target=serve, args=(self._environment, self._trap, self._log), daemon=True)

    async def _is_ready(self) -> bool:
        try:
            async with aiohttp.request("GET", f"http://127.0.0.1:{self.settings.port}/readyz") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False
