"""The real codex CLI over a server that is killed in the middle of its turn and comes back on the same port."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.codex import VERSIONS, Codex
from tests.crash.contract import check_database
from tests.crash.server import MortalServer
from tests.history import brief, history
from tests.upstream import Say, Stream, Upstream, chunk

pytestmark = pytest.mark.timeout(90, func_only=True)  # fetching codex may take longer, once


@pytest.mark.parametrize("version", VERSIONS)
async def test_codex_reconnects_and_finishes_its_turn(
    server: MortalServer, upstream: Upstream, tmp_path: Path, version: str
) -> None:
    codex = Codex.install(version, tmp_path)
    codex.configure(server.url)
    half = Stream([chunk({"content": "Half an "}), chunk({"content": "answer"})], close="silent", pace=0.02)
    upstream.script(Say(calls=[("exec_command", {"cmd": "echo hi"})]), half, Say("Whole."))
    running = asyncio.create_task(codex.exec("Do it"))
    await upstream.called(2)
    server.arm("journal.after")
    await server.died()
    await server.start()

    outcome = await running
    file = Path(make_url(server.database).database or "")
    assert outcome.code == 0, outcome
    assert outcome.messages[-1] == "Whole."
    assert len(upstream.calls) == 3
    kinds = [kind for kind, _ in brief(history(file, outcome.thread_id))]
    assert kinds == ["user", "function_call", "function_call_output", "assistant"]
    assert brief(history(file, outcome.thread_id))[-1] == ("assistant", "Whole.")
    await check_database(server.database)
