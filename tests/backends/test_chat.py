import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from responses_ingress.backends.chat import ChatBackend
from responses_ingress.backends.upstream import Timeouts
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Delta, Finish, Text
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatOptions
from responses_ingress.errors import (
    IngressError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from tests.dialects.play import brief, response_of
from tests.upstream import Drop, Reply, Say, Stream, Upstream, chunk, usage

LOOK = {"type": "function", "name": "look", "parameters": {}}


@pytest.fixture
async def backend(upstream: Upstream) -> AsyncIterator[ChatBackend]:
    backend = ChatBackend(Settings("scripted", upstream.url, timeouts=Timeouts(read=5)), ChatOptions())
    yield backend
    await backend.close()


def turn(text: str = "hi", **fields: Any) -> Turn:
    item = {"type": "message", "role": "user", "content": text}
    return Turn("resp_1", "thread_1", "their-model", new=[item], **fields)


async def batches_of(backend: ChatBackend, given: Turn | None = None) -> list[Sequence[Delta]]:
    return [batch async for batch in backend.stream(given or turn())]


def flat(batches: Sequence[Sequence[Delta]]) -> list[Delta]:
    return [delta for batch in batches for delta in batch]


async def answered(backend: ChatBackend, given: Turn | None = None) -> list[tuple[str, str]]:
    return brief(response_of(flat(await batches_of(backend, given)))["output"])


# Answers.


@pytest.mark.parametrize("stream", [True, False])
async def test_text_reasoning_and_calls_become_items(upstream: Upstream, backend: ChatBackend, stream: bool) -> None:
    upstream.script(Say("It is sunny.", calls=[("look", {"at": 1})], reasoning="Let me see."))
    given = turn(tools=[LOOK], stream=stream)
    assert await answered(backend, given) == [
        ("reasoning", "Let me see."),
        ("message", "It is sunny."),
        ("call", 'look {"at":1}'),
    ]
    sent = upstream.calls[0].json
    assert (sent["model"], sent.get("stream", False)) == ("their-model", stream)
    assert sent["messages"] == [{"role": "user", "content": "hi"}]


async def test_a_whole_answer_to_a_request_for_a_stream_is_taken(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.answer = lambda call: Reply({"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]})
    assert await answered(backend) == [("message", "whole")]


async def test_a_stream_in_answer_to_a_request_for_the_whole_is_taken(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Stream([chunk({"content": "streamed"}), chunk(finish="stop")]))
    assert await answered(backend, turn(stream=False)) == [("message", "streamed")]


async def test_it_accepts_when_the_headers_are_there_and_before_the_first_word(
    upstream: Upstream, backend: ChatBackend
) -> None:
    upstream.script(Stream([asyncio.Event()]))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]


async def test_what_one_read_brings_is_one_batch(upstream: Upstream, backend: ChatBackend) -> None:
    hold = asyncio.Event()
    words = [chunk({"content": f"{number} "}) for number in range(20)]
    upstream.script(Stream([words[0], hold, *words[1:], chunk(finish="stop")]))
    said = []
    async with aclosing(backend.stream(turn())) as batches:
        async for batch in batches:
            hold.set()
            said.append([delta.text for delta in batch if isinstance(delta, Text)])
    assert [texts for texts in said if texts] == [["0 "], [f"{number} " for number in range(1, 20)]]


async def test_comments_and_chunks_that_say_nothing_are_no_batches(upstream: Upstream, backend: ChatBackend) -> None:
    hold, more = asyncio.Event(), asyncio.Event()
    upstream.script(Stream([b": alive\n\n", hold, chunk({"role": "assistant"}), more, chunk(finish="stop")]))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]
        hold.set()
        more.set()
        assert isinstance((await anext(batches))[-1], Finish)


async def test_a_burst_comes_in_portions(upstream: Upstream, backend: ChatBackend) -> None:
    words = [chunk({"content": "x"}) for _ in range(150)]
    upstream.script(Stream([*words, chunk(finish="stop")]))
    sizes = [sum(isinstance(delta, Text) for delta in batch) for batch in await batches_of(backend)]
    assert max(sizes) == 64
    assert sum(sizes) == 150


async def test_after_the_done_it_reads_no_further_and_leaves(upstream: Upstream, backend: ChatBackend) -> None:
    finish = chunk(finish="stop")
    upstream.script(Stream([chunk({"content": "hi"}), finish, b"data: [DONE]\n\n", asyncio.Event(), b"data: {\n\n"]))
    deltas = flat(await batches_of(backend))
    assert isinstance(deltas[-1], Finish)
    await upstream.closed(0)


async def test_a_stream_without_done_ends_where_it_ends(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Stream([chunk({"content": "hi"}), chunk(finish="stop")], close="end"))
    assert await answered(backend) == [("message", "hi")]


@pytest.mark.parametrize("close", ["eof", "reset", "silent"])
async def test_an_answer_with_a_finish_reason_is_whole_however_it_ends(
    upstream: Upstream, backend: ChatBackend, monkeypatch: pytest.MonkeyPatch, close: Any
) -> None:
    monkeypatch.setattr("responses_ingress.backends.exchange._AFTERMATH", 0.05)
    upstream.script(Stream([chunk({"content": "hi"}), chunk(finish="stop")], close=close))
    async with asyncio.timeout(4):
        deltas = flat(await batches_of(backend))
    assert isinstance(deltas[-1], Finish)
    assert brief(response_of(deltas)["output"]) == [("message", "hi")]


async def test_pings_do_not_keep_an_answer_open_that_is_over(
    upstream: Upstream, backend: ChatBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.exchange._AFTERMATH", 0.05)
    upstream.script(Stream([chunk({"content": "hi"}), chunk(finish="stop"), *[b": ping\n\n"] * 3000], pace=0.01))
    async with asyncio.timeout(4):
        assert await answered(backend) == [("message", "hi")]
    await upstream.closed(0)


async def test_usage_that_comes_late_is_waited_for(upstream: Upstream, backend: ChatBackend) -> None:
    hold = asyncio.Event()
    used = {**chunk(), "choices": [], "usage": usage(3, 4)}
    upstream.script(Stream([chunk({"content": "hi"}), chunk(finish="stop"), hold, used], close="eof"))
    asyncio.get_running_loop().call_later(0.05, hold.set)
    last = flat(await batches_of(backend))[-1]
    assert isinstance(last, Finish)
    assert (last.usage or {})["total_tokens"] == 7


async def test_a_connection_is_kept_where_the_body_ends_after_the_done(
    upstream: Upstream, backend: ChatBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.upstream._REST", 5)
    hold = asyncio.Event()
    done: list[Any] = [chunk({"content": "hi"}), chunk(finish="stop"), b"data: [DONE]\n\n", hold]
    upstream.script(Stream(done, close="end"), Say("again"))
    assert await answered(backend) == [("message", "hi")]  # it does not wait
    hold.set()
    await asyncio.sleep(0.02)
    assert await answered(backend) == [("message", "again")]
    assert upstream.calls[1].reused


# Failures.


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (Reply({"error": {"message": "Slow down."}}, status=429), 429, "rate_limit_exceeded"),
        (
            Reply({"error": {"message": "Too much.", "code": "context_length_exceeded"}}, status=400),
            *(400, "context_length_exceeded"),
        ),
        (Reply(body=b"<html>Bad gateway</html>", status=502), 502, "upstream_error"),
        (Reply({}, status=500), 502, "upstream_error"),
    ],
)
async def test_a_refusal_is_raised_before_anything_is_accepted(
    upstream: Upstream, backend: ChatBackend, reply: Reply, status: int, code: str
) -> None:
    upstream.script(reply)
    seen = []
    with pytest.raises(IngressError) as refused:
        async for batch in backend.stream(turn()):
            seen.append(batch)
    assert (refused.value.status, refused.value.code, seen) == (status, code, [])


async def test_a_refusal_tells_how_long_to_wait(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Reply({}, status=503, headers={"retry-after": "9"}))
    with pytest.raises(UpstreamError) as refused:
        await batches_of(backend)
    assert (refused.value.status, refused.value.retry_after) == (503, 9.0)


async def test_a_refusal_is_cut_where_it_is_long(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Reply({"error": {"message": "x" * 60_000}}, status=400))
    with pytest.raises(UpstreamError) as refused:
        await batches_of(backend)
    assert 100 < len(refused.value.message) < 1000


async def test_a_connection_stays_good_after_a_refusal(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Reply({}, status=429), Say("hi"))
    with pytest.raises(UpstreamError):
        await batches_of(backend)
    assert await answered(backend) == [("message", "hi")]
    assert upstream.calls[1].reused


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Drop(), UpstreamUnreachable),
        (Stream([chunk({"content": "so"})], close="eof"), UpstreamTruncated),
        (Stream([chunk({"content": "so"})], close="reset"), UpstreamTruncated),
        (Stream([chunk({"content": "so"}), b"data: {oh\n\n"]), UpstreamInvalid),
        (Reply(body=b"{oh"), UpstreamInvalid),
        (Reply(body=b"<html>", headers={"content-type": "text/html"}), UpstreamInvalid),
    ],
    ids=["dropped", "end of file", "reset", "a chunk that is no JSON", "no JSON", "a page"],
)
async def test_an_answer_that_is_none_is_an_error_that_says_why(
    upstream: Upstream, backend: ChatBackend, answer: Any, error: type[IngressError]
) -> None:
    upstream.script(answer)
    with pytest.raises(error):
        await batches_of(backend)


@pytest.mark.parametrize(
    ("more", "close", "error"),
    [
        ([], "reset", UpstreamTruncated),
        ([], "done", UpstreamTruncated),
        ([b"data: {oh\n\n"], "done", UpstreamInvalid),
        ([b"data: []\n\n"], "done", UpstreamInvalid),
    ],
)
async def test_what_came_before_a_break_is_given(
    upstream: Upstream, backend: ChatBackend, more: list[bytes], close: Any, error: type[UpstreamError]
) -> None:
    upstream.script(Stream([chunk({"content": "so"}), chunk({"content": " far"}), *more], close=close))
    deltas: list[Delta] = []
    with pytest.raises(error):
        async for batch in backend.stream(turn()):
            deltas += batch
    assert "".join(delta.text for delta in deltas if isinstance(delta, Text)) == "so far"


async def test_an_upstream_that_falls_silent_is_given_up(upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "so"}), hold, chunk({"content": " far"}), asyncio.Event()]))
    backend = ChatBackend(Settings("scripted", upstream.url, timeouts=Timeouts(read=0.05)), ChatOptions())
    with pytest.raises(UpstreamTimeout):
        async for _ in backend.stream(turn()):
            hold.set()
    await upstream.closed(0)
    await backend.close()


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b'event: error\ndata: {"error": {"message": "It broke."}}\n\n', "server_error"),
        (b'data: {"error": {"message": "It broke.", "code": 429}}\n\n', "rate_limit_exceeded"),
    ],
)
async def test_an_error_inside_the_stream_is_a_failed_finish(
    upstream: Upstream, backend: ChatBackend, event: bytes, code: str
) -> None:
    upstream.script(Stream([chunk({"content": "so"}), event, asyncio.Event()]))
    last = flat(await batches_of(backend))[-1]
    assert isinstance(last, Finish)
    assert (last.status, (last.error or {})["code"]) == ("failed", code)
    await upstream.closed(0)


@pytest.mark.parametrize("close", ["done", "end"])
async def test_a_stream_without_a_finish_reason_has_broken_off(
    upstream: Upstream, backend: ChatBackend, close: Any
) -> None:
    upstream.script(Stream([chunk({"content": "so far"})], close=close))
    with pytest.raises(UpstreamTruncated):
        await batches_of(backend)


# Leaving.


@pytest.mark.parametrize("at", ["the headers", "the first word", "a later word"])
async def test_cancelling_closes_the_upstreams_connection(upstream: Upstream, backend: ChatBackend, at: str) -> None:
    answers: dict[str, Any] = {
        "the headers": Reply({}, hold=asyncio.Event()),
        "the first word": Stream([asyncio.Event()]),
        "a later word": Stream([chunk({"content": "so"}), asyncio.Event()]),
    }
    upstream.script(answers[at])
    playing = asyncio.create_task(batches_of(backend))
    await upstream.called(1)
    playing.cancel()
    await upstream.closed(0)
    await asyncio.gather(playing, return_exceptions=True)
    assert playing.cancelled()


async def test_leaving_the_deltas_closes_the_upstreams_connection(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.script(Stream([chunk({"content": "so"}), asyncio.Event()]))
    async with aclosing(backend.stream(turn())) as batches:
        async for batch in batches:
            if any(isinstance(delta, Text) for delta in batch):
                break
    await upstream.closed(0)


async def test_turns_do_not_wait_for_one_another(upstream: Upstream, backend: ChatBackend) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([hold, chunk({"content": "slow"}), chunk(finish="stop")]), Say("quick"))
    slow = asyncio.create_task(answered(backend))
    await upstream.called(1)
    assert await answered(backend) == [("message", "quick")]
    hold.set()
    assert await slow == [("message", "slow")]
    assert upstream.connections == 2


# The rest.


async def test_a_kind_of_tool_that_is_left_out_is_logged_once(
    upstream: Upstream, backend: ChatBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream.script(Say("hi"), Say("hi"))
    for _ in range(2):
        await batches_of(backend, turn(tools=[LOOK, {"type": "web_search"}]))
    assert [call.json["tools"][0]["function"]["name"] for call in upstream.calls] == ["look", "look"]
    assert caplog.text.count("web_search") == 1


async def test_its_name_is_the_upstreams(backend: ChatBackend) -> None:
    assert backend.name == "scripted"


async def test_it_lists_the_upstreams_models(upstream: Upstream, backend: ChatBackend) -> None:
    upstream.models = ("a", "vendor/b")
    assert await backend.models() == ["a", "vendor/b"]
    assert (upstream.requests[0].method, upstream.requests[0].path) == ("GET", "/v1/models")
