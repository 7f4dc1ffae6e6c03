"""The composition root: every setting of an upstream reaches its backend, under the same name and default."""

from dataclasses import fields
from typing import Any, get_args

import pytest
from pydantic import SecretStr

from responses_ingress.app import make_backends, options, upstream_status
from responses_ingress.backends.background import BackgroundOptions
from responses_ingress.backends.emulated import EmulatedTools
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatOptions
from responses_ingress.dialects.messages import MessagesOptions
from responses_ingress.dialects.responses_encoder import ResponsesOptions
from responses_ingress.errors import UpstreamError
from responses_ingress.settings import Settings
from responses_ingress.upstream_settings import Kind, Upstream
from tests.upstream import Reply
from tests.upstream import Upstream as Scripted

OPTIONS: list[Any] = [ChatOptions, MessagesOptions, ResponsesOptions, BackgroundOptions]
CHANGED: dict[str, Any] = {
    "max_tokens_field": "max_completion_tokens",
    "system": "in_place",
    "reasoning": "omit",
    "forward": ("seed",),
    "max_tokens": 9,
    "thinking": "off",
    "json_schema": "instruction",
    "cache": False,
    "chain": True,
    "open_reasoning": False,
    "encrypted_reasoning": False,
    "item_ids": True,
    "completion_window": "1h",
    "window_in": "background_options",
    "idempotency": True,
    "first_poll": 2.0,
    "longest_poll": 3.0,
    "poll_timeout": 4.0,
    "patience": 5.0,
    "margin": 6.0,
    "cancel_timeout": 4.0,
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_have_the_defaults_of_the_backends(kind: Any) -> None:
    assert options(kind, Upstream()) == kind()


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_can_be_set(kind: Any) -> None:
    found = options(kind, Upstream(**CHANGED))
    names = {field.name for field in fields(kind)} - {"requests"}
    assert {name: getattr(found, name) for name in names} == {name: CHANGED[name] for name in names}


@pytest.mark.parametrize("kind", get_args(Kind))
async def test_every_kind_has_a_backend(kind: Kind) -> None:
    given = Upstream(kind=kind, url=None if kind == "echo" else "http://127.0.0.1:1/v1")
    settings = Settings(upstreams={"it": given})
    gate = make_backends(settings)["it"]
    assert isinstance(gate.inner, EmulatedTools) == (kind != "echo")
    (status,) = upstream_status(settings, {"it": gate})
    assert (status.name, status.kind, status.in_flight, status.tools) == (
        "it",
        kind,
        0,
        None if kind == "echo" else "auto",
    )
    await gate.close()


@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
async def test_a_run_goes_on_as_the_settings_say(kind: Kind) -> None:
    place: dict[str, Any] = {"kind": kind, "url": "http://127.0.0.1:1/v1"}
    for given, goes_on in ((place, False), ({**place, "on_disconnect": "continue"}, True)):
        gate = make_backends(Settings(upstreams={"it": Upstream(**given)}))["it"]
        assert gate.goes_on is goes_on
        await gate.close()


@pytest.mark.parametrize(
    ("kind", "more", "header", "path"),
    [
        ("chat", {}, ("authorization", "Bearer secret"), "/v1/chat/completions"),
        ("responses", {}, ("authorization", "Bearer secret"), "/v1/responses"),
        ("background", {}, ("authorization", "Bearer secret"), "/v1/responses"),
        ("messages", {}, ("x-api-key", "secret"), "/v1/messages"),
        ("messages", {"authorization": "bearer"}, ("authorization", "Bearer secret"), "/v1/messages"),
    ],
)
async def test_a_key_is_sent_as_the_kind_wants_it(
    kind: Kind, more: dict[str, Any], header: tuple[str, str], path: str
) -> None:
    async with Scripted(Reply({}, status=400)) as upstream:
        given = Upstream(kind=kind, url=upstream.url, headers={"x": "y"}, **more)
        given._api_key = SecretStr("secret")
        gate = make_backends(Settings(upstreams={"it": given}))["it"]
        with pytest.raises(UpstreamError):
            async for _ in gate.stream(Turn("resp", "thread", "model")):
                pass
        await gate.close()
        (asked,) = upstream.requests
    assert (asked.path, asked.headers["x"], asked.headers[header[0]]) == (path, "y", header[1])
