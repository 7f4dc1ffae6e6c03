"""Settings: the only reader of the environment and of TOML files.

What must stay true: flags win over environment, environment over file, file over defaults; an unknown,
malformed or contradictory setting is a `SettingsError` that names it; values are frozen once loaded; no
secret is part of a `repr`. `Settings(...)` itself reads nothing; `load` does. Every field's description
is its row in docs/configuration.md, which a test compares. It must not know who uses a setting.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic_settings
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from responses_ingress.errors import SettingsError
from responses_ingress.upstream_settings import Kind, Upstream, Url, check_address, check_upstream

PREFIX = "RESPONSES_INGRESS_"
CONFIG = f"{PREFIX}CONFIG"

# The configuration file itself, and what the test suite is told.
_NOT_SETTINGS = frozenset(
    {CONFIG} | {f"{PREFIX}{name}" for name in ("RECORDINGS", "CONTRACT", "TEST_CACHE", "TEST_POSTGRES")}
)
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
_HASHED = "sha256:"

_OneOrMore = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
_Keys = Annotated[tuple[SecretStr, ...], Field(min_length=1), _OneOrMore]


class Route(BaseModel):
    """A model name pattern and where it leads. The first pattern that matches wins."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Pattern of model names: `*` is any text, `?` one character, `[ab]` one of these."""
    upstream: str
    """Name of the upstream."""
    upstream_model: str | None = None
    """The upstream's own name for the model. Unset: the name that was asked for."""


class Settings(BaseSettings):
    """All settings. Made by `load`; made directly, it takes only what it is given."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address to listen on. Another than loopback needs `api_keys`, or `insecure`."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    workers: PositiveInt = 1
    """Processes. Several want PostgreSQL; on SQLite they take turns at writing."""
    insecure: bool = False
    """Listen on any address without API keys."""
    database_url: str = Field(default="sqlite:///responses_ingress.db", repr=False)
    """`sqlite:///FILE` (relative to the working directory; four slashes for an absolute path) or
    `postgresql://USER:PASSWORD@HOST/DATABASE` (needs the extra `postgres`)."""
    synchronous: Literal["normal", "full"] = "normal"
    """SQLite: `normal` survives the death of the process, `full` that of the machine too."""
    auto_migrate: bool | None = None
    """Bring the database to the newest schema at start. Unset: yes on SQLite, no on PostgreSQL, where
    `responses-ingress migrate` does it."""
    backend: Kind | None = None
    """Short form for one single upstream: its kind. Unset, and no `upstreams`: `echo`."""
    upstream: Url | None = Field(default=None, repr=False)
    """Short form for one single upstream: its address, for every kind but `echo`."""
    upstreams: dict[str, Upstream] = {}
    """Upstreams by name, see below."""
    routes: tuple[Route, ...] = ()
    """Which model name goes to which upstream, see below."""
    default_upstream: str | None = None
    """Upstream for model names that no route matches. Unset: the only upstream, where there are no routes."""
    api_keys: dict[str, _Keys] = {}
    """Tenant → its key, or a list of its keys. A key may be given as `sha256:` and the 64 hex digits of its SHA-256.
    As an environment variable: a JSON object."""
    api_keys_file: Path | None = None
    """A JSON or TOML file with more of `api_keys`: an object, or one `tenant = "key"` a line."""
    admins: tuple[str, ...] = ()
    """Tenants that may see how the upstreams fare. Where there are no `api_keys`, everybody may."""
    strict: bool = False
    """Refuse unknown request fields with 400 instead of ignoring them."""
    sse_done: bool = False
    """End streams with `data: [DONE]`, for clients that wait for it."""
    flush_interval: NonNegativeFloat = 0.1
    """Seconds that streamed text may run ahead of the database. 0: every event waits for its commit."""
    keepalive_interval: PositiveFloat = 15.0
    """Seconds of silence after which a stream says that it lives."""
    accept_wait: NonNegativeFloat = 0.15
    """Seconds a stream's headers wait for the upstream, so that a refusal can still be a status."""
    disconnect_grace: NonNegativeFloat = 10.0
    """Seconds a run goes on after its last client left, before it is cancelled."""
    thread_wait: NonNegativeFloat = 30.0
    """Seconds a session's request waits for the thread's running turn, before it gets 503."""
    lease: PositiveFloat = 15.0
    """Seconds after which the runs of a silent worker count as abandoned: another goes on with them, or closes them."""
    max_body: PositiveInt = 64 * 1024 * 1024
    """Bytes a request body may have, unpacked."""
    max_items: PositiveInt = 10_000
    """Items a request's `input` may have."""
    max_runs: PositiveInt = 1000
    """Responses one process runs at a time; one more gets 503."""
    max_background: PositiveInt = 100
    """Background responses one process runs at a time; more of them wait in the queue."""
    max_queued: NonNegativeInt = 1000
    """Background responses that may wait in the queue, of all processes together; one more gets 429."""
    keep_journals: PositiveFloat = 600.0
    """Seconds after its end that the events of a response are kept: so long `starting_after` is good, and a repeated
    request attaches to it. Background responses with `store: false` are kept as long."""
    keep_responses: NonNegativeFloat = 30.0
    """Days from its last use that a response is kept; 0 is for ever."""
    keep_most_responses: PositiveInt | None = None
    """Responses of one tenant that are kept, those used last; unset is all."""
    keep_threads: NonNegativeFloat = 90.0
    """Days from its last use that a named thread is kept; 0 is for ever."""
    shutdown_grace: NonNegativeFloat = 10.0
    """Seconds that running responses get to end when the server is told to stop. Then those in the background go
    back to the queue, and others are closed as failed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`load` merges the sources, so that the environment can be handed in."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_database(self.database_url)
        _check_short_form(self)
        for name, upstream in self.upstreams.items():
            check_upstream(name, upstream)
        _check_routes(self)
        self.key_hashes  # noqa: B018 - raises where a key is malformed
        if strangers := set(self.admins) - self.api_keys.keys():
            raise SettingsError(f"'admins' names '{min(strangers)}', which is no tenant of 'api_keys'.")
        if not (self.api_keys or self.insecure or _is_loopback(self.host)):
            raise SettingsError(f"'host' is {self.host}, which is open to others: set 'api_keys', or say 'insecure'.")
        return self

    @property
    def async_database_url(self) -> str:
        """`database_url` with the driver we use."""
        scheme, rest = self.database_url.split("://", 1)
        return f"{_DRIVERS[scheme]}://{rest}"

    @property
    def migrates(self) -> bool:
        """Whether a start brings the database to the newest schema."""
        return self.database_url.startswith("sqlite") if self.auto_migrate is None else self.auto_migrate

    @property
    def effective_upstreams(self) -> Mapping[str, Upstream]:
        """`upstreams`, or the one that the short form or the default stands for."""
        if self.upstreams:
            return self.upstreams
        if self.backend and self.backend != "echo":
            return {"default": Upstream(kind=self.backend, url=self.upstream)}
        return {"echo": Upstream(kind="echo")}

    @property
    def effective_routes(self) -> tuple[Route, ...]:
        """`routes`, then the default for every other name, where there is one."""
        names = list(self.effective_upstreams)
        default = self.default_upstream
        if default is None and (not self.upstreams or (len(names) == 1 and not self.routes)):
            default = names[0]
        return self.routes if default is None else (*self.routes, Route(model="*", upstream=default))

    @property
    def key_hashes(self) -> tuple[tuple[str, bytes], ...]:
        """(tenant, SHA-256 of a key) for every API key."""
        pairs = [(tenant, _key_hash(tenant, key)) for tenant, keys in self.api_keys.items() for key in keys]
        if len({digest for _, digest in pairs}) < len(pairs):
            raise SettingsError("The same key stands twice in 'api_keys'.")
        return tuple(pairs)

    def to_environment(self) -> dict[str, str]:
        """Environment variables from which `load` makes the same settings in another process."""
        given = self.model_dump(mode="json", exclude_unset=True, exclude={"api_keys_file"})
        if self.api_keys:
            given["api_keys"] = {tenant: [] for tenant, _ in self.key_hashes}
            for tenant, digest in self.key_hashes:
                given["api_keys"][tenant].append(_HASHED + digest.hex())
        return {
            f"{PREFIX}{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in given.items()
            if value is not None
        }


def load(config: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings from flags (`overrides`; None is no flag), `environ` and the TOML file `config`, or the file that
    `RESPONSES_INGRESS_CONFIG` names."""
    environ = os.environ if environ is None else environ
    path = config or environ.get(CONFIG)
    values = _read(Path(path), "configuration file") if path else {}
    _merge(values, _from_environment(environ))
    _merge(values, {name: value for name, value in overrides.items() if value is not None})
    _add_keys_file(values)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None
    for name, upstream in settings.upstreams.items():
        _resolve_key(name, upstream, environ)
    return settings


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"The {what} {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError(f"The {what} {path} is malformed: {error}.") from None
    if not isinstance(given, dict):
        raise SettingsError(f"The {what} {path} must hold an object.")
    return given


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in environ.items() if value and name.upper().startswith(PREFIX)}
    for name in found.keys() - _NOT_SETTINGS:
        field, *nested = name.upper().removeprefix(PREFIX).lower().split("__")
        if field not in Settings.model_fields or (nested and field != "upstreams"):
            raise SettingsError(f"The environment variable {name} names no setting.")
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in found.items()}
    try:
        return source()
    except pydantic_settings.SettingsError as error:
        raise SettingsError(f"An environment variable that must be JSON is not: {error}.") from None


def _add_keys_file(values: dict[str, Any]) -> None:
    path, own = values.get("api_keys_file"), values.get("api_keys", {})
    if path and isinstance(own, dict):
        more = _read(Path(str(path)), "file of API keys")
        if twice := sorted(own.keys() & more.keys()):
            raise SettingsError(f"The tenant '{twice[0]}' stands both in 'api_keys' and in 'api_keys_file'.")
        values["api_keys"] = own | more


def _resolve_key(name: str, upstream: Upstream, environ: Mapping[str, str]) -> None:
    if upstream.api_key_env is None:
        return
    value = environ.get(upstream.api_key_env)
    if not value:
        raise SettingsError(
            f"'upstreams.{name}.api_key_env' names the environment variable {upstream.api_key_env}, which is not set."
        )
    upstream._api_key = SecretStr(value)


def _sentence(error: ValidationError) -> str:
    """What is wrong first, without the value: it may be a secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{name}'."
    return f"The setting '{name}' is wrong: {first['msg']}."


def _check_database(url: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme not in _DRIVERS:
        raise SettingsError(f"'database_url' must begin with one of {', '.join(f'{name}://' for name in _DRIVERS)}.")
    file = rest.partition("?")[0]
    if scheme.startswith("sqlite") and (not file.startswith("/") or file in ("/", "/:memory:")):
        raise SettingsError("'database_url' must name a file, as in sqlite:///responses_ingress.db.")


def _check_short_form(settings: Settings) -> None:
    backend, upstream = settings.backend, settings.upstream
    if settings.upstreams and (backend or upstream):
        raise SettingsError("'backend' and 'upstream' are the short form for one upstream; 'upstreams' is given too.")
    needs = backend not in (None, "echo")
    if needs and not upstream:
        raise SettingsError(
            f"'backend' is {backend}, so 'upstream' must give the address, as in http://127.0.0.1:11434/v1."
        )
    if upstream and not needs:
        raise SettingsError("'upstream' gives an address, so 'backend' must say what is there, as in chat.")
    if upstream:
        check_address("upstream", upstream)


def _check_routes(settings: Settings) -> None:
    known = settings.effective_upstreams
    for route in settings.routes:
        if route.upstream not in known:
            raise SettingsError(f"The route '{route.model}' leads to '{route.upstream}', which is not an upstream.")
    if settings.default_upstream and settings.default_upstream not in known:
        raise SettingsError(f"'default_upstream' is '{settings.default_upstream}', which is not an upstream.")
    if not settings.effective_routes:
        raise SettingsError(
            "There are several upstreams and neither 'routes' nor 'default_upstream' says which to take."
        )


def _key_hash(tenant: str, key: SecretStr) -> bytes:
    value = key.get_secret_value()
    if not tenant or not value:
        raise SettingsError("In 'api_keys' a tenant or a key is empty.")
    if not value.startswith(_HASHED):
        return sha256(value.encode()).digest()
    try:
        digest = bytes.fromhex(value.removeprefix(_HASHED))
    except ValueError:
        digest = b""
    if len(digest) != sha256().digest_size:
        raise SettingsError(f"The key of '{tenant}' in 'api_keys' must have 64 hex digits behind sha256:.")
    return digest


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
