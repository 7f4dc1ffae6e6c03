"""The backend of the Messages API against a scripted server on real sockets."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import pytest

from responses_ingress.backends.messages import MessagesBackend
from responses_ingress.backends.upstream import Timeouts
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Delta, Finish, Text
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.messages import MessagesOptions
from responses_ingress.errors import (
    IngressError,
    InvalidRequest,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from tests.dialects.play import brief, response_of
from tests.upstream import Drop, Reply, Stream, Upstream

Json = dict[str, Any]

LOOK = {"type": "function", "name": "look", "parameters": {}}
CITY = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": 1}}
THOUGHT = {"type": "thinking", "thinking": "Let me see.", "signature": "S"}


def event(type: str, **fields: Any) -> bytes:
    """As the API frames it: with a name, and with spaces behind the JSON."""
    return b"event: %b\ndata: %b   \n\n" % (type.encode(), orjson.dumps({"type": type, **fields}))


def word(text: str, index: int = 0) -> bytes:
    return event("content_block_delta", index=index, delta={"type": "text_delta", "text": text})


BEGIN = event("message_start", message={"usage": {"input_tokens": 3}}) + event("ping")
OPEN = BEGIN + event("content_block_start", index=0, content_block={"type": "text", "text": ""})
REASON = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4})
CLOSE = event("content_block_stop", index=0) + REASON
STOP = event("message_stop")


def streamed(*chunks: bytes | asyncio.Event, close: Any = "end", **fields: Any) -> Stream:
    return Stream(chunks, close=close, **fields)


def hi(text: str = "hi") -> Stream:
    return streamed(OPEN, word(text), CLOSE, STOP)


def whole(*blocks: Json, reason: str = "end_turn", **fields: Any) -> Reply:
    return Reply({"type": "message", "role": "assistant", "content": blocks, "stop_reason": reason, **fields})


def backend_of(upstream: Upstream, options: MessagesOptions | None = None, **fields: Any) -> MessagesBackend:
    settings = {"timeouts": Timeouts(read=5), "authorization": "x-api-key", **fields}
    return MessagesBackend(Settings("claude", upstream.url, **settings), options or MessagesOptions())


@pytest.fixture
async def backend(upstream: Upstream) -> AsyncIterator[MessagesBackend]:
    backend = backend_of(upstream)
    yield backend
    await backend.close()


def turn(*items: Json, **fields: Any) -> Turn:
    return Turn("resp_1", "thread_1", "their-model", new=items or [user("hi")], **fields)


def user(text: str) -> Json:
    return {"type": "message", "role": "user", "content": text}


async def batches_of(backend: MessagesBackend, given: Turn | None = None) -> list[Sequence[Delta]]:
    return [batch async for batch in backend.stream(given or turn())]


async def deltas_of(backend: MessagesBackend, given: Turn | None = None) -> list[Delta]:
    return [delta for batch in await batches_of(backend, given) for delta in batch]


async def answered(backend: MessagesBackend, given: Turn | None = None) -> list[tuple[str, str]]:
    return brief(response_of(await deltas_of(backend, given))["output"])


# Answers


async def test_a_whole_answer_becomes_items(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(whole(THOUGHT, {"type": "text", "text": "It is sunny."}, CITY, reason="tool_use"))
    assert await answered(backend, turn(tools=[LOOK], stream=False)) == [
        ("reasoning", "Let me see."),
        ("message", "It is sunny."),
        ("call", 'look {"at":1}'),
    ]
    sent = upstream.calls[0]
    assert (sent.path, sent.json["model"], sent.json["stream"]) == ("/v1/messages", "their-model", False)
    assert [message["role"] for message in sent.json["messages"]] == ["user"]


async def test_a_stream_becomes_items(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(streamed(OPEN, word("It is "), word("sunny."), CLOSE, STOP))
    deltas = await deltas_of(backend)
    response = response_of(deltas)
    assert brief(response["output"]) == [("message", "It is sunny.")]
    assert response["usage"]["total_tokens"] == 7
    assert upstream.calls[0].json["stream"] is True


async def test_either_answer_is_taken_whatever_was_asked_for(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(whole({"type": "text", "text": "whole"}), hi("streamed"))
    assert await answered(backend) == [("message", "whole")]
    assert await answered(backend, turn(stream=False)) == [("message", "streamed")]


async def test_it_accepts_before_the_first_word(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(streamed(asyncio.Event()))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]


async def test_what_one_read_brings_is_one_batch_unless_it_is_a_burst(
    upstream: Upstream, backend: MessagesBackend
) -> None:
    hold = asyncio.Event()
    upstream.script(streamed(OPEN, word("0"), hold, *[word("x") for _ in range(150)], CLOSE, STOP))
    sizes = []
    async with aclosing(backend.stream(turn())) as batches:
        async for batch in batches:
            hold.set()
            sizes.append(sum(isinstance(delta, Text) for delta in batch))
    assert [size for size in sizes if size][0] == 1
    assert max(sizes) == 64 and sum(sizes) == 151


async def test_after_the_end_it_reads_no_further_and_leaves(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(streamed(OPEN, word("hi"), CLOSE, STOP, asyncio.Event(), b"data: {\n\n"))
    assert await answered(backend) == [("message", "hi")]
    await upstream.closed(0)


@pytest.mark.parametrize("close", ["end", "eof", "reset", "silent"])
async def test_an_answer_with_a_stop_reason_is_whole_however_it_ends(
    upstream: Upstream, backend: MessagesBackend, monkeypatch: pytest.MonkeyPatch, close: Any
) -> None:
    monkeypatch.setattr("responses_ingress.backends.exchange._AFTERMATH", 0.05)
    upstream.script(streamed(OPEN, word("hi"), CLOSE, close=close))
    async with asyncio.timeout(4):
        assert await answered(backend) == [("message", "hi")]


# What is sent


@pytest.mark.parametrize(
    ("fields", "bearer", "sent"),
    [
        ({"key": "ours"}, "theirs", {"x-api-key": "ours"}),
        ({"key": "ours", "pass_bearer": True}, "theirs", {"x-api-key": "theirs"}),
        ({"key": "ours", "authorization": "bearer"}, None, {"authorization": "Bearer ours"}),
        ({"headers": {"anthropic-beta": "a,b"}}, None, {"anthropic-beta": "a,b"}),
        ({"headers": {"Anthropic-Version": "2024-01-01"}}, None, {"anthropic-version": "2024-01-01"}),
    ],
    ids=str,
)
async def test_headers(upstream: Upstream, fields: Mapping[str, Any], bearer: str | None, sent: Json) -> None:
    upstream.script(hi())
    backend = backend_of(upstream, **fields)
    await deltas_of(backend, turn(bearer=bearer))
    await backend.close()
    names = ("x-api-key", "authorization", "anthropic-version", "anthropic-beta")
    headers = {name: value for name, value in upstream.calls[0].headers.items() if name in names}
    assert headers == {"anthropic-version": "2023-06-01", **sent}


async def test_the_options_and_the_summary_reach_both_ways(upstream: Upstream) -> None:
    upstream.script(whole(THOUGHT))
    backend = backend_of(upstream, MessagesOptions(max_tokens=77))
    deltas = await deltas_of(backend, turn(parameters={"reasoning": {"effort": "low", "summary": "auto"}}))
    await backend.close()
    assert upstream.calls[0].json["max_tokens"] == 77
    assert response_of(deltas)["output"][0]["summary"] == [{"type": "summary_text", "text": "Let me see."}]


async def test_what_cannot_be_asked_is_refused_before_anything_is_sent(
    upstream: Upstream, backend: MessagesBackend
) -> None:
    with pytest.raises(InvalidRequest):
        backend.stream(turn(tools=[{"type": "web_search"}], tool_choice={"type": "web_search"}))
    assert upstream.requests == []


# Earlier thinking

BOUND = "messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to a different conversation."


def refusal(message: str, type: str = "invalid_request_error", status: int = 400, **headers: str) -> Reply:
    return Reply({"type": "error", "error": {"type": type, "message": message}}, status=status, headers=headers)


async def history(upstream: Upstream, backend: MessagesBackend) -> list[Json]:
    """A turn with thinking and its answer."""
    upstream.script(whole(THOUGHT, {"type": "text", "text": "a"}))
    return [user("hi"), *response_of(await deltas_of(backend))["output"], user("so?")]


async def test_thinking_goes_back_to_the_backend_that_made_it(upstream: Upstream, backend: MessagesBackend) -> None:
    items = await history(upstream, backend)
    other = MessagesBackend(Settings("other", upstream.url), MessagesOptions())
    upstream.script(hi(), hi())
    for asked in (backend, other):
        await deltas_of(asked, turn(*items))
    await other.close()
    sent = [call.json["messages"][1]["content"][0] for call in upstream.calls[1:]]
    assert sent == [THOUGHT, {"type": "text", "text": "a"}]


async def test_thinking_that_is_refused_is_left_out_once(upstream: Upstream, backend: MessagesBackend) -> None:
    items = await history(upstream, backend)
    upstream.script(refusal(BOUND), hi("yes"))
    assert await answered(backend, turn(*items)) == [("message", "yes")]
    first, second = (call.json["messages"] for call in upstream.calls[1:])
    assert first[1]["content"][0] == THOUGHT
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert "thinking" not in str(second)


async def test_a_refusal_without_thinking_in_the_request_stands(upstream: Upstream, backend: MessagesBackend) -> None:
    items = await history(upstream, backend)
    upstream.script(refusal(BOUND), refusal(BOUND), refusal(BOUND))
    for given in (turn(*items), turn()):
        with pytest.raises(UpstreamError, match="signature"):
            await deltas_of(backend, given)
    assert len(upstream.calls) == 4


# Failures


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (refusal("Overloaded", "overloaded_error", 529), 503, "server_is_overloaded"),
        (refusal("Slow down", "rate_limit_error", 429), 429, "rate_limit_exceeded"),
        (refusal("prompt is too long: 213462 tokens > 200000 maximum"), 400, "context_length_exceeded"),
        (refusal("Too large", "request_too_large", 413), 413, "upstream_refused"),
        (refusal("invalid x-api-key", "authentication_error", 401), 401, "upstream_refused"),
        (refusal("not yours", "permission_error", 403), 403, "upstream_refused"),
        (refusal("model: x", "not_found_error", 404), 404, "upstream_refused"),
        (refusal("Internal", "api_error", 500), 502, "upstream_error"),
        (Reply(body=b"<html>", status=502), 502, "upstream_error"),
    ],
)
async def test_a_refusal_is_raised_before_anything_is_accepted(
    upstream: Upstream, backend: MessagesBackend, reply: Reply, status: int, code: str
) -> None:
    upstream.script(reply)
    seen = []
    with pytest.raises(IngressError) as refused:
        async for batch in backend.stream(turn()):
            seen.append(batch)
    assert (refused.value.status, refused.value.code, seen) == (status, code, [])
    assert "x-api-key" not in refused.value.message


@pytest.mark.parametrize("status", [429, 529])
async def test_a_refusal_tells_how_long_to_wait(upstream: Upstream, backend: MessagesBackend, status: int) -> None:
    upstream.script(refusal("Wait", "x", status, **{"retry-after": "9"}), hi())
    with pytest.raises(UpstreamError) as refused:
        await deltas_of(backend)
    assert refused.value.retry_after == 9.0
    assert await answered(backend) == [("message", "hi")]
    assert upstream.calls[1].reused


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Drop(), UpstreamUnreachable),
        (streamed(OPEN, word("so"), close="eof"), UpstreamTruncated),
        (streamed(OPEN, word("so"), close="reset"), UpstreamTruncated),
        (streamed(OPEN, word("so")), UpstreamTruncated),
        (streamed(OPEN, word("so"), STOP), UpstreamTruncated),
        (streamed(OPEN, b"data: {oh\n\n"), UpstreamInvalid),
        (Reply(body=b"{oh"), UpstreamInvalid),
        (Reply({"choices": []}), UpstreamInvalid),
    ],
    ids=["dropped", "end of file", "reset", "no reason", "stop without reason", "no JSON", "no JSON body", "chat"],
)
async def test_an_answer_that_is_none_is_an_error_that_says_why(
    upstream: Upstream, backend: MessagesBackend, answer: Any, error: type[IngressError]
) -> None:
    upstream.script(answer)
    with pytest.raises(error):
        await deltas_of(backend)


@pytest.mark.parametrize("name", [b"event: error\n", b""])
async def test_an_error_inside_the_stream_is_a_failed_finish(
    upstream: Upstream, backend: MessagesBackend, name: bytes
) -> None:
    error = b'data: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
    upstream.script(streamed(OPEN, word("so"), name + error, asyncio.Event()))
    last = (await deltas_of(backend))[-1]
    assert isinstance(last, Finish)
    assert (last.status, (last.error or {})["code"]) == ("failed", "server_is_overloaded")
    await upstream.closed(0)


async def test_an_upstream_that_falls_silent_is_given_up(upstream: Upstream) -> None:
    upstream.script(streamed(OPEN, word("so"), asyncio.Event()))
    backend = backend_of(upstream, timeouts=Timeouts(read=0.05))
    with pytest.raises(UpstreamTimeout):
        await deltas_of(backend)
    await upstream.closed(0)
    await backend.close()


# Leaving


@pytest.mark.parametrize("at", ["the headers", "the refusal", "a word"])
async def test_cancelling_closes_the_upstreams_connection(
    upstream: Upstream, backend: MessagesBackend, at: str
) -> None:
    answers: dict[str, Any] = {
        "the headers": Reply({}, hold=asyncio.Event()),
        "the refusal": streamed(asyncio.Event(), status=400),
        "a word": streamed(OPEN, word("so"), asyncio.Event()),
    }
    upstream.script(answers[at])
    playing = asyncio.create_task(deltas_of(backend))
    await upstream.called(1)
    playing.cancel()
    await upstream.closed(0)
    await asyncio.gather(playing, return_exceptions=True)
    assert playing.cancelled()


async def test_leaving_the_deltas_closes_the_upstreams_connection(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.script(streamed(OPEN, word("so"), asyncio.Event()))
    async with aclosing(backend.stream(turn())) as batches:
        async for batch in batches:
            if any(isinstance(delta, Text) for delta in batch):
                break
    await upstream.closed(0)


# The rest


async def test_what_is_left_out_is_logged_once_and_no_names_that_clients_make_up(
    upstream: Upstream, backend: MessagesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "responses_ingress.backends.exchange")
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "openai:secret"}
    upstream.script(hi(), hi())
    for _ in range(2):
        await deltas_of(backend, turn(foreign, user("a"), tools=[LOOK, {"type": "web_search"}, {"type": "made\nup"}]))
    [record] = caplog.records
    assert record.getMessage() == (
        "upstream claude cannot take, so that it is left out: hosted tool web_search, other tools,"
        " reasoning of other backends"
    )


async def test_its_name_and_what_it_promises(upstream: Upstream, backend: MessagesBackend) -> None:
    assert (backend.name, backend.resumable, backend.goes_on) == ("claude", False, False)
    patient = MessagesBackend(Settings("claude", upstream.url), MessagesOptions(), goes_on=True)
    assert patient.goes_on
    await patient.cancel({}, None)
    await patient.close()


async def test_it_lists_the_upstreams_models(upstream: Upstream, backend: MessagesBackend) -> None:
    upstream.models = ("claude-a", "claude-b")
    assert await backend.models() == ["claude-a", "claude-b"]
    assert (upstream.requests[0].method, upstream.requests[0].path) == ("GET", "/v1/models")
    assert upstream.requests[0].headers["anthropic-version"] == "2023-06-01"
