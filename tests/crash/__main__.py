"""Kill servers at random moments under load, then look at what is left: `python -m tests.crash [--kills 200]
[--database URL] [--servers 1] [--clients 6] [--lease 2] [--seed 1]`.

The database is a new SQLite file, or the one at URL, which must be empty. Half of the kills come from outside
at any moment, half at a named point of a run's life. The exit code is 1 where anything was lost, stuck, kept or
asked twice, or where `responses-ingress verify` would have a finding. The same seed makes the same choices; the
moments are the machine's.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from responses_ingress.settings import Settings
from responses_ingress.store.migrate import migrate
from responses_ingress.store.verify import Finding, verify
from tests.crash.contract import FLUSH, unfinished
from tests.crash.load import PATIENCE, Conversation, Model, Report
from tests.crash.server import MortalServer
from tests.upstream import Upstream

POINTS = (
    "begin.before",
    "begin.after",
    "journal.before",
    "journal.after",
    "publish.before",
    "publish.after",
    "end.before",
    "end.after",
    "cancel",
    "INSERT INTO responses",
    "INSERT INTO journal",
    "INSERT INTO items",
    "UPDATE branches",
    "UPDATE responses",
    "UPDATE threads",
)
_PER_KILL = 10.0
"""Seconds that a kill and what follows it may take, on average, before all is given up."""


class Storm:
    """Servers that are killed, and clients that go on."""

    def __init__(self, options: argparse.Namespace, servers: list[MortalServer], model: Model) -> None:
        self.kills = 0
        self.report = Report()
        self._options = options
        self._servers = servers
        self._model = model
        self._random = Random(options.seed)
        self._stopping = asyncio.Event()

    async def rage(self) -> None:
        clients = [asyncio.create_task(self._converse(number)) for number in range(self._options.clients)]
        while self.kills < self._options.kills and not self.report.wrong:
            await self._strike()
        self._stopping.set()
        await asyncio.gather(*clients)

    async def _converse(self, client: int) -> None:
        """One conversation after another."""
        number = 0
        while not self._stopping.is_set():
            number += 1
            name = f"seed {self._options.seed}, client {client}, talk {number}"
            await Conversation(name, self._servers, self._model, self.report, lambda: self.kills).run(self._stopping)

    async def _strike(self) -> None:
        server = self._random.choice(self._servers)
        if self._random.random() < 0.5:
            server.arm(self._random.choice(POINTS), self._random.randint(1, 6))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await server.died()
                    self.report.counts["died at a point"] += 1
        else:
            await asyncio.sleep(self._random.uniform(0, 1.2))
        await server.kill()
        self.kills += 1
        await asyncio.sleep(self._random.choice((0, 0, 0.3)))
        await server.start()
        if self.kills % 25 == 0:
            print(f"{self.kills} kills, {self.report.counts.total()} things noted", flush=True)


async def run(options: argparse.Namespace, folder: Path) -> int:
    """Let it rage; the exit code."""
    database = options.database or f"sqlite:///{folder / 'crash.db'}"
    model = Model(options.seed)
    async with Upstream() as upstream, contextlib.AsyncExitStack() as stack:
        upstream.answer = model.answer
        settings = Settings(
            backend="chat",
            upstream=upstream.url,
            database_url=database,
            lease=options.lease,
            flush_interval=FLUSH,
            disconnect_grace=0.2,
        )
        await migrate(settings.async_database_url)
        servers = [
            await stack.enter_async_context(MortalServer(settings, folder, quiet=True)) for _ in range(options.servers)
        ]
        storm, began = Storm(options, servers, model), time.monotonic()
        async with asyncio.timeout(PATIENCE + _PER_KILL * options.kills):
            await storm.rage()
            await asyncio.sleep(options.lease + 2)
        report = storm.report
        report.wrong += [f"{id}: it has not ended" for id in unfinished(settings.async_database_url)]
        findings: list[Finding] = []
        seen = await verify(settings.async_database_url, options.lease, findings.append)
    report.wrong += map(str, findings)
    print(f"{storm.kills} kills in {time.monotonic() - began:.0f} s, seed {options.seed}")
    print(f"turns: {', '.join(f'{count} {name}' for name, count in sorted(report.counts.items()))}")
    print(f"the longest turn took {report.longest:.1f} s; {len(upstream.calls)} calls of the upstream")
    print(f"database: {', '.join(f'{count} {table}' for table, count in seen.items())}")
    for line in report.wrong:
        print(f"WRONG  {line}")
    if report.wrong:
        for server in servers:
            print(server.log)
    return 1 if report.wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--database", metavar="URL", help="an empty database; by default a new SQLite file")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--lease", type=float, default=2.0, help="seconds; a busy machine needs some to renew it")
    parser.add_argument("--seed", type=int, default=1)
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        sys.exit(asyncio.run(run(parser.parse_args(), Path(folder))))


if __name__ == "__main__":
    main()
