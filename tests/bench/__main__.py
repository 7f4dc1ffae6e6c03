"""Measure the server beside a bare relay: `python -m tests.bench [--scenario S1 …] [--rounds 3] [--quick]`.

Server under test on core 0; load generator and upstream on core 1. Each figure is the median of rounds
that take turns between relay and server; CPU is user and system time of the server's process tree.
Absolute figures are those of this machine; the ratio to the relay is what can be compared. A difference
below 25 % is noise on a busy machine.
"""

import argparse
import contextlib
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from responses_ingress.settings import PREFIX
from tests.bench.durable import DURABLE
from tests.bench.postgres import Postgres
from tests.bench.processes import BenchError, Server, free_port, upstream
from tests.bench.scenarios import OURS, RELAY, SCENARIOS, Figure, Table

_SERVE = "from responses_ingress.cli import main; main()"
_SCENARIOS = {**SCENARIOS, **DURABLE}


class Bench:
    """Starts servers where a scenario asks for them (the `Lab` of `scenarios`)."""

    def __init__(self, options: argparse.Namespace, upstream_url: str, folder: Path) -> None:
        self.table = Table()
        self.servers: Sequence[str] = options.server or (RELAY, OURS)
        self.rounds: int = options.rounds or (1 if options.quick else 3)
        self.quick: bool = options.quick
        self._upstream = upstream_url
        self._folder = folder
        self._postgres = Postgres()
        self._running: dict[str, Server] = {}
        self._started: list[Server] = []

    def server(self, name: str) -> Server:
        if name not in self._running:
            self._running[name], _ = self.fresh(name)
        return self._running[name]

    def fresh(self, name: str) -> tuple[Server, Path]:
        number, port = len(self._started), free_port()
        database = self._folder / f"{number}.db"
        server = Server(self._command(name, port, database), port, self._folder / f"{number}-{name}.log")
        self._started.append(server)
        server.wait_ready()
        return server, database

    def database(self, kind: str) -> str:
        if kind == "PostgreSQL":
            return self._postgres.database()
        return f"sqlite:///{self._folder / f'{len(self._started)}.db'}"

    def worker(self, url: str, **settings: str) -> Server:
        number, port = len(self._started), free_port()
        environment = {f"{PREFIX}{name.upper()}": value for name, value in {"auto_migrate": "true", **settings}.items()}
        server = Server(self._serve(port, url), port, self._folder / f"{number}-{OURS}.log", environment)
        self._started.append(server)
        server.wait_ready()
        return server

    def drop(self, server: Server) -> None:
        server.stop()

    def stop(self) -> None:
        for server in self._started:
            server.stop()
        self._postgres.stop()

    def _command(self, name: str, port: int, database: Path) -> list[str]:
        if name == RELAY:
            return [sys.executable, "-m", "tests.bench.relay", str(port), self._upstream]
        return self._serve(port, f"sqlite:///{database}")

    def _serve(self, port: int, database_url: str) -> list[str]:
        serve = ["serve", "--port", str(port), "--backend", "chat", "--upstream", self._upstream]
        return [sys.executable, "-c", _SERVE, *serve, "--database-url", database_url]


@contextlib.contextmanager
def _bench(options: argparse.Namespace) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        if options.keep:
            folder = Path(options.keep)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        bench = Bench(options, stack.enter_context(upstream(folder / "upstream.log")), folder)
        stack.callback(bench.stop)
        yield bench


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--scenario", action="append", choices=_SCENARIOS, help="only this one; may be repeated")
    parser.add_argument("--server", action="append", choices=(RELAY, OURS), help="only this server; may be repeated")
    parser.add_argument("--rounds", type=int, help="rounds to take the median of (3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer turns and one round: a look, not a figure")
    parser.add_argument("--keep", metavar="FOLDER", help="leave databases and logs in this folder")
    return parser.parse_args(arguments)


def _rows(figures: Sequence[Figure]) -> Iterator[tuple[str, ...]]:
    yield "scenario", "figure", RELAY, OURS, "x relay", "target", ""
    previous = ""
    for figure in figures:
        relay, ours = figure.median(RELAY), figure.median(OURS)
        ratio = f"{ours / relay:.2f}" if relay and ours else ""
        title = "" if figure.scenario == previous else figure.scenario
        yield title, figure.what, _cell(relay, figure.unit), _cell(ours, figure.unit), ratio, *_verdict(figure)
        previous = figure.scenario


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2}f} {unit}"


def _verdict(figure: Figure) -> tuple[str, str]:
    """The target in words, and whether it is met."""
    target, relay, ours = figure.target, figure.median(RELAY), figure.median(OURS)
    if target is None:
        return "", ""
    if target.against == "least":
        return (
            f">= {target.bound:.4g} {figure.unit}",
            "" if ours is None else "ok" if ours >= target.bound else "MISSED",
        )
    if target.against == "absolute":
        words, measured = f"<= {target.bound:.4g} {figure.unit}", ours
    elif target.against == "added":
        words = f"<= relay + {target.bound:g} {figure.unit}"
        measured = ours - relay if ours is not None and relay is not None else None
    else:
        words, measured = f"<= {target.bound:g} x relay", ours / relay if ours and relay else None
    return words, "" if measured is None else "ok" if measured <= target.bound else "MISSED"


def _print(table: Table) -> None:
    rows = list(_rows(table.figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= at <= 4 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return f"{datetime.now(UTC):%d %b %Y}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # S6 opens some 2,000 sockets
    print(_machine(), flush=True)
    with _bench(options) as bench:
        try:
            for name in options.scenario or _SCENARIOS:
                print(f"  {name} …", file=sys.stderr, flush=True)
                _SCENARIOS[name](bench)
        except BenchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        finally:
            _print(bench.table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
