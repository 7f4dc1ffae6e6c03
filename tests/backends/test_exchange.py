"""What the backends do alike with an upstream: lists of models, what is left out. How answers are read is shown
by the tests of each backend, on its own dialect."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from responses_ingress.backends.exchange import LeftOut, model_names
from responses_ingress.backends.upstream import Client
from responses_ingress.backends.upstream import Upstream as Settings
from responses_ingress.errors import UpstreamInvalid, UpstreamTimeout
from tests.responses_upstream import Provider
from tests.upstream import Reply


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as provider:
        yield provider


@pytest.fixture
async def client(provider: Provider) -> AsyncIterator[Client]:
    client = Client(Settings("scripted", provider.url))
    yield client
    await client.close()


@pytest.mark.parametrize("listed", [None, [], {}, {"data": None}, {"data": {"id": "a"}}], ids=str)
async def test_a_list_of_models_that_is_none_is_an_error(provider: Provider, client: Client, listed: Any) -> None:
    provider.on_models = Reply(listed)
    with pytest.raises(UpstreamInvalid, match="does not list its models"):
        await model_names(client)


async def test_entries_of_the_list_that_are_no_models_are_left_out(provider: Provider, client: Client) -> None:
    provider.on_models = Reply({"data": [{"id": "a"}, {"id": 7}, "b", {}, None]})
    assert await model_names(client) == ["a"]


async def test_a_list_of_models_is_not_waited_for_for_long(
    provider: Provider, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("responses_ingress.backends.exchange._LISTING", 0.05)
    provider.on_models = Reply({}, hold=asyncio.Event())
    with pytest.raises(UpstreamTimeout, match="list its models"):
        await model_names(client)


def test_what_is_left_out_is_told_once_and_no_names_that_clients_make_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "responses_ingress.backends.exchange")
    left_out = LeftOut("vllm")
    left_out.tell(["web_search", "made-up\n1"], "reasoning of other backends")
    left_out.tell(["made-up\n2", "web_search"])
    left_out.tell(["mcp"])
    assert [record.getMessage().partition("left out: ")[2] for record in caplog.records] == [
        "hosted tool web_search, other tools, reasoning of other backends",
        "hosted tool mcp",
    ]
