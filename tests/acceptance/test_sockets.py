"""Raw sockets against the server: what no good client sends, clients that leave, upstreams that break."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from responses_ingress.settings import Settings
from tests.history import branches, brief, history, stored_items, threads
from tests.invariants import check_stream
from tests.server import running
from tests.upstream import Drop, Reply, Say, Stream, Upstream, chunk, completion
from tests.wire import Wire, head

LIMIT = 200_000
ASK = {"model": "test-model", "input": "x"}
STREAM = {**ASK, "stream": True}


@pytest.fixture
def settings(upstream: Upstream, database: Path) -> Settings:
    """Limits that a test can reach."""
    return Settings(
        backend="chat",
        upstream=upstream.url,
        database_url=f"sqlite:///{database}",
        max_body=LIMIT,
        disconnect_grace=0.05,
        keepalive_interval=0.1,
    )


@pytest.fixture
async def url(settings: Settings) -> AsyncIterator[str]:
    async with running(settings) as url:
        yield url


@pytest.fixture
async def wire(url: str) -> AsyncIterator[Wire]:
    async with Wire(url) as wire:
        yield wire


@pytest.fixture
async def hasty(settings: Settings) -> AsyncIterator[Wire]:
    """A server that soon sends its headers, whatever the upstream does."""
    async with running(settings.model_copy(update={"accept_wait": 0.05})) as url, Wire(url) as wire:
        yield wire


async def ask_stream(wire: Wire, fields: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A streamed answer's events, checked."""
    answer = await wire.post(fields or STREAM)
    assert answer.status == 200, answer
    check_stream(answer.events)
    return answer.events


# Malformed, oversized, wrongly typed.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "test-model", "input": "x"',
        b'{"model": "test-model", "input": "x"}}',
        b"{'model': 'test-model'}",
        b"\xff\xfe",
        b'{"model": "test-model", "input": "\xff"}',
        b'{"model": "test-model", "input": "\\ud800"}',
        b'{"model": "test-model", "input": NaN}',
        b"[" * 100_000,
        b'{"model": "test-model", "input": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"model": "test-model", "input": "x", "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}",
    ],
    ids=lambda body: repr(body[:45]),
)
async def test_malformed_json(wire: Wire, upstream: Upstream, database: Path, body: bytes) -> None:
    answer = await wire.request("POST", "/v1/responses", body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert not upstream.calls
    assert threads(database) == []
    upstream.script(Say("Fine."))
    assert (await wire.post(ASK)).status == 200  # the connection is still good


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([ASK], None),
        ("x", None),
        (None, None),
        ({**ASK, "model": 7}, "model"),
        ({"model": "test-model"}, "input"),
        ({**ASK, "input": 7}, "input"),
        ({**ASK, "input": [7]}, "input[0]"),
        ({**ASK, "input": [{"role": "user", "content": [7]}]}, "input[0].content[0]"),
        ({**ASK, "input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({**ASK, "stream": "yes"}, "stream"),
        ({**ASK, "store": 1}, "store"),
        ({**ASK, "tools": {}}, "tools"),
        ({**ASK, "tools": [{"name": "x"}]}, "tools[0].type"),
        ({**ASK, "tool_choice": "perhaps"}, "tool_choice"),
        ({**ASK, "text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({**ASK, "reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({**ASK, "previous_response_id": 7}, "previous_response_id"),
        ({"model": "test-model", "messages": []}, None),
    ],
    ids=repr,
)
async def test_wrong_types(wire: Wire, upstream: Upstream, database: Path, fields: Any, param: str | None) -> None:
    answer = await wire.post(fields)
    assert answer.status == 400, answer
    assert answer.error["param"] == param
    assert not upstream.calls
    assert threads(database) == []


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
async def test_packed_bodies(wire: Wire, upstream: Upstream, pack: Callable[[bytes], bytes]) -> None:
    encoding = "gzip" if pack is gzip.compress else "zstd"
    upstream.script(Say("Fine."))

    async def send(body: bytes) -> int:
        return (await wire.request("POST", "/v1/responses", body, {"content-encoding": encoding})).status

    assert await send(pack(orjson.dumps(ASK))) == 200
    assert await send(pack(orjson.dumps(ASK))[:-9]) == 400
    assert await send(b"not packed at all") == 400
    bomb = pack(orjson.dumps({**ASK, "input": "x" * LIMIT * 20}))
    assert len(bomb) < LIMIT
    assert await send(bomb) == 413
    assert len(upstream.calls) == 1


async def test_a_zstd_bomb_without_a_size(wire: Wire) -> None:
    """A stream of frames that never says how much it unpacks to."""
    packer = zstandard.ZstdCompressor(write_content_size=False)
    bomb = b"".join(packer.compress(b" " * LIMIT) for _ in range(50))
    answer = await wire.request("POST", "/v1/responses", bomb, {"content-encoding": "zstd"})
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd", "nonsense"])
async def test_unknown_encodings(wire: Wire, encoding: str) -> None:
    answer = await wire.request("POST", "/v1/responses", b"x", {"content-encoding": encoding})
    assert answer.status in (400, 415)
    assert answer.error["type"] == "invalid_request_error"


async def test_too_large_by_its_length(wire: Wire) -> None:
    """The answer comes before the body was sent."""
    await wire.send(head("POST", "/v1/responses", {"content-length": str(LIMIT + 1)}))
    answer = await wire.answer()
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"


async def test_too_large_in_chunks(wire: Wire) -> None:
    """A body whose length nobody said is cut off when it passes the limit."""
    await wire.send(head("POST", "/v1/responses", {"transfer-encoding": "chunked"}))
    piece = b"x" * 50_000
    for _ in range(LIMIT // len(piece) + 1):
        await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    assert (await wire.answer()).status == 413


async def test_chunked_body_in_small_pieces(wire: Wire, upstream: Upstream) -> None:
    upstream.script(Say("Fine."))
    await wire.send(head("POST", "/v1/responses", {"transfer-encoding": "chunked"}))
    for byte in orjson.dumps(ASK):
        await wire.send(b"1\r\n%c\r\n" % byte)
    await wire.send(b"0\r\n\r\n")
    assert (await wire.answer()).json["status"] == "completed"


async def test_client_leaves_inside_its_request(url: str, upstream: Upstream, database: Path) -> None:
    async with Wire(url) as wire:
        await wire.send(head("POST", "/v1/responses", {"content-length": "100"}) + b'{"model":')
    upstream.script(Say("Fine."))
    async with Wire(url) as wire:
        assert (await wire.post({**ASK, "store": False})).status == 200
    assert threads(database) == []


async def test_websocket_upgrade(wire: Wire) -> None:
    """426 is what sends codex back to HTTP at once."""
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    await wire.send(head("GET", "/v1/responses", upgrade))
    assert (await wire.answer()).status == 426


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/responses/resp_unknown", 404),
        ("GET", "/v1/responses/%00%ff", 404),
        ("GET", "/v1/responses/" + "x" * 5_000, 404),
        ("DELETE", "/v1/responses/resp_unknown", 404),
        ("GET", "/v1/responses/resp_unknown/input_items", 404),
        ("PUT", "/v1/responses", 405),
        ("GET", "/v1/responses", 405),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_unknown_paths(wire: Wire, method: str, path: str, status: int) -> None:
    answer = await wire.request(method, path)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"


# Clients that leave, and slow ones.


async def test_client_leaves_a_stream(url: str, upstream: Upstream) -> None:
    """After the grace period the upstream's connection is closed too."""
    upstream.script(Stream([chunk({"content": "word "})], close="silent"))
    async with Wire(url) as wire:
        await wire.start("POST", "/v1/responses", orjson.dumps(STREAM))
        await wire.read_until(b"word ")
    await asyncio.wait_for(upstream.closed(0), 5)


async def test_client_leaves_while_it_waits(url: str, upstream: Upstream) -> None:
    """The same before the upstream has said anything, streamed or not."""
    for call, fields in enumerate((ASK, STREAM)):
        upstream.script(Drop(hold=asyncio.Event()))
        async with Wire(url) as wire:
            await wire.start("POST", "/v1/responses", orjson.dumps(fields))
            await upstream.called(call + 1)
        await asyncio.wait_for(upstream.closed(call), 5)


async def test_thread_goes_on_after_its_client_left(url: str, upstream: Upstream) -> None:
    """A turn nobody follows does not keep its thread busy, and leaves nothing on it."""
    session = {"session-id": "left"}
    upstream.script(Say("One."), Stream([chunk({"content": "word "})], close="silent"), Say("Three."))
    async with Wire(url) as wire:
        assert (await wire.post({**ASK, "input": "one?"}, session)).status == 200
    async with Wire(url) as wire:
        await wire.start("POST", "/v1/responses", orjson.dumps({**STREAM, "input": "two?"}), session)
        await wire.read_until(b"word ")
    async with Wire(url) as wire:
        assert (await wire.post({**ASK, "input": "three?"}, session)).json["status"] == "completed"
    sent = [message["content"] for message in upstream.calls[-1].json["messages"]]
    assert sent == ["one?", "One.", "three?"]


async def test_slow_reader(url: str, upstream: Upstream) -> None:
    """A client that does not read holds up nobody, and gets all of it when it does."""
    text = "".join(f"word{at} " for at in range(20_000))
    upstream.script(Say(text))
    async with Wire(url, receive_buffer=4096) as slow:
        await slow.start("POST", "/v1/responses", orjson.dumps(STREAM))
        await slow.read_headers()
        upstream.script(*(Say("Quick.") for _ in range(3)))
        async with Wire(url) as quick:
            for _ in range(3):
                assert (await quick.post(ASK)).status == 200
        events = (await slow.answer()).events
    check_stream(events)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text


# Upstreams that break.


@pytest.mark.parametrize("close", ["eof", "reset", "end", "done"])
async def test_truncated_upstream(wire: Wire, upstream: Upstream, close: Any) -> None:
    """Without a finish reason an answer is a failed one, however politely it ended."""
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "Half "}), chunk({"content": "of"}), hold], close=close))
    await wire.start("POST", "/v1/responses", orjson.dumps(STREAM))
    await wire.read_until(b'"of"')
    hold.set()
    events = (await wire.answer()).events
    check_stream(events)
    ended = events[-1]
    assert ended["type"] == "response.failed"
    assert ended["response"]["error"]["code"] == "upstream_truncated"


async def test_upstream_error_in_the_stream(wire: Wire, upstream: Upstream) -> None:
    error = {"error": {"message": "The GPU caught fire.", "type": "server_error", "code": 500}}
    upstream.script(Stream([chunk({"content": "Half"}), error]))
    events = await ask_stream(wire)
    assert events[-1]["type"] == "response.failed"
    assert "The GPU caught fire." in events[-1]["response"]["error"]["message"]
    assert "error" not in [event["type"] for event in events]


@pytest.mark.parametrize(
    "garbage",
    [b"data: {not json}\n\n", b"data: []\n\n", b'data: {"choices": 7}\n\n', b"data: " + b"x" * 100_000 + b"\n\n"],
    ids=lambda garbage: repr(garbage[:30]),
)
async def test_upstream_garbage_in_the_stream(wire: Wire, upstream: Upstream, garbage: bytes) -> None:
    upstream.script(Stream([chunk({"content": "Half"}), garbage, chunk(finish="stop")]))
    events = await ask_stream(wire)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"].startswith("upstream_")


@pytest.mark.parametrize("fields", [ASK, STREAM], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "answer",
    [
        Reply(body=b"<html>Bad gateway</html>", status=502, headers={"content-type": "text/html"}),
        Reply(body=b"<html>Sign in</html>", headers={"content-type": "text/html"}),
        Reply(body=b"{", headers={"content-type": "application/json"}),
        Reply({"choices": []}),
    ],
    ids=["html 502", "html 200", "broken json", "no choices"],
)
async def test_upstream_that_speaks_something_else(
    wire: Wire, upstream: Upstream, answer: Reply, fields: dict[str, Any]
) -> None:
    upstream.script(answer)
    got = await wire.post(fields)
    if got.status == 200:
        last = got.events[-1]["response"] if "stream" in fields else got.json
        assert last["status"] == "failed"
    else:
        assert got.status in (502, 503)
        assert "<html>" not in got.error["message"]


async def test_whole_answer_to_a_stream_request(wire: Wire, upstream: Upstream) -> None:
    upstream.script(Reply(completion(Say("All at once.", calls=[("f", {"a": 1})], reasoning="Hm."))))
    events = await ask_stream(wire, {**STREAM, "tools": [{"type": "function", "name": "f", "parameters": {}}]})
    assert events[-1]["type"] == "response.completed"
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message", "function_call"]


async def test_stale_connection_is_tried_once_more(wire: Wire, upstream: Upstream) -> None:
    """The upstream closes an idle connection just as it is used: one more connection, one answer."""
    upstream.script(Say("One."), Drop(), Say("Two."))
    assert (await wire.post(ASK)).status == 200
    answer = await wire.post(ASK)
    assert answer.json["output"][0]["content"][0]["text"] == "Two."
    assert upstream.connections == 2
    assert [call.reused for call in upstream.calls] == [False, True, False]


async def test_connection_closed_while_idle(wire: Wire, upstream: Upstream) -> None:
    upstream.script(Say("One."), Say("Two."))
    assert (await wire.post(ASK)).status == 200
    upstream.close_idle()
    assert (await wire.post(ASK)).status == 200
    assert upstream.connections == 2
    assert upstream.unused == 0


async def test_fresh_connection_is_not_tried_again(wire: Wire, upstream: Upstream) -> None:
    """A new connection that breaks may have begun the work: it is not done twice."""
    upstream.script(Drop(), Say("Never asked for."))
    answer = await wire.post(ASK)
    assert answer.status == 502
    assert "upstream" in str(answer.error["code"])
    assert (len(upstream.calls), upstream.unused) == (1, 1)


async def test_upstream_is_not_there(wire: Wire, upstream: Upstream) -> None:
    await upstream.stop()
    for fields in (ASK, STREAM):
        answer = await wire.post(fields)
        assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")


# Silence.


async def test_headers_do_not_wait_for_a_silent_upstream(hasty: Wire, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "Late."}), chunk(finish="stop")], hold=hold))
    await hasty.start("POST", "/v1/responses", orjson.dumps(STREAM))
    headers = await hasty.read_headers()
    assert headers["content-type"].startswith("text/event-stream")
    await hasty.read_until(b"event: response.created")
    hold.set()
    answer = await hasty.answer()
    check_stream(answer.events)
    assert answer.events[-1]["type"] == "response.completed"


async def test_refusal_after_the_headers_is_a_failed_response(hasty: Wire, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Reply({"error": {"message": "No, after all."}}, status=400, hold=hold))
    await hasty.start("POST", "/v1/responses", orjson.dumps(STREAM))
    await hasty.read_until(b"event: response.created")
    hold.set()
    events = (await hasty.answer()).events
    check_stream(events)
    assert events[-1]["type"] == "response.failed"
    assert "No, after all." in events[-1]["response"]["error"]["message"]


@pytest.mark.parametrize(
    ("agent", "sign"), [("OpenAI/Python 3.52.0", b"\n\n:"), ("codex_exec/0.169.0 (Linux)", b'{"type":"keepalive"}')]
)
async def test_silence_is_filled(wire: Wire, upstream: Upstream, agent: str, sign: bytes) -> None:
    """A comment, but for codex an event: comments do not reset its idle timer."""
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "Word "}), hold, chunk(finish="stop")]))
    await wire.start("POST", "/v1/responses", orjson.dumps(STREAM), {"user-agent": agent})
    await wire.read_until(b"Word ")
    await wire.read_until(sign)
    hold.set()
    answer = await wire.answer()
    check_stream([event for event in answer.events if event["type"] != "keepalive"])
    assert answer.events[-1]["type"] == "response.completed"


async def test_stored_once_though_seen_by_all(wire: Wire, upstream: Upstream, database: Path) -> None:
    """What a chain stores is what is new in each of its turns."""
    previous: dict[str, str] = {}
    for turn in range(5):
        upstream.script(Say(f"Answer {turn}."))
        answer = await wire.post({**ASK, "input": f"Question {turn}", **previous})
        previous = {"previous_response_id": answer.json["id"]}
    assert len(stored_items(database)) == 10
    assert len(upstream.calls[-1].json["messages"]) == 9


# Sessions by header, of clients that send only what is new and of those that send all of it.


async def say(url: str, session: str, given: Any, **fields: Any) -> dict[str, Any]:
    """One turn of a session, on a connection of its own."""
    async with Wire(url) as wire:
        answer = await wire.post({**ASK, "input": given, **fields}, {"session-id": session})
    assert answer.status == 200, answer
    response: dict[str, Any] = answer.json
    return response


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def sent_upstream(upstream: Upstream) -> list[str]:
    return [message["content"] for message in upstream.calls[-1].json["messages"]]


async def test_session_remembers(url: str, upstream: Upstream, database: Path) -> None:
    upstream.script(Say("One."), Say("Other."), Say("Two."))
    await say(url, "a", "one?")
    await say(url, "b", "other?")
    await say(url, "a", "two?")
    assert sent_upstream(upstream) == ["one?", "One.", "two?"]
    assert brief(history(database, "b")) == [("user", "other?"), ("assistant", "Other.")]


async def test_turns_of_a_session_wait_for_each_other(url: str, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Reply(completion(Say("One.")), hold=hold), Say("Other."), Say("Two."))
    first = asyncio.create_task(say(url, "a", "one?"))
    await upstream.called(1)
    second = asyncio.create_task(say(url, "a", "two?"))
    third = asyncio.create_task(say(url, "b", "another session?"))
    assert (await third)["status"] == "completed"
    assert not second.done()
    hold.set()
    assert (await first)["status"] == (await second)["status"] == "completed"
    assert sent_upstream(upstream) == ["one?", "One.", "two?"]


async def test_session_of_a_client_that_sends_its_history(url: str, upstream: Upstream, database: Path) -> None:
    """What it sends again is not stored again; where it has rewritten history, a new branch begins."""
    upstream.script(*(Say(f"Answer {turn}.") for turn in range(4)))
    said: list[Any] = []
    for turn in range(3):
        said.append(user(f"question {turn}"))
        said += (await say(url, "a", said, store=False))["output"]
    assert len(stored_items(database)) == 6
    assert brief(history(database, "a")) == brief([{"type": "message", **item} for item in said])

    rewritten = [*said[:3], user("another question")]
    await say(url, "a", rewritten, store=False)
    assert sent_upstream(upstream) == ["question 0", "Answer 0.", "question 1", "another question"]
    assert brief(history(database, "a"))[2:] == [
        ("user", "question 1"),
        ("user", "another question"),
        ("assistant", "Answer 3."),
    ]
    assert len(branches(database, "a")) == 2
    assert len(stored_items(database)) == 8
