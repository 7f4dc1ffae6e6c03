"""The real codex CLI against the server, and what the database holds afterwards.

Codex carries its own history and keeps it in a file of its own, its rollout: the database must hold the
same items in the same order, none twice, none lost.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from responses_ingress.settings import Settings
from responses_ingress.web.models import BASE_INSTRUCTIONS
from tests.codex import VERSIONS, Codex
from tests.history import branches, brief, history, responses, stored_items, threads
from tests.server import ServerProcess, running
from tests.upstream import Answer, Received, Reply, Say, Stream, Upstream, call_chunks, chunk, usage

pytestmark = pytest.mark.timeout(60, func_only=True)  # fetching codex may take longer, once

NEWEST = VERSIONS[0]
ECHO_HI = {"cmd": "echo hi"}


@pytest.fixture(params=VERSIONS)
def codex(request: pytest.FixtureRequest, tmp_path: Path) -> Codex:
    return Codex.install(request.param, tmp_path)


@pytest.fixture
def newest(tmp_path: Path) -> Codex:
    return Codex.install(NEWEST, tmp_path)


def assert_sound(codex: Codex, database: Path, thread_id: str) -> None:
    """The thread is what codex holds of it, and nothing on it is there twice."""
    stored = history(database, thread_id)
    assert brief(stored) == brief(codex.rollout(thread_id))
    ids = [item["id"] for item in stored if "id" in item]
    assert len(ids) == len(set(ids))
    payloads = stored_items(database)
    assert len(payloads) == len({repr(item) for item in payloads})


def last_messages(upstream: Upstream) -> list[tuple[str, Any]]:
    """(role, content) of what the newest call sent upstream, without instructions and environment."""
    sent = [(message["role"], message.get("content")) for message in upstream.calls[-1].json["messages"]]
    return [
        (role, said)
        for role, said in sent
        if role != "system" and not (isinstance(said, str) and said.startswith("<environment_context>"))
    ]


async def test_first_turn_and_resume(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    upstream.script(Say("Good morning.", reasoning="They greet me.", usage=usage(1200, 34)), Say("Still here."))

    first = await codex.exec("Good day")
    assert first.code == 0, first
    assert first.messages == ["Good morning."]
    assert (first.usage["input_tokens"], first.usage["output_tokens"]) == (1200, 34)
    second = await codex.resume(first.thread_id, "Are you there?")
    assert second.code == 0, second
    assert second.messages == ["Still here."]

    assert last_messages(upstream)[-1] == ("user", "Are you there?")
    assert [said for role, said in last_messages(upstream) if role == "assistant"] == ["Good morning."]
    assert threads(database) == [first.thread_id]
    assert brief(history(database, first.thread_id)) == [
        ("user", "Good day"),
        ("reasoning", "They greet me."),
        ("assistant", "Good morning."),
        ("user", "Are you there?"),
        ("assistant", "Still here."),
    ]
    kept = responses(database, first.thread_id)  # codex sends store: false: for its retries, and for minutes
    assert [row["store"] for row in kept] == [0, 0]
    assert_sound(codex, database, first.thread_id)


async def test_shell_tool_round_trip(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    upstream.script(Say("Let me look.", calls=[("exec_command", ECHO_HI)], reasoning="A tool."), Say("It says hi."))

    outcome = await codex.exec("Run echo")
    assert outcome.code == 0, outcome
    (command,) = outcome.items("command_execution")
    assert (command["aggregated_output"], command["exit_code"]) == ("hi\n", 0)
    assert outcome.messages == ["Let me look.", "It says hi."]

    role, output = last_messages(upstream)[-1]
    assert role == "tool"
    assert "hi" in output
    kinds = [kind for kind, _ in brief(history(database, outcome.thread_id))]
    assert kinds == ["user", "reasoning", "assistant", "function_call", "function_call_output", "assistant"]
    assert_sound(codex, database, outcome.thread_id)


async def test_parallel_calls(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    calls = [("exec_command", {"cmd": "echo one"}), ("exec_command", {"cmd": "echo two"})]
    upstream.script(Say(calls=calls), Say("Both done."))

    outcome = await codex.exec("Run both")
    assert outcome.code == 0, outcome
    assert sorted(item["aggregated_output"] for item in outcome.items("command_execution")) == ["one\n", "two\n"]
    messages = upstream.calls[-1].json["messages"]
    assert [len(message["tool_calls"]) for message in messages if message.get("tool_calls")] == [2]
    assert_sound(codex, database, outcome.thread_id)


async def test_freeform_tool(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    """`apply_patch` is a custom tool with a grammar; the upstream sees a function with one string."""
    codex.configure(chat, model="gpt-5.5")
    patch = '*** Begin Patch\n*** Add File: hello.txt\n+Hello, "world" \\ é\n*** End Patch'
    upstream.answer = lambda received: _patch_once(received, patch)

    outcome = await codex.exec("Write the file")
    assert outcome.code == 0, outcome
    assert (codex.work / "hello.txt").read_text() == 'Hello, "world" \\ é\n'
    assert outcome.messages == ["Written."]
    stored = brief(history(database, outcome.thread_id))
    assert ("custom_tool_call", patch) in stored
    assert_sound(codex, database, outcome.thread_id)


def _patch_once(received: Received, patch: str) -> Answer:
    if received.json["messages"][-1]["role"] == "tool":
        return Say("Written.")
    (function,) = [t["function"] for t in received.json["tools"] if t["function"]["name"] == "apply_patch"]
    (field,) = function["parameters"]["properties"]
    return Say(calls=[("apply_patch", {field: patch})])


async def test_tools_of_the_newest_models(newest: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    """Their tools come inside the input, in namespaces; the main one takes raw JavaScript and answers in parts."""
    newest.configure(chat, model="gpt-6.1-sol")
    script = 'const done = await tools.exec_command({cmd: "echo hi"});\ntext(done);'
    upstream.answer = lambda received: _script_once(received, script)

    outcome = await newest.exec("Run it")
    assert outcome.code == 0, outcome
    assert outcome.messages == ["It ran."]
    stored = history(database, outcome.thread_id)
    (call,) = [item for item in stored if item["type"] == "custom_tool_call"]
    assert (call["namespace"], call["name"], call["input"]) == ("functions", "exec", script)
    (output,) = [item for item in stored if item["type"] == "custom_tool_call_output"]
    assert isinstance(output["output"], list)
    assert "hi" in str(output["output"])
    assert_sound(newest, database, outcome.thread_id)


def _script_once(received: Received, script: str) -> Answer:
    if received.json["messages"][-1]["role"] == "tool":
        assert "hi" in received.json["messages"][-1]["content"]
        return Say("It ran.")
    (function,) = [t["function"] for t in received.json["tools"] if t["function"]["name"].endswith("exec")]
    (field,) = function["parameters"]["properties"]
    return Say(calls=[(function["name"], {field: script})])


async def test_echo_backend_and_restart(codex: Codex, database: Path) -> None:
    """The whole main job with no model at all, over a server that is stopped in between."""
    database_url = f"sqlite:///{database}"
    async with ServerProcess("--backend", "echo", "--database-url", database_url) as server:
        codex.configure(server.url)
        first = await codex.exec('call exec_command {"cmd":"echo hi"}')
    assert first.code == 0, first
    assert [item["aggregated_output"] for item in first.items("command_execution")] == ["hi\n"]
    assert "hi" in first.messages[-1]

    async with ServerProcess("--backend", "echo", "--database-url", database_url) as server:
        codex.configure(server.url)
        second = await codex.resume(first.thread_id, "tell me more")
    assert second.code == 0, second
    assert "tell me more" in second.messages[-1]
    assert threads(database) == [first.thread_id]
    assert_sound(codex, database, first.thread_id)


async def test_compaction(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    """A turn that grows past the limit is compacted in its middle: history is rewritten, nothing is lost."""
    codex.configure(chat, model_auto_compact_token_limit=20_000)
    upstream.script(
        Say(calls=[("exec_command", ECHO_HI)], usage=usage(30_000, 100)),
        Say("SUMMARY", usage=usage(1_000, 10)),
        Say("Compacted and done.", usage=usage(900, 10)),
        Say("And on.", usage=usage(950, 10)),
    )
    first = await codex.exec("Do it")
    assert first.code == 0, first
    assert first.messages[-1] == "Compacted and done."
    second = await codex.resume(first.thread_id, "Go on")
    assert second.code == 0, second
    assert upstream.unused == 0

    now = brief(history(database, first.thread_id))
    assert [kind for kind, _ in now] == ["user", "user", "assistant", "user", "assistant"]
    assert now[0] == ("user", "Do it")
    assert now[1][1].endswith("SUMMARY")
    assert now[2:] == [("assistant", "Compacted and done."), ("user", "Go on"), ("assistant", "And on.")]
    before = [brief(branch) for branch in branches(database, first.thread_id)]
    assert any(("function_call", '{"cmd":"echo hi"}') in branch for branch in before), before
    outputs = [text for branch in before for kind, text in branch if kind == "function_call_output"]
    assert len(outputs) == 1 and "hi" in outputs[0], before
    payloads = stored_items(database)
    assert len(payloads) == len({repr(item) for item in payloads})


async def test_catalogue(codex: Codex, chat: str, upstream: Upstream) -> None:
    """Codex decodes our catalogue: it knows the model, and gives it the catalogue's instructions."""
    codex.configure(chat)
    codex.ask_for_models()
    upstream.script(Say("Known."))
    outcome = await codex.exec("Who are you?")
    assert outcome.code == 0, outcome
    assert outcome.messages == ["Known."]
    assert [item for item in outcome.items("error") if "metadata" in item["message"]] == []
    assert BASE_INSTRUCTIONS in upstream.calls[-1].json["messages"][0]["content"]


async def test_fork(newest: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    """A fork is a thread of its own with the whole history; the thread it came from stays as it was."""
    newest.configure(chat)
    upstream.script(Say("One."), Say("Two, forked."), Say("Two, straight."))
    first = await newest.exec("First")
    fork = await newest.fork(first.thread_id, "Fork")
    assert fork.code == 0, fork
    straight = await newest.resume(first.thread_id, "Straight")
    assert straight.code == 0, straight

    assert threads(database) == [first.thread_id, fork.thread_id]
    begin = [("user", "First"), ("assistant", "One.")]
    assert brief(history(database, fork.thread_id)) == [*begin, ("user", "Fork"), ("assistant", "Two, forked.")]
    assert brief(history(database, first.thread_id)) == [
        *begin,
        ("user", "Straight"),
        ("assistant", "Two, straight."),
    ]


async def test_refusal_is_shown_and_ends_the_run(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    refusal = {"error": {"message": "This model reads no tools.", "type": "invalid_request_error", "code": None}}
    upstream.script(Say("Fine."), Reply(refusal, status=400))
    first = await codex.exec("First")
    second = await codex.resume(first.thread_id, "Second")

    assert second.code == 1
    assert "This model reads no tools." in second.failure
    assert len(upstream.calls) == 2  # 400 is the one status codex does not try again
    assert brief(history(database, first.thread_id)) == [("user", "First"), ("assistant", "Fine.")]


async def test_recovers_from_upstream_errors(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    broken = Reply({"error": {"message": "Out of memory."}}, status=500)
    upstream.script(broken, broken, Say("At last."))

    outcome = await codex.exec("Try")
    assert outcome.code == 0, outcome
    assert outcome.messages == ["At last."]
    assert brief(history(database, outcome.thread_id)) == [("user", "Try"), ("assistant", "At last.")]
    assert_sound(codex, database, outcome.thread_id)


async def test_recovers_from_a_truncated_stream(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    codex.configure(chat)
    upstream.script(
        Stream([chunk({"content": "Half an "}), chunk({"content": "ans"})], close="eof", pace=0.02), Say("Whole.")
    )

    outcome = await codex.exec("Try")
    assert outcome.code == 0, outcome
    assert outcome.messages[-1] == "Whole."
    assert ("assistant", "Whole.") in brief(history(database, outcome.thread_id))
    assert_sound(codex, database, outcome.thread_id)


async def test_goes_on_from_a_call_of_a_failed_response(
    codex: Codex, chat: str, upstream: Upstream, database: Path
) -> None:
    """The stream breaks in its second call. Codex runs the first and goes on from it, so the thread must
    take up a call whose response never completed."""
    codex.configure(chat)
    whole = call_chunks("exec_command", ECHO_HI, turn=70)
    partial = call_chunks("exec_command", {"cmd": "echo never"}, turn=71, index=1)[:2]
    upstream.script(Stream([*whole, *partial], close="eof", pace=0.02), Say("It said hi."))

    outcome = await codex.exec("Try")
    assert outcome.code == 0, outcome
    assert [item["aggregated_output"] for item in outcome.items("command_execution")] == ["hi\n"]
    assert outcome.messages[-1] == "It said hi."
    kinds = [kind for kind, _ in brief(history(database, outcome.thread_id))]
    assert kinds == ["user", "function_call", "function_call_output", "assistant"]
    assert_sound(codex, database, outcome.thread_id)


async def test_killed_in_the_middle_of_a_turn(codex: Codex, upstream: Upstream, database: Path) -> None:
    """The client is gone: its run ends upstream too, and the thread goes on from what codex kept."""
    settings = Settings(
        backend="chat", upstream=upstream.url, database_url=f"sqlite:///{database}", disconnect_grace=0.05
    )
    upstream.script(Stream([chunk({"content": "Never "})], close="silent"), Say("Here again."))
    async with running(settings) as url:
        codex.configure(url)
        async with codex.interrupted("First"):
            await upstream.called(1)
        await asyncio.wait_for(upstream.closed(0), 10)
        (thread_id,) = codex.thread_ids
        outcome = await codex.resume(thread_id, "Second")
    assert outcome.code == 0, outcome
    assert outcome.messages == ["Here again."]
    assert [pair for pair in brief(history(database, thread_id)) if pair[0] == "assistant"] == [
        ("assistant", "Here again.")
    ]
    assert_sound(codex, database, thread_id)


async def test_sub_agent(codex: Codex, chat: str, upstream: Upstream, database: Path) -> None:
    """Parent and child share a session header and run side by side; each has a thread of its own."""
    codex.configure(chat)
    upstream.answer = _parent_and_child

    outcome = await codex.exec("Use a helper")
    assert outcome.code == 0, outcome
    assert outcome.messages == ["Parent is done."]
    spawned = outcome.items("collab_tool_call")[0]
    (child,) = spawned["receiver_thread_ids"]

    assert sorted(filter(None, threads(database))) == sorted([outcome.thread_id, child])
    assert brief(history(database, child)) == [("user", "CHILD-TASK"), ("assistant", "Child is done.")]
    calls = [item for item in history(database, outcome.thread_id) if item["type"] == "function_call"]
    assert [(call["namespace"], call["name"]) for call in calls] == [
        ("multi_agent_v1", "spawn_agent"),
        ("multi_agent_v1", "wait_agent"),
    ]
    assert_sound(codex, database, outcome.thread_id)
    assert_sound(codex, database, child)


def _parent_and_child(received: Received) -> Answer:
    body = received.json
    said = [message.get("content") for message in body["messages"] if message["role"] == "user"]
    if "CHILD-TASK" in said:
        return Say("Child is done.")
    flat = {name.rpartition("multi_agent_v1")[2].strip("_.-"): name for name in _offered(body)}
    outputs = [message["content"] for message in body["messages"] if message["role"] == "tool"]
    if not outputs:
        return Say(calls=[(flat["spawn_agent"], {"message": "CHILD-TASK"})])
    if len(outputs) == 1:
        agent = outputs[0].partition('"agent_id":"')[2].partition('"')[0]
        return Say(calls=[(flat["wait_agent"], {"targets": [agent], "timeout_ms": 10_000})])
    return Say("Parent is done.")


def _offered(body: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in body["tools"]]
