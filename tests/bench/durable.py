"""What durability costs, and how long it takes: background, resuming, many followers, takeover, the journal.

None of it has a relay to be compared with. CPU is that of our own processes, PostgreSQL's apart.
"""

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from sqlite3 import connect

import orjson

from tests.bench import bodies
from tests.bench.load import Job
from tests.bench.processes import BenchError, Server, run
from tests.bench.scenarios import OURS, Figure, Lab, Scenario, Target
from tests.bench.upstream import LONG_CHUNKS, PACED_CHUNKS, SILENT_TEXT, TALK_CHUNKS, streamed_text

_SQLITE, _POSTGRES = "SQLite", "PostgreSQL"
_LEASE = 3.0
_PAUSE = 0.3
_FOLLOWERS = 200
_OPENING = 4  # events before the first text
_numbers = count()


@contextmanager
def _workers(lab: Lab, url: str, number: int = 1, **settings: str) -> Iterator[list[Server]]:
    workers = [lab.worker(url, **settings) for _ in range(number)]
    try:
        yield workers
    finally:
        for worker in workers:
            lab.drop(worker)


def background(lab: Lab) -> None:
    """Small responses begun in the background, and all of them run."""
    body = bodies.body("small", background=True)
    for kind in (_POSTGRES, _SQLITE):
        title = f"D1 background, small, c=50, {kind}"
        with _workers(lab, lab.database(kind)) as (server,):
            job = Job("queue", server.port, body, 500 if lab.quick else 3000, "", 50)
            run(replace(job, turns=100))
            for _ in range(lab.rounds):
                _wait_completed(server, 0)
                cpu, known, began = server.cpu(), _completed(server), time.monotonic()
                result = run(job)
                _wait_completed(server, known + result.turns)
                took = time.monotonic() - began
                target = Target(300, "least") if kind == _POSTGRES else None
                lab.table.add(Figure(title, "created", "/s", target), OURS, result.turns / result.seconds)
                lab.table.add(Figure(title, "created and completed", "/s"), OURS, result.turns / took)
                lab.table.add(Figure(title, "CPU each", "ms"), OURS, (server.cpu() - cpu) / result.turns * 1e3)


def _completed(server: Server) -> int:
    """How many responses the server has completed, in all."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30) as answer:
        counts = [line for line in answer.read().decode().splitlines() if 'status="completed"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in counts if "_total{" in line)


def _wait_completed(server: Server, number: int) -> None:
    _wait(lambda: _completed(server) >= number)


def resume(lab: Lab) -> None:
    """A long stream that has ended, followed from its beginning and from its middle."""
    text = streamed_text(LONG_CHUNKS)
    for kind in (_SQLITE, _POSTGRES):
        with _workers(lab, lab.database(kind)) as (server,):
            id = _made(server, "long", LONG_CHUNKS)
            middle = len(streamed_text(LONG_CHUNKS // 2))
            from_start = _replay(server, id, 10, text)
            seen = _OPENING + LONG_CHUNKS // 2 - 1
            get = f"{from_start.get}&starting_after={seen}"
            from_middle = replace(from_start, get=get, after=seen, text=text[middle:])
            for job in (from_start, from_middle):
                run(replace(job, turns=2))
            for _ in range(lab.rounds):
                for what, job in (("from its start", from_start), ("from its middle", from_middle)):
                    before = server.cpu()
                    result = run(job)
                    title = f"D2 resume of {LONG_CHUNKS:,} events, {kind}, {what}"
                    figure = Figure(title, "last byte, median", "ms", Target(150, "absolute"))
                    lab.table.add(figure, OURS, sorted(result.latency)[len(result.latency) // 2])
                    lab.table.add(Figure(title, "CPU each", "ms"), OURS, (server.cpu() - before) / job.turns * 1e3)


def _made(server: Server, model: str, chunks: int) -> str:
    """The id of a finished stream."""
    body = bodies.body(model, stream=True)
    job = Job("follow", server.port, body, 0, streamed_text(chunks), stream=True, follow=server.port)
    return run(job).ids[0]


def _replay(server: Server, id: str, turns: int, text: str) -> Job:
    return Job("load", server.port, "", turns, text, stream=True, get=f"{id}?stream=true")


def followers(lab: Lab) -> None:
    """Many who follow one run as it comes, beside as many who get it afterwards, one by one."""
    text = streamed_text(TALK_CHUNKS)
    body = bodies.body("talk", stream=True)
    for kind, number, where in ((_SQLITE, 1, "its own process"), (_POSTGRES, 2, "another worker")):
        title = f"D3 {_FOLLOWERS} followers of {TALK_CHUNKS} x 10 ms, {where}, {kind}"
        with _workers(lab, lab.database(kind), number) as workers:
            job = Job("follow", workers[0].port, body, _FOLLOWERS, text, stream=True, follow=workers[-1].port)
            run(replace(job, turns=2))
            for _ in range(lab.rounds):
                before = _cpu(workers)
                id = run(job).ids[0]
                live, before = _cpu(workers) - before, _cpu(workers)
                run(_replay(workers[-1], id, _FOLLOWERS, text))
                replays = _cpu(workers) - before
                lab.table.add(Figure(title, "CPU of the followers and the run", "ms"), OURS, live * 1e3)
                lab.table.add(Figure(title, "CPU of the replays", "ms"), OURS, replays * 1e3)
                lab.table.add(Figure(title, "followers / replays", "x", Target(2, "absolute")), OURS, live / replays)


def _cpu(workers: list[Server]) -> float:
    return sum(worker.cpu() for worker in workers)


def takeover(lab: Lab) -> None:
    """A worker is killed; its client turns to the other one."""
    for what, watch in (("background", _watch_background), ("foreground", _watch_foreground)):
        title = f"D4 takeover after kill -9, {what}, lease {_LEASE:g} s, {_POSTGRES}"
        took = []
        for _ in range(1 if lab.quick else 2 * lab.rounds):
            with _workers(lab, lab.database(_POSTGRES), 2, lease=str(_LEASE)) as (first, second):
                took.append(watch(first, second))
            lab.table.add(Figure(title, "its end is seen after", "s"), OURS, took[-1])
        lab.table.add(Figure(title, "at worst", "s", Target(_LEASE + 1, "absolute")), OURS, max(took))


def _watch_background(first: Server, second: Server) -> float:
    """Nothing of it was shown: it is run again. Its upstream never answers the first time."""
    request = bodies.body(f"late-{next(_numbers)}", background=True)
    id = orjson.loads(_ask(first, "", request))["id"]
    time.sleep(_PAUSE)  # so that its upstream has been asked
    began = _kill(first)
    _wait(lambda: _status(second, id) == "completed")
    return time.monotonic() - began


def _watch_foreground(first: Server, second: Server) -> float:
    """It was shown: it ends as failed, where its client follows it on the other worker."""
    request = urllib.request.Request(_url(first, ""), bodies.body("silent", stream=True).encode(), _JSON)
    with urllib.request.urlopen(request, timeout=30) as stream:
        created = orjson.loads(next(line for line in stream if line.startswith(b"data: "))[6:])
        next(line for line in stream if SILENT_TEXT.encode() in line)
        time.sleep(_PAUSE)  # so that the text is in the journal
        began = _kill(first)
    told = _ask(second, f"/{created['response']['id']}?stream=true", None)
    if b"event: response.failed" not in told or SILENT_TEXT.encode() not in told:
        raise BenchError(f"The run was not closed as failed: {told[-300:]!r}")
    return time.monotonic() - began


_JSON = {"content-type": "application/json"}


def _kill(server: Server) -> float:
    server.kill()
    return time.monotonic()


def _url(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.port}/v1/responses{path}"


def _ask(server: Server, path: str, body: str | None) -> bytes:
    request = urllib.request.Request(_url(server, path), body.encode() if body else None, _JSON)
    with urllib.request.urlopen(request, timeout=30) as answer:
        told: bytes = answer.read()
    return told


def _status(server: Server, id: str) -> str:
    return str(orjson.loads(_ask(server, f"/{id}", None))["status"])


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError("What was waited for did not come.")
        time.sleep(0.02)


def journal(lab: Lab) -> None:
    """What a paced stream leaves in the journal, beyond its text."""
    title = f"D5 journal of {PACED_CHUNKS} x 5 ms, {_SQLITE}"
    url, text = lab.database(_SQLITE), len(streamed_text(PACED_CHUNKS))
    with _workers(lab, url) as (server,):
        for _ in range(lab.rounds):
            before = _journal_bytes(url)
            _made(server, "paced", PACED_CHUNKS)
            for (what, target), was, now in zip(_PARTS.items(), before, _journal_bytes(url), strict=True):
                figure = Figure(title, f"{what} per text event, beyond its text", "B", target)
                lab.table.add(figure, OURS, (now - was - text) / PACED_CHUNKS)


_PARTS = {"payloads": Target(20, "absolute"), "whole rows and their index": None}


def _journal_bytes(url: str) -> tuple[int, int]:
    """Of the journal's payloads, and of all that its table and its index hold."""
    with closing(connect(url.removeprefix("sqlite:///"), timeout=30)) as connection:
        (payloads,) = connection.execute("SELECT coalesce(sum(length(payload)), 0) FROM journal").fetchone()
        (rows,) = connection.execute(
            "SELECT sum(payload) FROM dbstat WHERE name IN ('journal', 'sqlite_autoindex_journal_1')"
        ).fetchone()
    return int(payloads), int(rows)


DURABLE: dict[str, Scenario] = {
    "D1": background,
    "D2": resume,
    "D3": followers,
    "D4": takeover,
    "D5": journal,
}
