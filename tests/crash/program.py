"""A server process that kills itself at a named point of a run's life, as soon as it is armed.

A point is one of those that `Application` tells (`begin.before`, …), or the beginning of a statement: then the
process dies when that has been executed and nothing is committed. It is armed through a file, which is looked
at when a point is passed, so that what came before the arming does not count.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import Engine, event

from responses_ingress import serving
from responses_ingress.app import Application
from responses_ingress.cli import _server_options
from responses_ingress.settings import load

Forks = multiprocessing.get_context("forkserver")
"""Starts servers from a process that has imported all they need: that takes a tenth of the time."""
Forks.set_forkserver_preload([__name__])


class Trap:
    """Counts the passes of the point that the file names, as `<count> <point>`, and dies at the last of them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._passed = 0

    def at(self, point: str) -> None:
        try:
            count, _, armed = self._file.read_text(encoding="utf-8").partition(" ")
        except FileNotFoundError:
            return
        if point.startswith(armed):
            self._passed += 1
            if self._passed == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    def after_statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.at(statement)


def serve(environment: Mapping[str, str], trap_file: Path, log: Path) -> None:
    """The life of the process."""
    with log.open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    settings, trap = load(None, {}), Trap(trap_file)
    event.listen(Engine, "after_cursor_execute", trap.after_statement)
    sys.exit(serving.run(uvicorn.Config(Application(settings, trap.at), **_server_options(settings))))
