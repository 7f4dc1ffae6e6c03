"""The real codex CLI, from npm, run against a server of ours.

What must stay true: a run sees nothing of the machine's own codex: its home, its working folder and its
environment are its own. It must not know what the server stores; see `tests.history` for that.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tests.cache import fetch, installed, tool

VERSIONS = ("0.169.0", "0.140.0")
_FLAGS = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")
_TIMEOUT = 45.0
_UUID = 36


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of `codex exec` ended and what it printed: one JSON event a line."""

    code: int
    events: list[dict[str, Any]]
    stderr: str

    @property
    def thread_id(self) -> str:
        return str(self._one("thread.started")["thread_id"])

    @property
    def usage(self) -> dict[str, int]:
        return dict(self._one("turn.completed")["usage"])

    @property
    def failure(self) -> str:
        return str(self._one("turn.failed")["error"]["message"])

    @property
    def messages(self) -> list[str]:
        """What the agent said."""
        return [item["text"] for item in self.items("agent_message")]

    def items(self, type: str) -> list[dict[str, Any]]:
        """The completed items of this type."""
        done = (event["item"] for event in self.events if event["type"] == "item.completed")
        return [item for item in done if item["type"] == type]

    def _one(self, type: str) -> dict[str, Any]:
        found = [event for event in self.events if event["type"] == type]
        assert len(found) == 1, f"{len(found)} events {type}: {self}"
        return found[0]


@dataclass(frozen=True, slots=True)
class Codex:
    """One version of codex with a home and a working folder of its own."""

    version: str
    binary: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def install(cls, version: str, folder: Path) -> "Codex":
        """Fetch the version unless the cache has it; `folder` is for its home and working folder."""
        tool("node")
        cached = installed(f"codex-{version}", lambda target: _npm(target, version))
        codex = cls(version, cached / "node_modules" / ".bin" / "codex", folder)
        codex.home.mkdir()
        codex.work.mkdir()
        return codex

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def configure(self, base_url: str, *, model: str = "test-model", **settings: str | int) -> None:
        """Write config.toml as a user of ours would; `settings` are further top-level keys."""
        lines = [
            f"model = {_toml(model)}",
            'model_provider = "ingress"',
            *(f"{name} = {_toml(value)}" for name, value in settings.items()),
            "",
            "[model_providers.ingress]",
            'name = "Responses Ingress"',
            f"base_url = {_toml(base_url)}",
            'wire_api = "responses"',
        ]
        (self.home / "config.toml").write_text("\n".join(lines) + "\n")

    def ask_for_models(self) -> None:
        """Let codex get its bearer from a command, with which alone it asks the provider for its models."""
        with (self.home / "config.toml").open("a") as config:
            config.write('[model_providers.ingress.auth]\ncommand = "/bin/echo"\nargs = ["sk-any"]\n')

    async def exec(self, prompt: str) -> Outcome:
        """A new thread."""
        return await self._run("exec", *_FLAGS, prompt)

    async def resume(self, thread_id: str, prompt: str) -> Outcome:
        return await self._run("exec", "resume", *_FLAGS, thread_id, prompt)

    async def fork(self, thread_id: str, prompt: str) -> Outcome:
        """A new thread that begins with the history of another (from 0.169)."""
        return await self._run("exec", "fork", *_FLAGS, thread_id, prompt)

    @contextlib.asynccontextmanager
    async def interrupted(self, prompt: str) -> AsyncIterator[None]:
        """A new thread that is killed when the block ends, wherever it is then."""
        process = await self._start("exec", *_FLAGS, prompt)
        try:
            yield
        finally:
            _kill(process)
            await process.communicate()

    @property
    def thread_ids(self) -> list[str]:
        """The threads codex has begun, oldest first."""
        return [path.stem[-_UUID:] for path in sorted(self.home.glob("sessions/**/rollout-*.jsonl"))]

    def rollout(self, thread_id: str) -> list[dict[str, Any]]:
        """The response items of a thread as codex itself keeps them, in order, compaction not applied."""
        (path,) = self.home.glob(f"sessions/**/rollout-*{thread_id}.jsonl")
        lines = map(orjson.loads, path.read_bytes().splitlines())
        return [line["payload"] for line in lines if line["type"] == "response_item"]

    async def _run(self, *arguments: str) -> Outcome:
        process = await self._start(*arguments)
        try:
            async with asyncio.timeout(_TIMEOUT):
                stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:
                _kill(process)
                await process.wait()
        assert process.returncode is not None
        events = [orjson.loads(line) for line in stdout.splitlines() if line.startswith(b"{")]
        return Outcome(process.returncode, events, stderr.decode())

    async def _start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.binary,
            *arguments,
            cwd=self.work,
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        own = {"HOME": str(self.folder), "CODEX_HOME": str(self.home), "PATH": os.environ["PATH"]}
        return {**own, "SHELL": "/bin/bash", "LANG": "C.UTF-8", **self.environment}


def _kill(process: asyncio.subprocess.Process) -> None:
    """The npm package starts codex itself as a child: both must go."""
    os.killpg(process.pid, signal.SIGKILL)


def _npm(target: Path, version: str) -> None:
    fetch(tool("npm"), "install", "--no-audit", "--no-fund", "--prefix", str(target), f"@openai/codex@{version}")


def _toml(value: str | int) -> str:
    return orjson.dumps(value).decode()
