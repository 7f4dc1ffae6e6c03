"""What is measured, and against which target. Each scenario fills a `Table` with figures."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tests.bench import bodies
from tests.bench.load import Job, Result
from tests.bench.processes import Server, holding, run
from tests.bench.upstream import PACED_CHUNKS, SILENT_TEXT, SMALL_TEXT, streamed_text

RELAY, OURS = "relay", "ours"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of the issue's: on our figure itself (`least`: from below), or on what it is times or above the
    relay's."""

    bound: float
    against: str = "ratio"  # ratio | added | absolute | least


@dataclass(slots=True)
class Figure:
    """One line of the table: the measurements of each server, one a round."""

    scenario: str
    what: str
    unit: str
    target: Target | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, server: str) -> float | None:
        values = self.values.get(server)
        return statistics.median(values) if values else None


class Table:
    """All figures, in the order they first came up."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], Figure] = {}

    def add(self, figure: Figure, server: str, value: float) -> None:
        known = self._figures.setdefault((figure.scenario, figure.what), figure)
        known.values.setdefault(server, []).append(value)

    @property
    def figures(self) -> Sequence[Figure]:
        return list(self._figures.values())


class Lab(Protocol):
    """What a scenario may ask for."""

    table: Table
    servers: Sequence[str]
    rounds: int
    quick: bool

    def server(self, name: str) -> Server:
        """The long-running server of this name, warm."""
        ...

    def fresh(self, name: str) -> tuple[Server, Path]:
        """A server just started, with an empty database at the path."""
        ...

    def database(self, kind: str) -> str:
        """The URL of a new database: `SQLite` or `PostgreSQL`."""
        ...

    def worker(self, url: str, **settings: str) -> Server:
        """One of ours just started, on the database at this URL."""
        ...

    def drop(self, server: Server) -> None: ...


Scenario = Callable[[Lab], None]


@dataclass(frozen=True, slots=True)
class Throughput:
    """CPU per unit of work under a load, and the times a client sees."""

    name: str
    title: str
    job: Job
    quick_turns: int
    target: float | None
    chunks: int = 0
    first_target: float | None = None

    def __call__(self, lab: Lab) -> None:
        for name in lab.servers:  # not measured: connections, caches, prepared statements
            self._run(lab, name, turns=max(self.job.concurrency, 10))
        for _ in range(lab.rounds):
            for name in lab.servers:
                self._measure(lab, name)

    def _measure(self, lab: Lab, name: str) -> None:
        server = lab.server(name)
        before = server.cpu()
        result = self._run(lab, name, turns=self.quick_turns if lab.quick else self.job.turns)
        spent = server.cpu() - before
        if self.chunks:
            figure = self._figure("CPU per text event", "us", self.target)
            lab.table.add(figure, name, spent / result.turns / self.chunks * 1e6)
        else:
            figure = self._figure("CPU per turn", "ms", self.target)
            lab.table.add(figure, name, spent / result.turns * 1e3)
        lab.table.add(self._figure("turns per second", "/s"), name, result.turns / result.seconds)
        lab.table.add(self._figure("turn, median", "ms"), name, statistics.median(result.latency))
        lab.table.add(self._figure("turn, 99 of 100", "ms"), name, _high(result.latency))
        if result.first:
            target = None if self.first_target is None else Target(self.first_target, "added")
            figure = Figure(self.title, "first text, median", "ms", target)
            lab.table.add(figure, name, statistics.median(result.first))

    def _run(self, lab: Lab, name: str, *, turns: int) -> Result:
        return run(replace(self.job, port=lab.server(name).port, turns=turns))

    def _figure(self, what: str, unit: str, bound: float | None = None) -> Figure:
        return Figure(self.title, what, unit, None if bound is None else Target(bound))


def _high(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


CHAIN_TURNS = 200


def chain(lab: Lab) -> None:
    """A long conversation by `previous_response_id`: must not slow down, must not grow but by what is new."""
    if OURS not in lab.servers:
        return
    title = "S4 chain of 200 turns of 1 kB"
    server, database = lab.fresh(OURS)
    given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": bodies.text(1_000)}]}]
    job = Job("chain", server.port, bodies.body("chain", given), turns=10, text="", database=str(database))
    run(job)
    for _ in range(lab.rounds):
        before = server.cpu()
        result = run(replace(job, turns=CHAIN_TURNS))
        times = {turn: _around(result.latency, turn) for turn in (1, 50, 100, CHAIN_TURNS)}
        for turn, took in times.items():
            target = Target(2 * times[1] + 3, "absolute") if turn == CHAIN_TURNS else None
            lab.table.add(Figure(title, f"turn {turn}", "ms", target), OURS, took)
        spent = (server.cpu() - before) / CHAIN_TURNS * 1e3
        lab.table.add(Figure(title, "CPU per turn, mean", "ms"), OURS, spent)
        _add_growth(lab, title, result.database_bytes)
    lab.drop(server)


def _around(latency: Sequence[float], turn: int) -> float:
    """The median of the turn and the few beside it."""
    return statistics.median(latency[max(0, turn - 3) : turn + 2])


def _add_growth(lab: Lab, title: str, sizes: Sequence[int]) -> None:
    """`sizes` are those of the file after 50, 100, 150 and 200 turns."""
    steps = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    per_turn = (sizes[-1] - sizes[0]) / (CHAIN_TURNS - 50) / 1e3
    lab.table.add(Figure(title, "database per turn", "kB", Target(5, "absolute")), OURS, per_turn)
    figure = Figure(title, "growth, last 50 turns / turns 51-100", "x", Target(1.05, "absolute"))
    lab.table.add(figure, OURS, steps[-1] / steps[0])


STREAMS = 500


def silent(lab: Lab) -> None:
    """Many open streams that say nothing: what each costs in memory, how fast they open."""
    title = f"S6 {STREAMS} open silent streams"
    for _ in range(lab.rounds):
        for name in lab.servers:
            server, _ = lab.fresh(name)
            warm = Job("load", server.port, bodies.body("burst50", stream=True), 200, streamed_text(50), 20, True)
            run(warm)
            before = server.memory()
            job = Job("hold", server.port, bodies.body("silent", stream=True), STREAMS, SILENT_TEXT, stream=True)
            with holding(job) as result:
                each = (server.memory() - before) / STREAMS / 1e3
                lab.table.add(Figure(title, "memory per stream", "kB", Target(60, "absolute")), name, each)
                figure = Figure(title, "all open after", "ms", Target(2000, "absolute"))
                lab.table.add(figure, name, result.latency[0])
            lab.table.add(Figure(title, "memory before", "MB"), name, before / 1e6)
            lab.drop(server)


_PORT = 0  # filled in when a job is run


def _throughput(name: str, title: str, job: Job, quick: int, target: float | None, chunks: int = 0) -> Throughput:
    return Throughput(name, f"{name} {title}", job, quick, target, chunks)


def _streamed(model: str, chunks: int, turns: int, concurrency: int) -> Job:
    request = bodies.body(model, stream=True)
    return Job("load", _PORT, request, turns, streamed_text(chunks), concurrency, stream=True)


def _small(store: bool, counts: bool = False) -> Job:
    return Job("load", _PORT, bodies.body("small", store=store), 4000, SMALL_TEXT, 50, counts=counts)


def _codex(new_threads: bool) -> Job:
    request = bodies.codex_body("burst50")
    return Job("load", _PORT, request, 600, streamed_text(50), 10, stream=True, new_threads=new_threads)


SCENARIOS: dict[str, Scenario] = {
    "S1": _throughput("S1", "small stored turns, c=50", _small(True), 1000, 2.0),
    "S1r": _throughput("S1r", "the same with the SDKs' retry count, c=50", _small(True, counts=True), 1000, None),
    "S7": _throughput("S7", "small turns, store:false, c=50", _small(False), 1000, 1.5),
    "S2": _throughput("S2", "paced, 200 x 5 ms, c=50", _streamed("paced", PACED_CHUNKS, 200, 50), 100, 1.3, 200),
    "S2b": Throughput(
        "S2b", "S2b paced, 200 x 5 ms, c=5", _streamed("paced", PACED_CHUNKS, 25, 5), 10, None, 200, first_target=10
    ),
    "S3": _throughput("S3", "bursts of 200, c=20", _streamed("burst", 200, 1000, 20), 300, 2.0, 200),
    "S4": chain,
    "S5": _throughput("S5", "codex-like, 91 kB, store:false, c=10", _codex(False), 150, 1.5),
    "S5t": _throughput("S5t", "the same, each a thread of its own", _codex(True), 150, None),
    "S6": silent,
}
