"""The processes of a benchmark: started pinned to a core, watched through /proc (Linux only)."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import orjson

from tests.bench.load import Job, Result

SERVER_CORE, LOAD_CORE = 0, 1
START_TIMEOUT = 30.0
ROOT = Path(__file__).parents[2]
_TICK = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A measurement that cannot be made, or one that measured wrong answers."""


class Server:
    """A server under measurement: relay or ours, on `port`, with its log in `log`."""

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self.log = log
        self._process = _spawn(SERVER_CORE, command, log, environment=environment)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"The server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def cpu(self) -> float:
        """Seconds of user and system time of the process and its children so far."""
        return sum(_cpu(pid) for pid in _tree(self._process.pid))

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        return sum(_resident(pid) for pid in _tree(self._process.pid))

    def stop(self) -> None:
        _stop(self._process)

    def kill(self) -> None:
        """End it without a word, as a crash would."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def upstream(log: Path) -> Iterator[str]:
    """The benchmark's model; gives its base URL."""
    process = _spawn(LOAD_CORE, [sys.executable, "-m", "tests.bench.upstream"], log, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise BenchError(f"The upstream did not start:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def run(job: Job) -> Result:
    """Run a job to its end."""
    with _load(job) as process:
        assert process.stdout is not None
        return _result(job, process.stdout.readline())


@contextlib.contextmanager
def holding(job: Job) -> Iterator[Result]:
    """Open the streams of a `hold` job and keep them open inside the `with`."""
    with _load(job) as process:
        assert process.stdin is not None and process.stdout is not None
        yield _result(job, process.stdout.readline())
        process.stdin.write("\n")
        process.stdin.flush()


@contextlib.contextmanager
def _load(job: Job) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.load"]
    process = _spawn(LOAD_CORE, command, None, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None
        process.stdin.write(orjson.dumps(job).decode() + "\n")
        process.stdin.flush()
        yield process
        process.wait()
    finally:
        _stop(process)


def _result(job: Job, line: str) -> Result:
    if not line:
        raise BenchError("The load generator died.")
    result = Result(**orjson.loads(line))
    if result.errors:
        raise BenchError(f"{len(result.errors)} wrong answers in {job.turns} turns, the first: {result.errors[0]}")
    return result


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _spawn(
    core: int,
    command: Sequence[str],
    log: Path | None,
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    with contextlib.ExitStack() as stack:
        err: IO[str] | None = stack.enter_context(log.open("w")) if log is not None else None
        return subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or err,
            stderr=err,
            text=True,
        )


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _tree(int(child))
    return found


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
