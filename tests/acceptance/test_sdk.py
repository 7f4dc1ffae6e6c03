"""The openai SDKs against the server: the current one in this process, a 1.x one as a program of its own."""

import asyncio
import venv
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import FunctionToolParam, Response, ResponseStreamEvent
from pydantic import BaseModel

from responses_ingress.settings import Settings
from tests.cache import fetch, installed
from tests.invariants import check_stream
from tests.server import running
from tests.upstream import Drop, Reply, Say, Stream, Upstream, chunk, usage

SDK1 = "1.109.1"
MODEL = "test-model"
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class City(BaseModel):
    name: str
    people: int


@pytest.fixture
async def client(chat: str) -> AsyncIterator[AsyncOpenAI]:
    """The current SDK as a user has it, but for its retries: a test that wants them says so."""
    async with AsyncOpenAI(base_url=chat, api_key="test", max_retries=0) as client:
        yield client


async def collect(stream: AsyncIterable[ResponseStreamEvent]) -> list[dict[str, Any]]:
    """All events as they were on the wire; checked."""
    events = [event.to_dict() async for event in stream]
    check_stream(events)
    return events


def messages(upstream: Upstream, call: int = -1) -> list[tuple[str, Any]]:
    """(role, content) of the messages that a call sent upstream."""
    return [(message["role"], message.get("content")) for message in upstream.calls[call].json["messages"]]


async def test_create(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Paris.", reasoning="France…", usage=usage(12, 7, cached=4, reasoning=3)))
    response = await client.responses.create(
        model=MODEL, input="Capital of France?", instructions="Be brief.", temperature=0.5, metadata={"a": "b"}
    )
    assert (response.status, response.output_text) == ("completed", "Paris.")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.model, response.temperature, response.metadata) == (MODEL, 0.5, {"a": "b"})
    assert response.usage is not None
    assert response.usage.to_dict() == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 19,
    }
    assert messages(upstream) == [("system", "Be brief."), ("user", "Capital of France?")]
    assert upstream.calls[0].json["temperature"] == 0.5
    assert (await client.responses.retrieve(response.id)).to_dict() == response.to_dict()


async def test_stream(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("One two three.", reasoning="Count.", usage=usage(3, 4)))
    events = await collect(await client.responses.create(model=MODEL, input="Count", stream=True))
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "One two three."
    ended = events[-1]["response"]
    assert ended["usage"]["total_tokens"] == 7
    assert (await client.responses.retrieve(ended["id"])).to_dict() == Response.construct(**ended).to_dict()


async def test_text_comes_while_the_upstream_still_speaks(client: AsyncOpenAI, upstream: Upstream) -> None:
    hold = asyncio.Event()
    upstream.script(Stream([chunk({"content": "early "}), hold, chunk({"content": "late"}), chunk(finish="stop")]))
    seen: list[str] = []
    async for event in await client.responses.create(model=MODEL, input="Speak", stream=True):
        if event.type == "response.output_text.delta":
            seen.append(event.delta)
            hold.set()
    assert "".join(seen) == "early late"


async def test_stream_helper(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Let me see.", calls=[("get_weather", {"city": "Rome"})], reasoning="Weather."))
    async with client.responses.stream(model=MODEL, input="Weather in Rome?", tools=[WEATHER]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "Let me see."


async def test_parse(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say('{"name": "Oslo", "people": 717710}'))
    response = await client.responses.parse(model=MODEL, input="Oslo?", text_format=City)
    assert response.output_parsed == City(name="Oslo", people=717710)
    asked = upstream.calls[0].json["response_format"]
    assert (asked["type"], asked["json_schema"]["name"], asked["json_schema"]["strict"]) == (
        "json_schema",
        "City",
        True,
    )
    assert set(asked["json_schema"]["schema"]["properties"]) == {"name", "people"}


async def test_parse_streamed(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say('{"name": "Oslo", "people": 717710}'))
    async with client.responses.stream(model=MODEL, input="Oslo?", text_format=City) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == City(name="Oslo", people=717710)


async def test_function_tool_loop(client: AsyncOpenAI, upstream: Upstream) -> None:
    cities = ["Rome", "Oslo"]
    upstream.script(Say("I'll look.", calls=[("get_weather", {"city": city}) for city in cities]), Say("Sun and snow."))
    first = await client.responses.create(model=MODEL, input="Weather?", tools=[WEATHER], stream=False)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [orjson.loads(call.arguments) for call in calls] == [{"city": city} for city in cities]
    second = await client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        tools=[WEATHER],
        input=[
            {"type": "function_call_output", "call_id": call.call_id, "output": weather}
            for call, weather in zip(calls, ["sun", "snow"], strict=True)
        ],
    )
    assert second.output_text == "Sun and snow."
    assert second.previous_response_id == first.id
    sent = upstream.calls[-1].json["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in sent[1]["tool_calls"]] == [call.call_id for call in calls]
    assert [(message["tool_call_id"], message["content"]) for message in sent[2:]] == [
        (calls[0].call_id, "sun"),
        (calls[1].call_id, "snow"),
    ]


async def test_custom_tool_streamed(client: AsyncOpenAI, upstream: Upstream) -> None:
    """The upstream only knows functions; the client sees its freeform tool called, input unwrapped as it comes."""
    code = 'print("a\\tb")\nprint("é")'
    upstream.answer = lambda received: Say(calls=[("run", {_only_property(received.json): code})])
    stream = await client.responses.create(
        model=MODEL, input="Run it", stream=True, tools=[{"type": "custom", "name": "run", "description": "Runs code."}]
    )
    events = await collect(stream)
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == code
    assert len(deltas) > 1
    (call,) = events[-1]["response"]["output"]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "run", code)


def _only_property(body: dict[str, Any]) -> str:
    (tool,) = body["tools"]
    (name,) = tool["function"]["parameters"]["properties"]
    return str(name)


async def test_branches_do_not_see_each_other(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Root."), Say("Left."), Say("Right."), Say("Left leaf."))
    root = await client.responses.create(model=MODEL, input="root?")
    left = await client.responses.create(model=MODEL, input="left?", previous_response_id=root.id)
    await client.responses.create(model=MODEL, input="right?", previous_response_id=root.id)
    begin = [("user", "root?"), ("assistant", "Root.")]
    assert messages(upstream) == [*begin, ("user", "right?")]
    await client.responses.create(model=MODEL, input="leaf?", previous_response_id=left.id)
    assert messages(upstream) == [*begin, ("user", "left?"), ("assistant", "Left."), ("user", "leaf?")]


async def test_branches_at_the_same_time(client: AsyncOpenAI, upstream: Upstream) -> None:
    """Two children of one response run side by side, each on its own branch."""
    hold = asyncio.Event()
    upstream.script(Say("Root."))
    root = await client.responses.create(model=MODEL, input="root?")
    upstream.script(Reply(_completion("A."), hold=hold), Reply(_completion("B."), hold=hold))
    children = [
        asyncio.create_task(client.responses.create(model=MODEL, input=name, previous_response_id=root.id))
        for name in "ab"
    ]
    await upstream.called(3)
    hold.set()
    assert sorted(child.output_text for child in await asyncio.gather(*children)) == ["A.", "B."]


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


async def test_instructions_are_not_inherited(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Arr."), Say("Hello."))
    first = await client.responses.create(model=MODEL, input="Hi", instructions="Be a pirate.")
    second = await client.responses.create(model=MODEL, input="Again", previous_response_id=first.id)
    assert second.instructions is None
    assert messages(upstream) == [("user", "Hi"), ("assistant", "Arr."), ("user", "Again")]


async def test_images_and_files(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("A cat."))
    pixel = "data:image/png;base64,iVBORw0KGgo="
    await client.responses.create(
        model=MODEL,
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is it?"},
                    {"type": "input_image", "image_url": pixel, "detail": "auto"},
                    {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="},
                ],
            }
        ],
    )
    ((_, parts),) = messages(upstream)
    assert [part["type"] for part in parts] == ["text", "image_url", "file"]
    assert parts[1]["image_url"]["url"] == pixel
    assert parts[2]["file"]["filename"] == "a.pdf"


async def test_retrieve_delete_and_chain(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("One."), Say("Two."), Say("Three."))
    first = await client.responses.create(model=MODEL, input="one?")
    second = await client.responses.create(model=MODEL, input="two?", previous_response_id=first.id)
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.responses.retrieve(first.id)
    assert first.id in missing.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=MODEL, input="no?", previous_response_id=first.id)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    await client.responses.create(model=MODEL, input="three?", previous_response_id=second.id)
    assert [said for _, said in messages(upstream)] == ["one?", "One.", "two?", "Two.", "three?"]


async def test_input_items_paging(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Counted."))
    words = [f"word {at}" for at in range(5)]
    response = await client.responses.create(model=MODEL, input=[{"role": "user", "content": word} for word in words])
    for order, expected in (("asc", words), ("desc", words[::-1])):
        page = await client.responses.input_items.list(response.id, limit=2, order=order)  # type: ignore[arg-type]
        assert page.has_more
        assert len(page.data) == 2
        assert [item.to_dict()["content"] async for item in page] == [
            [{"type": "input_text", "text": word}] for word in expected
        ]
    newest_first = await client.responses.input_items.list(response.id)
    assert len({item.id for item in newest_first.data}) == 5
    after = await client.responses.input_items.list(response.id, order="asc", after=newest_first.data[1].id)
    assert [item.id for item in after.data] == [newest_first.data[0].id]


async def test_not_stored(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Secret."))
    response = await client.responses.create(model=MODEL, input="psst", store=False)
    assert response.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(model=MODEL, input="more", previous_response_id=response.id)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"max_output_tokens": 1}, "max_output_tokens", "integer_below_min_value"),
        ({"input": 7}, "input", "invalid_type"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"model": None}, "model", None),
        ({"metadata": {str(at): "x" for at in range(17)}}, "metadata", "object_above_max_properties"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id", "previous_response_not_found"),
    ],
)
async def test_bad_requests(
    client: AsyncOpenAI, upstream: Upstream, fields: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**{"model": MODEL, "input": "x", **fields})
    assert refused.value.param == param
    assert code is None or refused.value.code == code
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id
    assert not upstream.calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
    ],
)
async def test_upstream_refusals(
    client: AsyncOpenAI, upstream: Upstream, status: int, error: type[openai.APIStatusError], stream: bool
) -> None:
    """A refusal that comes before the first byte is a status, streamed or not."""
    said = {"error": {"message": "The model said no.", "type": "some_error", "code": None}}
    upstream.script(Reply(said, status=status, headers={"retry-after": "7"}))
    with pytest.raises(error) as refused:
        await client.responses.create(model=MODEL, input="x", stream=stream)
    assert ("refused its credentials" if status in (401, 403) else "The model said no.") in refused.value.message
    if status == 429:
        assert refused.value.response.headers["retry-after"] == "7"


async def test_unreachable_upstream(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Drop())
    with pytest.raises(openai.InternalServerError) as refused:
        await client.responses.create(model=MODEL, input="x")
    assert refused.value.status_code == 502


async def test_sdk_retries_reach_the_upstream(chat: str, upstream: Upstream) -> None:
    upstream.script(Reply({"error": {"message": "Busy."}}, status=503, headers={"retry-after": "0.01"}), Say("Now."))
    async with AsyncOpenAI(base_url=chat, api_key="test") as client:
        response = await client.responses.create(model=MODEL, input="x")
    assert response.output_text == "Now."
    assert len(upstream.calls) == 2


async def test_failure_in_the_middle_of_a_stream(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Stream([chunk({"content": "Half"})], close="eof"))
    events = await collect(await client.responses.create(model=MODEL, input="x", stream=True))
    assert events[-1]["type"] == "response.failed"
    failed = await client.responses.retrieve(events[-1]["response"]["id"])
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.to_dict()["code"] == "upstream_truncated"


async def test_incomplete(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.script(Say("Cut sh", finish="length"), Say("Cut sh", finish="length"))
    events = await collect(await client.responses.create(model=MODEL, input="x", max_output_tokens=16, stream=True))
    assert events[-1]["type"] == "response.incomplete"
    whole = await client.responses.create(model=MODEL, input="x", max_output_tokens=16)
    ended: list[dict[str, Any]] = [events[-1]["response"], whole.to_dict()]
    for response in ended:
        assert response["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["content"][0]["text"] == "Cut sh"


async def test_models(client: AsyncOpenAI) -> None:
    assert MODEL in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_sync_client(chat: str, upstream: Upstream) -> None:
    upstream.script(Say("Hello."), Say("Hello again."))
    assert await asyncio.to_thread(_talk, chat) == ["Hello.", "Hello again."]


def _talk(url: str) -> list[str]:
    with OpenAI(base_url=url, api_key="test") as client:
        first = client.responses.create(model=MODEL, input="Hi")
        second = client.responses.create(model=MODEL, input="Hi", previous_response_id=first.id, stream=True)
        return [first.output_text, "".join(e.delta for e in second if e.type == "response.output_text.delta")]


async def test_api_keys_and_tenants(upstream: Upstream, database: Path) -> None:
    upstream.script(Say("For a."), Say("For a again."))
    settings = Settings(
        backend="chat",
        upstream=upstream.url,
        database_url=f"sqlite:///{database}",
        api_keys={"a": "key-a", "b": "key-b"},  # type: ignore[dict-item] # the field's own validator takes one
    )
    async with (
        running(settings) as url,
        AsyncOpenAI(base_url=url, api_key="key-a", max_retries=0) as a,
        AsyncOpenAI(base_url=url, api_key="key-b", max_retries=0) as b,
        AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as nobody,
    ):
        with pytest.raises(openai.AuthenticationError):
            await nobody.responses.create(model=MODEL, input="x")
        made = await a.responses.create(model=MODEL, input="x")
        await _sees_nothing(b, made.id)
        assert (await a.responses.create(model=MODEL, input="y", previous_response_id=made.id)).output_text


async def _sees_nothing(client: AsyncOpenAI, other: str) -> None:
    """Another tenant's response is answered like one that never was."""
    unknown = f"{other[:-8]}00000000"
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        bodies = []
        for id in (other, unknown):
            with pytest.raises(openai.NotFoundError) as refused:
                await call(id)
            bodies.append(orjson.dumps(refused.value.body).decode().replace(id, "ID"))
        assert bodies[0] == bodies[1]
    bodies = []
    for id in (other, unknown):
        with pytest.raises(openai.BadRequestError) as chained:
            await client.responses.create(model=MODEL, input="x", previous_response_id=id)
        bodies.append(orjson.dumps(chained.value.body).decode().replace(id, "ID"))
    assert bodies[0] == bodies[1]


@pytest.fixture(scope="session")
def sdk1() -> Path:
    """A Python that has the SDK of the 1.x line."""
    return installed(f"openai-{SDK1}", _install_sdk1) / "bin" / "python"


def _install_sdk1(target: Path) -> None:
    venv.create(target, with_pip=True)
    fetch(str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", f"openai=={SDK1}")


@pytest.mark.timeout(60, func_only=True)  # fetching it may take longer, once
async def test_sdk_1(sdk1: Path, chat: str, upstream: Upstream) -> None:
    """What each step of `sdk1_script` prints, with the answers it is given here."""
    upstream.script(
        Say("Paris."),
        Say("One two."),
        Say("Three four."),
        Say('{"name": "Oslo", "people": 717710}'),
        Say(calls=[("get_weather", {"city": "Rome"})]),
        Say("Sunny."),
        Reply({"error": {"message": "No."}}, status=400),
    )
    process = await asyncio.create_subprocess_exec(
        *(sdk1, Path(__file__).with_name("sdk1_script.py"), chat),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    seen = orjson.loads(stdout)
    assert seen.pop("refused").endswith("No.")
    assert seen == {
        "version": SDK1,
        "created": "Paris.",
        "retrieved": "Paris.",
        "streamed": "One two.",
        "helper": "Three four.",
        "parsed": {"name": "Oslo", "people": 717710},
        "arguments": {"city": "Rome"},
        "answered": "Sunny.",
        "inputs": ["function_call_output"],
        "deleted": 404,
    }
