"""The turns that the echo can take: text, calls and their outputs. It fails in no way, and says what it is told."""

from collections.abc import AsyncIterator

import pytest

from responses_ingress.settings import Settings
from tests.conformance.test_conformance import LOOK, NOTE, ask, said, stream, text_of
from tests.dialects.play import brief
from tests.server import running


@pytest.fixture
async def url(sqlite_database: str) -> AsyncIterator[str]:
    async with running(Settings(database_url=sqlite_database)) as url:
        yield url


async def test_text(url: str) -> None:
    assert "Hello there" in text_of(await stream(url, input="Hello there"))


@pytest.mark.parametrize(
    ("asked", "called", "output"),
    [
        ('call look {"at":"sky"}', ("call", 'look {"at":"sky"}'), "function_call_output"),
        ("call note two words", ("custom", "note two words"), "custom_tool_call_output"),
    ],
)
async def test_a_call_and_its_output(url: str, asked: str, called: tuple[str, str], output: str) -> None:
    first = await ask(url, input=asked, tools=[LOOK, NOTE])
    assert brief(first["output"]) == [called]
    given = {"type": output, "call_id": first["output"][0]["call_id"], "output": "All is blue."}
    ((kind, text),) = await said(url, input=[given], tools=[LOOK, NOTE], previous_response_id=first["id"])
    assert kind == "message" and "All is blue." in text
