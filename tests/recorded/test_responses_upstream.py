"""Recorded Responses traffic through the backends: requests go out as they were made, answers can be given back
as they came, and background responses are polled as they were.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest

from responses_ingress.backends.background import BackgroundBackend, BackgroundOptions, Pace
from responses_ingress.backends.responses import ResponsesBackend
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Delta
from responses_ingress.core.items import user_message
from responses_ingress.core.request import parse_request
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.responses_encoder import ResponsesOptions, encode
from tests.backends.environment import proxies
from tests.core.shapes import Json, build
from tests.recordings import final_response, recordings, replayed
from tests.responses_upstream import Provider
from tests.upstream import Reply

RECORDINGS = recordings("responses")
CREATES = [
    name
    for name, recording in RECORDINGS.items()
    if recording["request"]["path"].split("?")[0].endswith("/responses") and recording["request"]["method"] == "POST"
]
SOUND = [name for name in CREATES if RECORDINGS[name]["status"] == 200]
STREAMS = [name for name in SOUND if "stream" in RECORDINGS[name]]
ENDED = [name for name in SOUND if (RECORDINGS[name].get("body") or {}).get("status") in ("completed", "incomplete")]
CASSETTES = {cassette: list(names) for cassette, names in groupby(RECORDINGS, key=lambda name: name.rpartition(".")[0])}
POLLED = [
    cassette
    for cassette, names in CASSETTES.items()
    if (RECORDINGS[names[0]].get("body") or {}).get("status") == "queued"
    and RECORDINGS[names[-1]]["body"]["status"] == "completed"
]

OURS = ("previous_response_id", "conversation", "background", "metadata", "store", "stream")


@pytest.fixture(autouse=True)
def no_proxies() -> Iterator[None]:
    with proxies():
        yield


def as_sent(item: Json) -> Json:
    """An item without what is not sent."""
    told_only = ("id", "status") if item["type"] == "reasoning" else ("id",)
    sent = {key: value for key, value in item.items() if value is not None and key not in told_only}
    if item["type"] == "web_search_call" and "action" in item:
        sent["action"] = {key: value for key, value in item["action"].items() if key != "sources"}
    return sent


def turn_of(body: Json) -> Turn:
    request = parse_request(body)
    return Turn(
        "resp_1",
        "thread_1",
        request.model,
        instructions=request.instructions,
        new=request.input,
        tools=request.tools,
        tool_choice=body.get("tool_choice") or "auto",
        parameters=body,
        stream=request.stream,
    )


@pytest.mark.parametrize("name", SOUND)
def test_a_request_goes_out_as_it_was_made(name: str) -> None:
    body = RECORDINGS[name]["request"]["body"]
    given = body["input"] if isinstance(body["input"], list) else [user_message(body["input"])]
    typed = [item if "type" in item else {"type": "message", **item} for item in given]
    # What the client has encrypted content of came from no backend of ours.
    opened = [item for item in typed if not item.get("encrypted_content")]
    sent = encode(turn_of({**body, "input": opened}), ResponsesOptions(encrypted_reasoning=False), "theirs").body
    rest = {
        key: value for key, value in body.items() if key not in (*OURS, "input", "tools", "include") and value != ""
    }
    useful = [item for item in opened if item["type"] != "reasoning" or item.get("content") or item.get("summary")]
    expected = {**rest, "input": [as_sent(item) for item in useful], "stream": body.get("stream", False)}
    expected |= {key: body[key] for key in ("tools", "include") if body.get(key)}
    assert sent == {**expected, "store": False}


async def answered(name: str, options: ResponsesOptions) -> list[Delta]:
    recording = RECORDINGS[name]
    async with Provider(replayed(recording)) as provider:
        backend = ResponsesBackend(Settings("theirs", provider.url), options)
        batches = [batch async for batch in backend.stream(turn_of(recording["request"]["body"]))]
        await backend.close()
    return [delta for batch in batches for delta in batch]


@pytest.mark.parametrize("name", [*STREAMS, *ENDED])
async def test_an_answer_can_be_given_back_as_it_came(name: str) -> None:
    output = build(await answered(name, ResponsesOptions())).response()["output"]
    recorded = final_response(RECORDINGS[name])["output"]
    assert [item.get("encrypted_content") for item in output if item.get("encrypted_content")] == [
        f"theirs:{item['encrypted_content']}" for item in recorded if item.get("encrypted_content")
    ]
    again = encode(Turn("resp_2", "thread_1", "m", context=output), ResponsesOptions(), "theirs")
    useful = ("encrypted_content", "content", "summary")
    kept = [item for item in recorded if item["type"] != "reasoning" or any(item.get(key) for key in useful)]
    assert without_nulls(again.body["input"]) == without_nulls([as_sent(item) for item in kept])
    assert again.foreign == 0


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("cassette", POLLED)
async def test_a_background_response_is_polled_to_its_end(cassette: str) -> None:
    recordings = [RECORDINGS[name] for name in CASSETTES[cassette]]
    rounds = [at for at, recording in enumerate(recordings) if recording["request"]["method"] == "POST"]
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with Provider() as provider:
        backend = BackgroundBackend(Settings("theirs", provider.url), BackgroundOptions(), Pace(sleep=sleep))
        for first, behind in zip(rounds, [*rounds[1:], len(recordings)], strict=True):
            provider.script(Reply(recordings[first]["body"]))
            provider.looks(*[Reply(recording["body"]) for recording in recordings[first + 1 : behind]])
            given = turn_of(recordings[first]["request"]["body"])
            deltas = [delta async for batch in backend.stream(given) for delta in batch]
            assert build(deltas).response()["output"] == recordings[behind - 1]["body"]["output"]
            assert provider.polls[-1].path.endswith(recordings[first]["body"]["id"])
            provider.looks_over()
        await backend.close()
    assert len(waits) == len(recordings) - len(rounds)


def test_there_are_recordings_of_each_kind() -> None:
    assert len(SOUND) >= 300 and len(STREAMS) >= 30 and len(ENDED) >= 250 and len(POLLED) >= 3
