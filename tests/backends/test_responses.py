"""The Responses backend against a scripted provider on a real socket."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from responses_ingress.backends.responses import Asker, ResponsesBackend, options_for
from responses_ingress.backends.upstream import Client, Timeouts
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Delta, Finish, Mark, Remember, Text
from responses_ingress.core.items import seal, user_message
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.responses_encoder import ResponsesOptions
from responses_ingress.errors import (
    IngressError,
    UpstreamError,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from tests.core.shapes import Json, build, call, reasoning, search_call, text_item
from tests.responses_upstream import ID, Provider, events, named, response, streamed, whole
from tests.upstream import Drop, Reply, Stream

CALLED: Json = {**call(), "arguments": '{"at":1}', "status": "completed"}
OUTPUT: list[Json] = [{**reasoning(), "encrypted_content": "gAAA="}, text_item("It is sunny.", "msg_2"), CALLED]
SEALED: list[Json] = [{**OUTPUT[0], "encrypted_content": "scripted:gAAA="}, *OUTPUT[1:]]
NAMED = "thread_0123456789abcdef01" + 32 * "0"
CHAIN = ResponsesOptions(chain=True)
BROKEN = {"code": "odd", "message": "It broke."}
HI, AGAIN = user_message("hi"), user_message("again")
FORGOTTEN = Reply({"error": {"code": "previous_response_not_found", "param": "previous_response_id"}}, status=400)
NOT_ENCRYPTED = Reply(
    {"error": {"message": "Encrypted content is not supported with this model.", "param": "include"}}, status=400
)


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
async def backend(provider: Provider) -> AsyncIterator[ResponsesBackend]:
    async for backend in made(provider, ResponsesOptions()):
        yield backend


@pytest.fixture
async def chaining(provider: Provider) -> AsyncIterator[ResponsesBackend]:
    async for backend in made(provider, CHAIN):
        yield backend


async def made(provider: Provider, options: ResponsesOptions) -> AsyncIterator[ResponsesBackend]:
    backend = ResponsesBackend(Settings("scripted", provider.url, timeouts=Timeouts(read=5)), options)
    yield backend
    await backend.close()


def turn(*new: Json, **fields: Any) -> Turn:
    return Turn("resp_1", NAMED, "their-model", new=new or (HI,), **fields)


async def deltas_of(backend: ResponsesBackend, given: Turn | None = None) -> list[Delta]:
    return [delta for batch in [batch async for batch in backend.stream(given or turn())] for delta in batch]


def output_of(deltas: Sequence[Delta]) -> list[Json]:
    found: list[Json] = build(deltas).response()["output"]
    return found


def finish_of(deltas: Sequence[Delta]) -> Finish:
    last = deltas[-1]
    assert isinstance(last, Finish)
    return last


# Answers.


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_comes_with_all_its_items_and_sealed(
    provider: Provider, backend: ResponsesBackend, stream: bool
) -> None:
    provider.script(streamed(*OUTPUT) if stream else whole(*OUTPUT))
    deltas = await deltas_of(backend, turn(stream=stream))
    assert output_of(deltas) == SEALED
    assert finish_of(deltas).status == "completed"
    sent = provider.calls[0].json
    assert (sent["model"], sent["stream"], sent["store"], sent["input"]) == ("their-model", stream, False, [HI])


@pytest.mark.parametrize("stream", [True, False])
async def test_whichever_form_an_answer_has_it_is_read(
    provider: Provider, backend: ResponsesBackend, stream: bool
) -> None:
    provider.script(whole(*OUTPUT) if stream else streamed(*OUTPUT, close="done"))
    assert output_of(await deltas_of(backend, turn(stream=stream))) == SEALED


async def test_what_it_gave_sealed_it_gets_back_as_it_was(provider: Provider, backend: ResponsesBackend) -> None:
    provider.script(streamed(*OUTPUT), streamed())
    given = output_of(await deltas_of(backend))
    await deltas_of(backend, turn(AGAIN, context=[HI, *given]))
    assert provider.calls[1].json["input"][1] == {"type": "reasoning", "summary": [], "encrypted_content": "gAAA="}


async def test_another_backends_encrypted_content_is_left_out_with_a_line_in_the_log(
    provider: Provider, backend: ResponsesBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "responses_ingress.backends.responses")
    provider.script(NOT_ENCRYPTED, streamed())
    await deltas_of(backend, turn({**reasoning(), "encrypted_content": seal("another", "secret")}, HI))
    assert [call.json["input"] for call in provider.calls] == [[HI], [HI]]
    assert len([record for record in caplog.records if "another backend" in record.getMessage()]) == 1
    assert "secret" not in caplog.text


async def test_hosted_tools_and_events_nobody_knows_pass(provider: Provider, backend: ResponsesBackend) -> None:
    sent = events(search_call())
    phase = {"type": "response.web_search_call.searching", "item_id": "ws_1", "output_index": 0}
    odd = {"type": "response.odd", "x": 1}
    provider.script(Stream([named(event) for event in [*sent[:3], phase, odd, *sent[3:]]], close="end"))
    marks = [delta for delta in await deltas_of(backend) if isinstance(delta, Mark)]
    assert marks == [Mark(0, "response.web_search_call.searching"), Mark(None, "response.odd", {"x": 1})]


async def test_what_is_ours_to_say_of_a_response_is_not_the_upstreams(
    provider: Provider, backend: ResponsesBackend
) -> None:
    sent = events(text_item("hi"))
    final = {**sent[-1]["response"], "store": True, "tools": [{}], "metadata": {"a": "b"}, "model": "theirs-2"}
    final |= {"conversation": {"id": "theirs"}, "service_tier": "flex", "moderation": {"fine": True}}
    provider.script(Stream([*sent[:-1], {**sent[-1], "response": final}], close="end"))
    assert finish_of(await deltas_of(backend)).echo == {"service_tier": "flex", "moderation": {"fine": True}}


async def test_it_accepts_when_the_headers_are_there(provider: Provider, backend: ResponsesBackend) -> None:
    provider.script(Stream([asyncio.Event()]))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]


async def test_comments_and_events_that_say_nothing_are_no_batches(
    provider: Provider, backend: ResponsesBackend
) -> None:
    hold, more = asyncio.Event(), asyncio.Event()
    created, *rest = [named(event) for event in events(text_item("hi"))]
    provider.script(Stream([b": alive\n\n", hold, created, more, *rest], close="end"))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]
        hold.set()
        more.set()
        assert isinstance((await anext(batches))[-1], Finish)


async def test_a_burst_comes_in_portions(provider: Provider, backend: ResponsesBackend) -> None:
    sent = events(text_item("x"))
    word = next(event for event in sent if event["type"].endswith("output_text.delta"))
    at = sent.index(word)
    provider.script(Stream([*sent[:at], *[word] * 150], close="silent"))
    sizes = []
    async with aclosing(backend.stream(turn())) as batches:
        async for batch in batches:
            sizes.append(sum(isinstance(delta, Text) for delta in batch))
            if sum(sizes) == 150:
                break
    assert max(sizes) <= 64


async def test_after_the_end_it_reads_no_further(provider: Provider, backend: ResponsesBackend) -> None:
    provider.script(Stream([*events(text_item("hi")), asyncio.Event(), b"data: {\n\n"]))
    assert finish_of(await deltas_of(backend)).status == "completed"
    await provider.closed(0)


async def test_an_event_may_have_its_name_on_its_own_line_only(provider: Provider, backend: ResponsesBackend) -> None:
    lines = [named(event).replace(b'"type":"%b",' % event["type"].encode(), b"", 1) for event in events(text_item("x"))]
    provider.script(Stream(lines, close="end"))
    assert output_of(await deltas_of(backend)) == [text_item("x")]


# Failures.


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Drop(), UpstreamUnreachable),
        (Stream(events(text_item("hi"))[:-1], close="eof"), UpstreamTruncated),
        (Stream(events(text_item("hi"))[:-1], close="reset"), UpstreamTruncated),
        (Stream(events(text_item("hi"))[:-1], close="end"), UpstreamTruncated),
        (Stream(events(text_item("hi"))[:-1], close="done"), UpstreamTruncated),
        (Stream([b"data: {oh\n\n"]), UpstreamInvalid),
        (Stream([b"data: [1]\n\n"]), UpstreamInvalid),
        (Reply(body=b"<html>"), UpstreamInvalid),
        (Reply([1]), UpstreamInvalid),
        (Reply(response("queued")), UpstreamTruncated),
    ],
    ids=["dropped", "eof", "reset", "no end", "done", "no JSON", "no object", "a page", "a list", "not ended"],
)
async def test_an_answer_that_is_none_is_an_error_that_says_why(
    provider: Provider, backend: ResponsesBackend, answer: Any, error: type[IngressError]
) -> None:
    provider.script(answer)
    with pytest.raises(error):
        await deltas_of(backend)
    assert len(provider.calls) == 1


async def test_an_upstream_that_falls_silent_is_given_up(provider: Provider) -> None:
    provider.script(Stream([asyncio.Event()]))
    backend = ResponsesBackend(Settings("scripted", provider.url, timeouts=Timeouts(read=0.05)), ResponsesOptions())
    with pytest.raises(UpstreamTimeout):
        await deltas_of(backend)
    await provider.closed(0)
    await backend.close()


@pytest.mark.parametrize(
    "event",
    [
        b'event: error\ndata: {"code": "odd", "message": "It broke.", "param": null}\n\n',
        b'event: error\ndata: {"error": {"code": "odd", "message": "It broke."}}\n\n',
        b'data: {"error": {"code": "odd", "message": "It broke."}}\n\n',
        named({"type": "error", "error": BROKEN}),
        named(
            {"type": "response.failed", "response": response("failed", error={"code": "odd", "message": "It broke."})}
        ),
    ],
)
async def test_an_error_inside_the_stream_fails_the_response(
    provider: Provider, backend: ResponsesBackend, event: bytes
) -> None:
    provider.script(Stream([*events(text_item("hi"))[:4], event, asyncio.Event()]))
    deltas = await deltas_of(backend)
    assert (finish_of(deltas).status, finish_of(deltas).error) == ("failed", BROKEN)
    await provider.closed(0)


async def test_an_error_instead_of_a_response_fails_it(provider: Provider, backend: ResponsesBackend) -> None:
    provider.script(Reply({"error": {"message": "It broke.", "code": 502}}))
    assert finish_of(await deltas_of(backend, turn(stream=False))).status == "failed"


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (Reply({"error": {"message": "Slow down."}}, status=429, headers={"retry-after": "9"}), 429, 9.0),
        (Reply({"error": {"message": "Too much.", "code": "context_length_exceeded"}}, status=400), 400, None),
        (Reply({}, status=404), 404, None),
        (Reply({}, status=500), 502, None),
    ],
)
async def test_a_refusal_is_raised_before_anything_is_accepted(
    provider: Provider, backend: ResponsesBackend, reply: Reply, status: int, code: float | None
) -> None:
    provider.script(reply, streamed())
    seen = []
    with pytest.raises(IngressError) as refused:
        async for batch in backend.stream(turn()):
            seen.append(batch)
    assert (refused.value.status, refused.value.retry_after, seen) == (status, code, [])
    assert len(provider.calls) == 1


async def test_a_model_without_encrypted_reasoning_is_not_asked_for_it_again(
    provider: Provider, backend: ResponsesBackend
) -> None:
    provider.script(NOT_ENCRYPTED, streamed(), streamed(), streamed())
    await deltas_of(backend)
    await deltas_of(backend)
    await deltas_of(backend, Turn("resp_2", NAMED, "another-model", new=[HI]))
    assert ["include" in call.json for call in provider.calls] == [True, False, False, True]


async def test_a_refusal_that_stays_is_raised_and_says_nothing_of_the_model(
    provider: Provider, backend: ResponsesBackend
) -> None:
    provider.script(NOT_ENCRYPTED, NOT_ENCRYPTED, streamed())
    with pytest.raises(UpstreamError) as refused:
        await deltas_of(backend, turn(parameters={"include": ["odd"]}))
    await deltas_of(backend)
    assert refused.value.status == 400
    assert [call.json.get("include") for call in provider.calls] == [
        ["odd", "reasoning.encrypted_content"],
        ["odd"],
        ["reasoning.encrypted_content"],
    ]


# Chains.


async def continued(chaining: ResponsesBackend, **fields: Any) -> Turn:
    """The turn after a first one."""
    first = await deltas_of(chaining)
    state = [delta.state for delta in first if isinstance(delta, Remember)][-1]
    return turn(AGAIN, context=[HI, *output_of(first)], memory=state, **fields)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_chain_sends_only_what_is_new(provider: Provider, chaining: ResponsesBackend, stream: bool) -> None:
    provider.script(streamed(*OUTPUT[:2]), streamed(text_item("more")) if stream else whole(text_item("more")))
    given = await continued(chaining, stream=stream)
    deltas = await deltas_of(chaining, given)
    first, second = (call.json for call in provider.calls)
    assert (first["store"], "previous_response_id" in first) == (True, False)
    assert (second["previous_response_id"], second["input"], second["store"]) == (ID, [AGAIN], True)
    assert output_of(deltas) == [text_item("more")]
    assert [type(delta) for delta in deltas[-2:]] == [Remember, Finish]


async def test_items_that_only_the_end_brings_count_too(provider: Provider, chaining: ResponsesBackend) -> None:
    sent = events(text_item("hi"), search_call())
    late = [event for event in sent if not event["type"].endswith("output_item.done") or event["output_index"] == 0]
    provider.script(Stream([named(event) for event in late], close="end"), streamed())
    await deltas_of(chaining, await continued(chaining))
    assert provider.calls[1].json["previous_response_id"] == ID


@pytest.mark.parametrize("refusal", [FORGOTTEN, Reply({}, status=404)], ids=["400", "404"])
async def test_a_chain_that_the_upstream_has_forgotten_goes_whole_once(
    provider: Provider, chaining: ResponsesBackend, refusal: Reply
) -> None:
    provider.script(streamed(*OUTPUT[:2]), refusal, streamed(text_item("more")))
    deltas = await deltas_of(chaining, await continued(chaining))
    sent = provider.calls[2].json
    assert "previous_response_id" not in sent
    assert [item["type"] for item in sent["input"]] == ["message", "reasoning", "message", "message"]
    assert output_of(deltas) == [text_item("more")]


async def test_what_is_refused_whole_too_is_refused(provider: Provider, chaining: ResponsesBackend) -> None:
    provider.script(streamed(*OUTPUT[:2]), FORGOTTEN, FORGOTTEN, streamed())
    given = await continued(chaining)
    with pytest.raises(UpstreamError):
        await deltas_of(chaining, given)
    assert (len(provider.calls), provider.unused) == (3, 1)


async def test_a_fork_goes_whole(provider: Provider, chaining: ResponsesBackend) -> None:
    provider.script(streamed(*OUTPUT[:2]), streamed())
    given = await continued(chaining)
    await deltas_of(chaining, turn(AGAIN, context=[HI], memory=given.memory))
    assert "previous_response_id" not in provider.calls[1].json


async def test_a_response_that_did_not_complete_is_not_continued(
    provider: Provider, chaining: ResponsesBackend
) -> None:
    cut = response("incomplete", text_item("hi"), incomplete_details={"reason": "max_output_tokens"})
    provider.script(Reply(cut), Reply(response("failed", error={"code": "x", "message": "y"})))
    for _ in range(2):
        assert not [delta for delta in await deltas_of(chaining) if isinstance(delta, Remember)]


async def test_a_response_whose_items_nobody_told_whole_is_not_continued(
    provider: Provider, chaining: ResponsesBackend
) -> None:
    ended = {**response("completed"), "completed_at": 1}
    *sent, last = events(text_item("hi"))
    told = [event for event in sent if not event["type"].endswith("output_item.done")]
    provider.script(Stream([named(event) for event in [*told, {**last, "response": ended}]], close="end"))
    deltas = await deltas_of(chaining)
    assert output_of(deltas) == [text_item("hi")]
    assert not [delta for delta in deltas if isinstance(delta, Remember)]


async def test_without_chains_nothing_is_remembered(provider: Provider, backend: ResponsesBackend) -> None:
    provider.script(streamed(*OUTPUT))
    assert not [delta for delta in await deltas_of(backend) if isinstance(delta, Remember)]


# Leaving, and the rest.


@pytest.mark.parametrize("at", ["the headers", "the first event", "a later one"])
async def test_cancelling_closes_the_upstreams_connection(
    provider: Provider, backend: ResponsesBackend, at: str
) -> None:
    answers: dict[str, Any] = {
        "the headers": Reply({}, hold=asyncio.Event()),
        "the first event": Stream([asyncio.Event()]),
        "a later one": Stream([*events(text_item("hi"))[:5], asyncio.Event()]),
    }
    provider.script(answers[at])
    playing = asyncio.create_task(deltas_of(backend))
    await provider.called(1)
    playing.cancel()
    await provider.closed(0)
    await asyncio.gather(playing, return_exceptions=True)
    assert playing.cancelled()


async def test_a_connection_stays_good_after_an_answer_and_after_a_refusal(
    provider: Provider, backend: ResponsesBackend
) -> None:
    provider.script(whole(), NOT_ENCRYPTED, whole())
    for _ in range(2):
        await deltas_of(backend, turn(stream=False))
    assert [call.reused for call in provider.calls] == [False, True, True]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.openai.com/v1", False),
        ("https://me.openai.azure.com/openai/v1", False),
        ("https://notopenai.com/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("nothing", True),
    ],
)
def test_openai_gets_no_open_reasoning(url: str, expected: bool) -> None:
    assert options_for(url, ResponsesOptions()).open_reasoning is expected


async def test_it_lists_the_upstreams_models(provider: Provider, backend: ResponsesBackend) -> None:
    provider.models = ("a", "vendor/b")
    assert await backend.models() == ["a", "vendor/b"]
    assert (backend.name, backend.resumable, backend.goes_on) == ("scripted", False, False)


async def test_a_cancel_needs_nothing_but_the_end_of_the_iteration(
    provider: Provider, backend: ResponsesBackend
) -> None:
    await backend.cancel({"response_id": ID}, None)
    assert provider.requests == []


async def test_only_so_many_models_without_encrypted_reasoning_are_remembered(provider: Provider) -> None:
    client = Client(Settings("scripted", provider.url))
    asker = Asker(client, ResponsesOptions())
    refusal = Reply({"error": {"message": "Not with this model.", "param": "include"}}, status=400)
    for number in range(257):
        provider.script(refusal, whole())
        (await asker.ask(Turn("resp_1", "thread_1", f"m{number}"))).close()
    provider.script(whole(), refusal, whole())
    for model in ("m256", "m0"):
        (await asker.ask(Turn("resp_1", "thread_1", model))).close()
    assert provider.unused == 0
    await client.close()
