"""A server whose upstream answers with recorded exchanges, byte for byte: what clients get is a legal stream that
says what was recorded, and every recorded refusal is a refusal.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from responses_ingress.settings import Settings
from responses_ingress.upstream_settings import Kind
from responses_ingress.upstream_settings import Upstream as UpstreamSettings
from tests.invariants import check_stream
from tests.recorded import test_chat_streams as chat
from tests.recorded import test_messages_streams as messages
from tests.recorded.test_responses_streams import BACKFILLED, RESUMED, ROUTER
from tests.recordings import final_response, recordings, replayed
from tests.responses_upstream import Provider
from tests.server import running
from tests.upstream import Upstream
from tests.wire import Answer, Wire

Json = dict[str, Any]
Serve = Callable[..., AbstractAsyncContextManager[Wire]]

RESPONSES, CHAT, MESSAGES = recordings("responses"), recordings("chat"), recordings("messages")
CASSETTES = {name: list(files) for name, files in groupby(RESPONSES, key=lambda file: file.rpartition(".")[0])}


@pytest.fixture
def serve(database: Path) -> Serve:
    @asynccontextmanager
    async def serving(kind: Kind, upstream: Upstream, **fields: Any) -> AsyncIterator[Wire]:
        given = UpstreamSettings(kind=kind, url=upstream.url, **fields)
        name = "claude" if kind == "messages" else "it"  # the name that the helpers of the recorded tests expect
        settings = Settings(upstreams={name: given}, database_url=f"sqlite:///{database}", flush_interval=10)
        async with running(settings) as url, Wire(url) as wire:
            yield wire

    return serving


async def played(wire: Wire, upstream: Upstream, recording: Json, *, stream: bool = True) -> Answer:
    upstream.script(replayed(recording))
    answer = await wire.post({"model": "m", "input": "hi", "stream": stream, "store": False})
    assert not upstream.unused
    return answer


def final(events: list[Json], **faults: bool) -> Json:
    check_stream(events, **faults)
    response: Json = events[-1]["response"]
    return response


def created(recording: Mapping[str, Any]) -> bool:
    request = recording["request"]
    return request["method"] == "POST" and str(request["path"]).split("?")[0].endswith("/responses")


def ended(recording: Mapping[str, Any]) -> bool:
    return "stream" in recording or recording["body"].get("status") in ("completed", "incomplete", "failed")


def told(output: list[Json]) -> list[Json]:
    """Items without what is our own."""
    shown = [{key: value for key, value in item.items() if key != "id"} for item in output]
    for item in shown:
        if isinstance(item.get("encrypted_content"), str):
            item["encrypted_content"] = item["encrypted_content"].removeprefix("it:")
    return shown


async def test_responses(serve: Serve) -> None:
    names = [name for name, one in RESPONSES.items() if created(one) and one["status"] == 200 and ended(one)]
    assert len(names) > 300
    async with Provider() as provider, serve("responses", provider) as wire:
        for name in set(names) - {RESUMED}:
            answer = await played(wire, provider, RESPONSES[name])
            response = final(answer.events, interleaved=name in (ROUTER, BACKFILLED), backfilled=name == BACKFILLED)
            expected = final_response(RESPONSES[name])
            assert (response["status"], response["incomplete_details"]) == (
                expected["status"],
                expected["incomplete_details"],
            ), name
            assert told(response["output"]) == told(expected["output"]), name
            if expected.get("usage"):
                assert response["usage"]["total_tokens"] == expected["usage"]["total_tokens"], name
            assert (response["model"], response["tools"]) == ("m", []), name


async def test_chat(serve: Serve) -> None:
    async with Upstream() as upstream, serve("chat", upstream) as wire:
        for name in [*chat.STREAMS, *sorted(set(chat.WHOLE) - set(chat.FOREIGN))]:
            answer = await played(wire, upstream, CHAT[name])
            response = final(answer.events)
            if name in chat.STREAMS:
                choices = [
                    choice for chunk in chat.chunks_of(CHAT[name]["stream"]) for choice in chunk.get("choices") or ()
                ]
                deltas = [choice["delta"] for choice in choices]
            else:
                message = CHAT[name]["body"]["choices"][0]["message"]
                calls = [{**call, "index": number} for number, call in enumerate(message.get("tool_calls") or ())]
                deltas = [{**message, "tool_calls": calls}]
            expected = chat.expected_of(deltas)
            said = chat.told(response["output"])
            for call, (id, *_) in enumerate(expected["calls"]):
                if not id:  # a call without an id gets one of ours
                    said["calls"][call] = ("", *said["calls"][call][1:])
            assert said == expected, name


def whole_blocks(recording: Json) -> list[Json]:
    return [{"json": "{}", **block} for block in recording["body"]["content"]]


async def test_messages(serve: Serve) -> None:
    async with Upstream() as upstream, serve("messages", upstream) as wire:
        for name in [*messages.STREAMS, *messages.WHOLE]:
            answer = await played(wire, upstream, MESSAGES[name])
            assert answer.status == 200, name
            response = final(answer.events)
            streamed = name in messages.STREAMS
            blocks = messages.blocks_of(messages.sent(name)) if streamed else whole_blocks(MESSAGES[name])
            assert messages.told(response["output"]) == messages.expected_of(blocks), name


@pytest.mark.parametrize("stream", [True, False])
async def test_refusals(serve: Serve, stream: bool) -> None:
    kinds: dict[Kind, dict[str, Json]] = {"responses": RESPONSES, "chat": CHAT, "messages": MESSAGES}
    for kind, all_of_kind in kinds.items():
        refusals = {name: one for name, one in all_of_kind.items() if one["status"] >= 400}
        assert refusals
        async with Provider() if kind == "responses" else Upstream() as upstream, serve(kind, upstream) as wire:
            for name, recording in refusals.items():
                answer = await played(wire, upstream, recording, stream=stream)
                assert answer.status == recording["status"], name
                said = recording["body"]["error"]["message"]
                assert said.rstrip(".")[:400] in answer.error["message"], name


async def test_streams_cut_short_are_failures(serve: Serve) -> None:
    """Wherever a recorded stream is cut, at every tenth of it, it is no success."""
    kinds: dict[Kind, dict[str, Json]] = {"responses": RESPONSES, "chat": CHAT, "messages": MESSAGES}
    for kind, all_of_kind in kinds.items():
        streams = [one["stream"] for one in all_of_kind.values() if "stream" in one][:8]
        async with Provider() if kind == "responses" else Upstream() as upstream, serve(kind, upstream) as wire:
            for stream in streams:
                for tenth in range(1, 9):
                    answer = await played(wire, upstream, {"stream": stream[: len(stream) * tenth // 10]})
                    if answer.status == 200:
                        response = final(answer.events, interleaved=True, backfilled=True)
                        assert response["status"] == "failed"
                    else:
                        assert answer.status == 502


POLLED = [
    name
    for name, files in CASSETTES.items()
    if (RESPONSES[files[0]].get("body") or {}).get("status") == "queued"
    and (RESPONSES[files[-1]].get("body") or {}).get("status") == "completed"
]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("cassette", POLLED)
async def test_background_polling(serve: Serve, cassette: str, background: bool) -> None:
    """Every round: created, polled as often as recorded, and streamed to the client."""
    found = [RESPONSES[file] for file in CASSETTES[cassette]]
    rounds = [at for at, recording in enumerate(found) if recording["request"]["method"] == "POST"]
    async with (
        Provider() as provider,
        serve("background", provider, first_poll=0.001, longest_poll=0.001) as wire,
    ):
        for first, behind in zip(rounds, [*rounds[1:], len(found)], strict=True):
            provider.looks_over()
            provider.script(replayed(found[first]))
            provider.looks(*map(replayed, found[first + 1 : behind]))
            answer = await wire.post({"model": "m", "input": "hi", "stream": True, "background": background})
            response = final(answer.events)
            assert (response["status"], response["background"]) == ("completed", background)
            assert told(response["output"]) == told(found[behind - 1]["body"]["output"])
            assert provider.polls[-1].path.endswith(found[first]["body"]["id"])
        assert len(provider.calls) == len(rounds)
        assert len(provider.polls) == len(found) - len(rounds)
