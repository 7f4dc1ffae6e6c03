"""Running the server: one process, or several that share a listening socket and are watched.

What must stay true: the first SIGTERM or SIGINT lets running turns end or hands them over, and the exit code is
then 0; a second one ends everything at once, and what that leaves behind is found by its leases; a worker that
dies is replaced; where one cannot start before any has, all is stopped; no worker outlives the process that watches
it. It must not know what is served.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess, parent_process
from types import FrameType
from typing import Any

import uvicorn

logger = logging.getLogger(__name__)

CANNOT_START = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AT_ONCE = 128
_PAUSE = 0.5  # seconds before a worker that died is replaced


class Server(uvicorn.Server):
    """Ends what runs as soon as it is told to stop: uvicorn alone would cut open streams off at its time
    limit, and only then let the application know."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(self.config.loaded_app.stop())
        await super().shutdown(sockets)
        await stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's own, but without sending the signal again when all has ended well."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(_AT_ONCE + sig)
        self.should_exit = True


class _Worker(Server):
    """One of several. A terminal's Ctrl-C and systemd's stop signal every process of a service, and then the one
    that watches tells its workers too: what comes twice is still one signal. At a second one it kills them.

    started: memory to say in that it has.
    """

    def __init__(self, config: uvicorn.Config, started: Any) -> None:
        super().__init__(config)
        self._told = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._told.value = self._told.value or self.started

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True

    def stop_with(self, parent: BaseProcess) -> None:
        """Wait for the end of `parent`, and stop then."""
        parent.join()
        self.should_exit = True


def run(config: uvicorn.Config) -> int:
    """Serve in this process until it is told to stop; the exit code."""
    server = Server(config)
    server.run()
    return 0 if server.started else CANNOT_START


def run_workers(count: int, listener: socket.socket, make_config: Callable[[], uvicorn.Config]) -> int:
    """Serve in `count` processes until this one is told to stop; the exit code. `make_config` must be a function
    that can be imported; it is called in each worker, in this process's environment."""
    fleet = _Fleet(listener, make_config)
    for number in _SIGNALS:
        signal.signal(number, fleet.stop)
    fleet.start(count)
    return fleet.watch()


class _Fleet:
    """The workers of one server."""

    def __init__(self, listener: socket.socket, make_config: Callable[[], uvicorn.Config]) -> None:
        self._listener = listener
        # Bare shared memory: a worker that is killed must not take a lock with it.
        self._started = multiprocessing.get_context("spawn").RawValue("b", 0)
        self._given = (listener, make_config, self._started)
        self._workers: list[SpawnProcess] = []
        self._stopping = False
        self._code = 0

    def start(self, count: int) -> None:
        for _ in range(count):
            worker = multiprocessing.get_context("spawn").Process(target=_work, args=self._given)
            worker.start()
            self._workers.append(worker)
        if self._stopping:  # told while these were being started
            self._end()

    def stop(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            for worker in self._workers:
                worker.kill()
            os._exit(_AT_ONCE + number)
        self._end()

    def _end(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.terminate()

    def watch(self) -> int:
        """Replace workers that die, until all have ended because they were told to."""
        while self._workers:
            wait([worker.sentinel for worker in self._workers], timeout=_PAUSE)
            if self._stopping:  # or clients would be let in and then wait for an answer that does not come
                self._listener.close()
            dead = [worker for worker in self._workers if not worker.is_alive()]
            self._workers = [worker for worker in self._workers if worker not in dead]
            if any(worker.exitcode == CANNOT_START for worker in dead) and not (self._stopping or self._started.value):
                self._code = CANNOT_START
                self._end()
            if dead and not self._stopping:
                logger.error("%d of the workers died and are replaced", len(dead))
                time.sleep(_PAUSE)
                self.start(0 if self._stopping else len(dead))
        return self._code


def _work(listener: socket.socket, make_config: Callable[[], uvicorn.Config], started: Any) -> None:
    """A worker's whole life."""
    server = _Worker(make_config(), started)
    parent = parent_process()
    assert parent is not None, "a worker has one"
    threading.Thread(target=server.stop_with, args=(parent,), daemon=True).start()
    server.run(sockets=[listener])
    sys.exit(0 if server.started else CANNOT_START)
