"""The settings of upstreams: what kinds there are, and which option belongs to which.

What must stay true: an option that another kind takes is refused, never ignored; a field that has the name
of an option of a backend means that option; no secret is part of a `repr`. As in settings, a field's
description is its row in docs/configuration.md. It must not know what a backend does with an option.
"""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SecretStr,
)

from responses_ingress.errors import SettingsError

Kind = Literal["chat", "responses", "background", "messages", "echo"]

Url = Annotated[str, AfterValidator(lambda url: url.rstrip("/"))]


class Upstream(BaseModel):
    """One place that answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Kind = "chat"
    """`chat`: a chat-completions server. `responses`: a Responses server. `background`: a Responses provider that works
    in the background and is polled. `messages`: a server of the Anthropic Messages API. `echo`: the embedded echo,
    which needs no model."""
    url: Url | None = Field(default=None, repr=False)
    """Base address, up to and including `/v1`. Required, but for `echo`."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the upstream's key."""
    pass_bearer: bool = False
    """Send the client's own `Authorization: Bearer` on to the upstream. Where the server has API keys of its own,
    clients give those as `x-api-key`."""
    authorization: Literal["bearer", "x-api-key"] | None = None
    """How the key is sent. Unset: as `x-api-key` to `messages`, else as `Authorization: Bearer`."""
    headers: dict[str, str] = Field(default={}, repr=False)
    """Further headers of every request to the upstream."""
    ca_file: Path | None = None
    """A PEM file of certificates to trust besides those of the system."""
    connect_timeout: PositiveFloat = 10.0
    """Seconds to wait for a connection."""
    first_byte_timeout: PositiveFloat = 600.0
    """Seconds to wait for the first byte of an answer."""
    read_timeout: PositiveFloat = 300.0
    """Seconds an answer may pause between two chunks."""
    retries: NonNegativeInt = 0
    """How often a request is made again that could not be delivered, or that was answered with 429, 503 or 529.
    Not where something of an answer may have been made, nor where the upstream wants a wait of more than 10 s."""
    max_concurrent: PositiveInt | None = None
    """Turns that the upstream gets at a time, from one process; more of them wait. Unset: any number."""
    max_waiting: NonNegativeInt = 100
    """Turns that may wait for the upstream; one more gets 503."""
    tools: Literal["auto", "native", "emulated"] = "auto"
    """How a model gets its tools: `native`, or `emulated` by describing them in the prompt; `auto` tries the first, and
    the second for an hour where the upstream says that it has no tools for the model."""
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    """What becomes of a run whose client has left for longer than `disconnect_grace`: `cancel` ends it, upstream too,
    `continue` lets it end by itself. Background runs always go on, and so do all runs of `background`."""
    forward: tuple[str, ...] | None = None
    """`chat`, `messages`: request fields beyond the Responses API that are sent on unchanged. Unset:
    `chat_template_kwargs` to `chat`, none to `messages`. The other kinds send on all fields."""
    system: Literal["leading", "in_place", "user"] | None = None
    """`chat`, `messages`: later system and developer messages. `leading` joins all into one first message, `in_place`
    leaves them where they stand, `user` (only `messages`) makes them a marked part of the user's message. Unset:
    `leading` for `chat`, `user` for `messages`."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """`chat`: what the upstream calls `max_output_tokens`. OpenAI itself wants `max_completion_tokens`."""
    reasoning: Literal["reasoning_content", "text", "omit"] = "reasoning_content"
    """`chat`: how earlier reasoning goes back: as `reasoning_content`, as `<think>` text before the answer (`text`), or
    not at all (`omit`)."""
    max_tokens: PositiveInt = 32_000
    """`messages`: sent where the client sets no `max_output_tokens`; the API wants a number."""
    thinking: Literal["adaptive", "budget", "off"] = "adaptive"
    """`messages`: what `reasoning.effort` becomes: the effort itself (`adaptive`, for Claude 4.6 and later), a number
    of tokens (`budget`, for Claude 4.6 and earlier), or nothing (`off`)."""
    json_schema: Literal["native", "instruction"] = "native"
    """`messages`: how a JSON schema is asked for: in the API's own field, or in words (`instruction`) where the model
    has no support."""
    cache: bool = True
    """`messages`: mark for the provider's cache what stays from turn to turn."""
    chain: bool = False
    """`responses`: continue from the upstream's own `previous_response_id` instead of sending the whole context, where
    it stands for that. The upstream then stores its answers."""
    open_reasoning: bool = True
    """`responses`, `background`: send back reasoning that is not encrypted. Never done to OpenAI, which refuses it."""
    encrypted_reasoning: bool = True
    """`responses`, `background`: ask for reasoning in encrypted form, so that it can be sent back."""
    item_ids: bool = False
    """`responses`, `background`: send the ids of items, for servers that insist on some."""
    completion_window: str | None = None
    """`background`: how long the provider may take, in its own words, as in `24h`; a request's
    `metadata.completion_window` goes before it."""
    window_in: Literal["metadata", "background_options"] = "metadata"
    """`background`: the request field in which the provider takes the window. OpenAI's is `background_options`."""
    idempotency: bool = False
    """`background`: the provider honours `Idempotency-Key`, so that a request whose answer was lost can be made once
    more."""
    first_poll: PositiveFloat = 1.0
    """`background`: seconds until a response is asked for the first time. Each wait is longer by half."""
    longest_poll: PositiveFloat = 30.0
    """`background`: seconds that a wait between two polls grows to, unless the provider wants more."""
    poll_timeout: PositiveFloat = 60.0
    """`background`: seconds that one poll may take."""
    patience: PositiveFloat = 86_400.0
    """`background`: seconds that a response may take whose window is not given as a number of `s`, `m`, `h` or `d`."""
    margin: NonNegativeFloat = 3_600.0
    """`background`: seconds that a response may take beyond its window, before it is cancelled."""
    cancel_timeout: PositiveFloat = Field(default=5.0, le=5.0)
    """`background`: seconds for telling the provider to cancel, at most 5."""

    _api_key: SecretStr | None = PrivateAttr(default=None)

    @property
    def api_key(self) -> str | None:
        """The value of the variable that `api_key_env` names; set by `load`."""
        return self._api_key.get_secret_value() if self._api_key else None


_UPSTREAM = frozenset(("chat", "responses", "background", "messages"))
_RESPONSES = frozenset(("responses", "background"))

_TAKEN_BY: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("url", "api_key_env", "pass_bearer", "authorization", "headers", "ca_file"), _UPSTREAM),
    **dict.fromkeys(("connect_timeout", "first_byte_timeout", "read_timeout", "tools"), _UPSTREAM),
    **dict.fromkeys(("retries", "on_disconnect"), _UPSTREAM - {"background"}),
    **dict.fromkeys(("forward", "system"), frozenset(("chat", "messages"))),
    **dict.fromkeys(("max_tokens_field", "reasoning"), frozenset(("chat",))),
    **dict.fromkeys(("max_tokens", "thinking", "json_schema", "cache"), frozenset(("messages",))),
    **dict.fromkeys(("open_reasoning", "encrypted_reasoning", "item_ids"), _RESPONSES),
    "chain": frozenset(("responses",)),
    **dict.fromkeys(("completion_window", "window_in", "idempotency"), frozenset(("background",))),
    **dict.fromkeys(("first_poll", "longest_poll", "poll_timeout"), frozenset(("background",))),
    **dict.fromkeys(("patience", "margin", "cancel_timeout"), frozenset(("background",))),
}
"""The kinds that take an option. All take those that are not named here."""


def check_upstream(name: str, upstream: Upstream) -> None:
    """Raises `SettingsError` for what contradicts itself."""
    where = f"upstreams.{name}"
    if ":" in name:
        raise SettingsError(f"The name of an upstream must not hold a colon, as '{name}' does.")
    for option in sorted(upstream.model_fields_set):
        kinds = _TAKEN_BY.get(option)
        if kinds and upstream.kind not in kinds and getattr(upstream, option) is not None:
            raise SettingsError(
                f"'{where}' is of kind {upstream.kind}, which takes no '{option}'. It is an option of"
                f" {', '.join(sorted(kinds))}."
            )
    if upstream.kind == "echo":
        return
    if not upstream.url:
        raise SettingsError(f"'{where}' is of kind {upstream.kind}, which needs a 'url'.")
    check_address(f"{where}.url", upstream.url)
    if upstream.api_key_env and upstream.pass_bearer:
        raise SettingsError(f"'{where}' has both 'api_key_env' and 'pass_bearer'; a request has room for one key.")
    if upstream.kind == "background":
        _check_background(where, upstream)
    if upstream.kind == "chat" and upstream.system == "user":
        raise SettingsError(f"'{where}.system' is user, which only messages knows.")
    if upstream.ca_file:
        _check_certificates(f"{where}.ca_file", upstream.ca_file)


def _check_background(where: str, upstream: Upstream) -> None:
    if upstream.pass_bearer:
        raise SettingsError(
            f"'{where}' is of kind background, which takes no 'pass_bearer': keys of clients are not stored, and a"
            " response could not be asked for after a restart."
        )
    if upstream.first_poll > upstream.longest_poll:
        raise SettingsError(f"'{where}.first_poll' is longer than its 'longest_poll'.")


def check_address(name: str, url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"'{name}' must begin with http:// or https://.")


def _check_certificates(name: str, path: Path) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        why = "it holds no certificates" if isinstance(error, ssl.SSLError) else error.strerror
        raise SettingsError(f"The file {path} that '{name}' names cannot be used: {why}.") from None
