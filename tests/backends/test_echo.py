from typing import Any

import pytest

from responses_ingress.backends.echo import EchoBackend
from responses_ingress.core.deltas import Accepted, Delta, Finish, Item, Text
from responses_ingress.core.turn import Turn
from tests.dialects.play import brief, events_of, response_of

LOOK = {"type": "function", "name": "look", "parameters": {}}
PATCH = {"type": "custom", "name": "patch"}
FILES = {"type": "namespace", "name": "files", "tools": [LOOK, PATCH]}


def user(text: str) -> Item:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def said(*new: Item, context: tuple[Item, ...] = (), tools: tuple[Any, ...] = ()) -> list[Delta]:
    turn = Turn("resp_1", "thread_1", "any", context=context, new=new, tools=tools)
    return [delta async for batch in EchoBackend().stream(turn) for delta in batch]


async def answered(*new: Item, context: tuple[Item, ...] = (), tools: tuple[Any, ...] = ()) -> list[tuple[str, str]]:
    return brief(response_of(await said(*new, context=context, tools=tools))["output"])


async def test_it_repeats_the_users_text_and_counts_what_came_before() -> None:
    assert await answered(user("two words")) == [("message", "two words\n(0 earlier items)")]
    earlier = (user("a"), user("b"))
    assert await answered(user("c"), context=earlier) == [("message", "c\n(2 earlier items)")]


async def test_it_streams_word_by_word_and_loses_nothing() -> None:
    deltas = await said(user("  one\n\n two "))
    texts = [delta.text for delta in deltas if isinstance(delta, Text)]
    assert len(texts) > 3
    assert "".join(texts) == "  one\n\n two \n(0 earlier items)"
    assert deltas[0] == Accepted()
    assert isinstance(deltas[-1], Finish)


async def test_it_makes_a_good_stream_of_any_text() -> None:
    for text in ("", " ", "\n", "x", "ünïcödé 🙂", "call", "call me maybe"):
        events_of(await said(user(text)))


async def test_it_repeats_a_tools_output() -> None:
    output = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
    assert await answered(output, context=(user("call look"),)) == [("message", "sunny\n(1 earlier items)")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('call look {"a": 1}', ("call", 'look {"a": 1}')),
        ("call look", ("call", "look {}")),
        ("  call look  1 2", ("call", "look 1 2")),
        ("call patch *** Begin\n+x", ("custom", "patch *** Begin\n+x")),
        ("call patch", ("custom", "patch ")),
        ("call files.look {}", ("call", "files/look {}")),
        ("call files.patch x", ("custom", "files/patch x")),
        ("call unknown {}", ("call", "unknown {}")),
        ("call mcp.unknown {}", ("call", "mcp/unknown {}")),
    ],
)
async def test_a_text_that_asks_for_a_call_gets_it(text: str, expected: tuple[str, str]) -> None:
    assert await answered(user(text), tools=(LOOK, PATCH, FILES)) == [expected]


async def test_a_tool_inside_a_namespace_is_found_by_its_own_name() -> None:
    assert await answered(user("call patch x"), tools=(FILES,)) == [("custom", "files/patch x")]


async def test_tools_that_came_as_an_item_are_known_too() -> None:
    more = {"type": "additional_tools", "tools": [PATCH]}
    assert await answered(user("call patch x"), context=(more,)) == [("custom", "patch x")]


async def test_only_what_a_user_says_last_asks_for_a_call() -> None:
    assistant = {"type": "message", "role": "assistant", "content": "call look"}
    assert (await answered(assistant, context=(user("hi"),)))[0][0] == "message"
    assert (await answered(user("please call look")))[0][0] == "message"


async def test_it_counts_tokens_as_words() -> None:
    usage = response_of(await said(user("one two three"), context=(user("four"),)))["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (4, 6, 10)


async def test_it_knows_one_model_and_answers_for_any() -> None:
    backend = EchoBackend()
    assert (backend.name, await backend.models()) == ("echo", ["echo"])
    await backend.close()
