"""Tools for upstreams without: asked natively first, then in words, remembered for a while."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from responses_ingress.backends.base import Backend
from responses_ingress.backends.chat import ChatBackend
from responses_ingress.backends.emulated import EmulatedTools
from responses_ingress.backends.upstream import Timeouts
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.core.deltas import Accepted, Delta, Finish, Item, Open, Remember, Text
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatOptions
from responses_ingress.errors import InvalidRequest, UpstreamError, UpstreamRefused, UpstreamTruncated
from responses_ingress.testing import MESSAGE, ManualClock, ScriptedBackend, spoken
from tests.dialects.play import brief, response_of
from tests.upstream import Reply, Say, Stream, Upstream, chunk

LOOK = {"type": "function", "name": "look", "parameters": {}}
PATCH = {"type": "custom", "name": "apply_patch"}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
ASKED: Item = {"type": "message", "role": "user", "content": "hi"}
CALLED: Item = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
SAW: Item = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}

NO_TOOLS = Reply({"error": {"message": "m does not support tools", "type": "api_error"}}, status=400)
REFUSED = UpstreamRefused("The upstream refused the request (status 400): m does not support tools.")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def chat(upstream: Upstream) -> AsyncIterator[ChatBackend]:
    backend = ChatBackend(Settings("scripted", upstream.url, timeouts=Timeouts(read=5)), ChatOptions())
    yield backend
    await backend.close()


@pytest.fixture
def backend(chat: ChatBackend, clock: ManualClock) -> EmulatedTools:
    return EmulatedTools(chat, clock=clock)


def turn(*items: Item, **fields: Any) -> Turn:
    fields = {"model": "m", "tools": [LOOK], **fields}
    return Turn("resp_1", "thread_1", new=items or [ASKED], **fields)


async def deltas_of(backend: Backend, given: Turn) -> list[Delta]:
    return [delta async for batch in backend.stream(given) for delta in batch]


async def answered(backend: Backend, given: Turn | None = None) -> list[tuple[str, str]]:
    return brief(response_of(await deltas_of(backend, given or turn()))["output"])


def asked(upstream: Upstream) -> list[str]:
    """How each request asked for its tools."""
    return [_asked(call.json) for call in upstream.calls]


def _asked(body: Any) -> str:
    if "tools" in body:
        return "native"
    return "emulated" if body["messages"][0]["content"].startswith("# Tools") else "plain"


# Which way


async def test_native_tools_are_left_alone(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(Say(f"Look: {CALL}", calls=[("look", {"at": 2})]))
    assert await answered(backend) == [("message", f"Look: {CALL}"), ("call", 'look {"at":2}')]
    assert asked(upstream) == ["native"]
    assert backend.tool_mode("m") == "native"


@pytest.mark.parametrize("stream", [True, False])
async def test_where_they_are_refused_they_are_emulated(
    upstream: Upstream, backend: EmulatedTools, stream: bool
) -> None:
    upstream.script(NO_TOOLS, Say(f"Let me look.\n{CALL}\n", reasoning=f"Shall I {CALL}?"))
    assert await answered(backend, turn(stream=stream)) == [
        ("reasoning", f"Shall I {CALL}?"),
        ("message", "Let me look."),
        ("call", 'look {"at": 1}'),
    ]
    assert asked(upstream) == ["native", "emulated"]


async def test_a_whole_round_trip(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(NO_TOOLS, Say(CALL), Say("It is sunny."))
    assert await answered(backend) == [("call", 'look {"at": 1}')]
    call = {**CALLED, "arguments": '{"at": 1}'}
    assert await answered(backend, turn(ASKED, call, SAW)) == [("message", "It is sunny.")]
    assert upstream.calls[-1].json["messages"][1:] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": CALL},
        {"role": "user", "content": '<tool_response name="look">\nsunny\n</tool_response>'},
    ]


async def test_freeform_tools_come_back_as_they_were_declared(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(NO_TOOLS, Say('<tool_call>{"name": "apply_patch", "arguments": {"input": "*** Begin"}}'))
    assert await answered(backend, turn(tools=[PATCH])) == [("custom", "apply_patch *** Begin")]


async def test_a_refusal_is_remembered_for_an_hour_and_for_its_model(
    upstream: Upstream, backend: EmulatedTools, clock: ManualClock
) -> None:
    upstream.script(NO_TOOLS, Say(CALL), Say(CALL), Say("hi"), Say("hi"))
    await answered(backend)
    assert (backend.tool_mode("m"), backend.tool_mode("other")) == ("emulated", "native")
    clock.advance(3599)
    assert await answered(backend) == [("call", 'look {"at": 1}')]
    await answered(backend, turn(model="other"))
    clock.advance(1)
    assert backend.tool_mode("m") == "native"
    await answered(backend)
    assert asked(upstream) == ["native", "emulated", "emulated", "native", "native"]


async def test_only_so_many_models_are_remembered_the_latest(
    upstream: Upstream, backend: EmulatedTools, clock: ManualClock
) -> None:
    upstream.answer = lambda call: NO_TOOLS if "tools" in call.json else Say("hi")
    await answered(backend, turn(model="m0"))
    await answered(backend, turn(model="m1"))
    clock.advance(3600)
    await answered(backend, turn(model="m0"))
    for number in range(2, 257):
        await answered(backend, turn(model=f"m{number}"))
    modes = [backend.tool_mode(f"m{number}") for number in range(257)]
    assert modes == ["emulated", "native"] + ["emulated"] * 255
    await answered(backend, turn(model="m257"))
    assert backend.tool_mode("m0") == "native"


async def test_that_a_model_has_no_tools_is_logged_once_and_without_content(
    upstream: Upstream, backend: EmulatedTools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream.script(NO_TOOLS, Say("Let me look at this."), Say("hi"))
    await answered(backend)
    await answered(backend)
    told = [record.getMessage() for record in caplog.records if "emulated" in record.name]
    assert told == ["upstream scripted has no tools for a model; they are emulated for an hour"]


async def test_a_turn_without_tools_goes_as_it_is(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(Say(CALL), NO_TOOLS, Say("hi"), Say(CALL))
    plain = turn(tools=[])
    assert await answered(backend, plain) == [("message", CALL)]
    await answered(backend)
    assert await answered(backend, plain) == [("message", CALL)]
    assert asked(upstream) == ["plain", "native", "emulated", "plain"]
    assert upstream.calls[0].json == upstream.calls[3].json


async def test_earlier_calls_are_told_in_words_too_once_it_is_known(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(NO_TOOLS, Say("hi"), Say("hi"))
    await answered(backend)
    await answered(backend, turn(ASKED, CALLED, SAW, tools=[]))
    assert [message["role"] for message in upstream.calls[-1].json["messages"]] == ["user", "assistant", "user"]


async def test_a_mode_can_be_forced(upstream: Upstream, chat: ChatBackend) -> None:
    upstream.script(Say(CALL), NO_TOOLS, NO_TOOLS)
    emulated, native = EmulatedTools(chat, "emulated"), EmulatedTools(chat, "native")
    assert await answered(emulated) == [("call", 'look {"at": 1}')]
    for _ in range(2):
        with pytest.raises(UpstreamRefused, match="does not support tools"):
            await deltas_of(native, turn())
    assert asked(upstream) == ["emulated", "native", "native"]
    assert (emulated.tool_mode("m"), native.tool_mode("m")) == ("emulated", "native")


# What goes wrong


async def test_any_other_refusal_is_passed_on(upstream: Upstream, backend: EmulatedTools) -> None:
    upstream.script(Reply({"error": {"message": "Invalid schema for function 'look'."}}, status=400))
    with pytest.raises(UpstreamRefused, match="Invalid schema"):
        await deltas_of(backend, turn())
    assert len(upstream.calls) == 1


async def test_hosted_tools_that_are_left_out_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "responses_ingress.backends.exchange")
    inner = ScriptedBackend(spoken("hi"), spoken("hi"))
    backend = EmulatedTools(inner, "emulated")
    for _ in range(2):
        await deltas_of(backend, turn(tools=[LOOK, {"type": "web_search"}]))
    (record,) = caplog.records
    assert record.getMessage() == "upstream scripted cannot take, so that it is left out: hosted tool web_search"


async def test_a_refusal_of_hosted_tools_alone_is_passed_on(clock: ManualClock) -> None:
    inner = ScriptedBackend([REFUSED])
    with pytest.raises(UpstreamRefused):
        await deltas_of(EmulatedTools(inner, clock=clock), turn(tools=[{"type": "web_search"}]))
    assert len(inner.calls) == 1


async def test_nothing_is_remembered_of_a_request_that_is_refused_again(
    upstream: Upstream, backend: EmulatedTools
) -> None:
    again = Reply({"error": {"message": "Your input 'does not support tools' is bad."}}, status=400)
    upstream.script(again, again)
    with pytest.raises(UpstreamRefused):
        await deltas_of(backend, turn())
    assert asked(upstream) == ["native", "emulated"]
    assert backend.tool_mode("m") == "native"


async def test_what_has_begun_is_never_asked_again(clock: ManualClock) -> None:
    inner = ScriptedBackend([[Accepted()], REFUSED])
    with pytest.raises(UpstreamRefused):
        await deltas_of(EmulatedTools(inner, clock=clock), turn())
    assert len(inner.calls) == 1


async def test_what_cannot_be_asked_is_refused_at_once(upstream: Upstream, chat: ChatBackend) -> None:
    file = {"type": "message", "role": "user", "content": [{"type": "input_file", "file_url": "http://x"}]}
    for backend in (EmulatedTools(chat), EmulatedTools(chat, "emulated")):
        with pytest.raises(InvalidRequest):
            backend.stream(turn(file))
    assert not upstream.requests


async def test_a_truncated_answer_ends_in_an_error_and_shows_no_half_call(
    upstream: Upstream, chat: ChatBackend
) -> None:
    half = CALL[:30]
    upstream.script(Stream([chunk({"content": "Let me look. "}), chunk({"content": half})], close="end"))
    told: list[Delta] = []
    with pytest.raises(UpstreamTruncated):
        async for batch in EmulatedTools(chat, "emulated").stream(turn()):
            told += batch
    assert [delta.text for delta in told if isinstance(delta, Text)] == ["Let me look."]


async def test_an_answer_cut_at_its_limit_shows_no_half_call(upstream: Upstream, chat: ChatBackend) -> None:
    upstream.script(Stream([chunk({"content": f"Look. {CALL}{CALL[:30]}"}), chunk(finish="length")]))
    response = response_of(await deltas_of(EmulatedTools(chat, "emulated"), turn()))
    assert response["status"] == "incomplete"
    assert brief(response["output"]) == [("message", "Look."), ("call", 'look {"at": 1}')]


# When


async def test_text_comes_while_the_model_still_writes(upstream: Upstream, chat: ChatBackend) -> None:
    hold, more = asyncio.Event(), asyncio.Event()
    begun, rest = chunk({"content": CALL[:30]}), chunk({"content": CALL[30:]})
    upstream.script(Stream([chunk({"content": "Let me look."}), hold, begun, rest, more, chunk(finish="stop")]))
    async with aclosing(EmulatedTools(chat, "emulated").stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]
        assert (await anext(batches))[-1] == Text(0, "Let me look.")
        hold.set()
        assert any(isinstance(delta, Open) and delta.item["name"] == "look" for delta in await anext(batches))
        more.set()
        assert isinstance((await anext(batches))[-1], Finish)


@pytest.mark.parametrize("answers", [[], [NO_TOOLS]])
async def test_leaving_leaves_the_upstream_too(
    upstream: Upstream, backend: EmulatedTools, answers: Sequence[Reply]
) -> None:
    upstream.script(*answers, Stream([chunk({"content": "a"}), asyncio.Event()]))
    async with aclosing(backend.stream(turn())) as batches:
        assert await anext(batches) == [Accepted()]
    await upstream.closed(len(answers))


# The rest of the backend


async def test_it_is_the_backend_inside_for_all_else(clock: ManualClock) -> None:
    inner = ScriptedBackend(name="inside", models=["a"], resumable=True, goes_on=True)
    backend = EmulatedTools(inner, clock=clock)
    assert (backend.name, backend.resumable, backend.goes_on) == ("inside", True, True)
    assert await backend.models() == ["a"]
    await backend.cancel({"id": "u1", "emulated_tools": True}, None)
    await backend.close()
    assert (inner.cancelled, inner.closed) == ([{"id": "u1"}], True)


async def test_a_turn_that_is_resumed_is_read_as_it_was_asked_for(clock: ManualClock) -> None:
    inner = ScriptedBackend([REFUSED], [[Remember({"id": "u1"})], *spoken(CALL)], spoken(CALL), resumable=True)
    told = await deltas_of(EmulatedTools(inner, clock=clock), turn())
    (remembered,) = (delta.state for delta in told if isinstance(delta, Remember))

    elsewhere = EmulatedTools(inner, clock=clock)
    assert elsewhere.tool_mode("m") == "native"
    resumed = turn(resume=remembered, memory=remembered)
    assert await answered(elsewhere, resumed) == [("call", 'look {"at": 1}')]
    asked = inner.calls[-1].turn
    assert (asked.resume, asked.memory, asked.tools) == ({"id": "u1"}, {"id": "u1"}, ())


async def test_a_native_turn_that_is_resumed_stays_native(clock: ManualClock) -> None:
    inner = ScriptedBackend([REFUSED], spoken("hi"), spoken(CALL), [UpstreamError("m does not support tools")])
    backend = EmulatedTools(inner, clock=clock)
    await deltas_of(backend, turn())
    assert await answered(backend, turn(resume={"id": "u1"})) == [("message", CALL)]
    with pytest.raises(UpstreamError):
        await deltas_of(backend, turn(model="other", resume={"id": "u1"}))


async def test_a_refusal_to_a_request_that_was_only_announced_is_one(clock: ManualClock) -> None:
    about = [Remember({"creating": True})]
    inner = ScriptedBackend([about, REFUSED], [about, *spoken(CALL)], resumable=True)
    backend = EmulatedTools(inner, clock=clock)
    assert await answered(backend) == [("call", 'look {"at": 1}')]
    assert backend.tool_mode("m") == "emulated"


async def test_what_may_have_begun_is_not_asked_for_in_words(clock: ManualClock) -> None:
    unknown = UpstreamError("m does not support tools.", code="upstream_create_unknown")
    inner = ScriptedBackend([unknown], spoken("hi"))
    with pytest.raises(UpstreamError):
        await deltas_of(EmulatedTools(inner, clock=clock), turn())
    assert len(inner.calls) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
async def test_a_resumed_turn_needs_no_history_for_its_tools(clock: ManualClock, choice: Any) -> None:
    brought = {"type": "additional_tools", "role": "developer", "tools": [LOOK]}
    inner = ScriptedBackend([[Remember({"id": "u1"})], *spoken(CALL)], spoken(CALL), resumable=True)
    backend = EmulatedTools(inner, "emulated", clock)
    told = await deltas_of(backend, turn(tools=[], context=[brought], tool_choice=choice))
    (remembered,) = (delta.state for delta in told if isinstance(delta, Remember))
    resumed = turn(tools=[], tool_choice=choice, resume=remembered)
    assert await answered(backend, resumed) == [("call", 'look {"at": 1}')]


async def test_batches_that_hold_everything_back_are_left_out(clock: ManualClock) -> None:
    inner = ScriptedBackend(spoken("", *CALL))
    batches = [batch async for batch in EmulatedTools(inner, "emulated", clock).stream(turn())]
    assert all(batches)
    assert Open(0, MESSAGE) not in [delta for batch in batches for delta in batch]
