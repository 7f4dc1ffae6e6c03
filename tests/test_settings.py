import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from responses_ingress.errors import SettingsError
from responses_ingress.settings import Route, Settings, load
from responses_ingress.upstream_settings import Upstream

TWO = {"upstreams": {"a": {"url": "http://a/v1"}, "b": {"url": "http://b/v1/"}}, "default_upstream": "a"}


def variables(**given: str) -> dict[str, str]:
    return {f"RESPONSES_INGRESS_{name.upper()}": value for name, value in given.items()}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_it_is_an_echo_on_loopback() -> None:
    settings = load(None, {}, {})
    assert (settings.host, settings.port, settings.async_database_url, settings.migrates) == (
        "127.0.0.1",
        8080,
        "sqlite+aiosqlite:///responses_ingress.db",
        True,
    )
    assert settings.effective_upstreams == {"echo": Upstream(kind="echo")}
    assert settings.effective_routes == (Route(model="*", upstream="echo"),)
    assert settings.key_hashes == ()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "host = '127.0.0.2'\nport = 1\nmax_runs = 1\nstrict = true\n")
    settings = load(file, {"port": 3, "workers": None}, variables(port="2", max_runs="2"))
    assert (settings.port, settings.max_runs, settings.host, settings.strict, settings.workers) == (
        3,
        2,
        "127.0.0.2",
        True,
        1,
    )


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "port = 7")
    assert load(None, {}, variables(config=str(file))).port == 7


def test_the_environment_reaches_into_one_upstream_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path / "c.toml", "[upstreams.vllm]\nurl = 'http://a/v1'\nread_timeout = 5\n")
    environ = variables(upstreams__vllm__url="http://b/v1", upstreams__vllm__forward='["seed"]')
    assert load(file, {}, environ).upstreams == {
        "vllm": Upstream(url="http://b/v1", read_timeout=5, forward=("seed",)),
    }


def test_an_empty_variable_is_none() -> None:
    assert load(None, {}, variables(upstream="", port="")).port == 8080


def test_the_test_suites_own_variables_are_let_be() -> None:
    assert load(None, {}, variables(recordings="/r", contract="/c", test_cache="/t", test_postgres="p")).port == 8080


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (variables(prot="1"), "RESPONSES_INGRESS_PROT names no setting"),
        (variables(port__x="1"), "RESPONSES_INGRESS_PORT__X names no setting"),
        (variables(port="many"), "'port' is wrong"),
        (variables(routes="x"), '"routes"'),
        (variables(upstreams__a__nope="1"), "Unknown setting 'upstreams.a.nope'"),
        (variables(api_keys="[]"), "'api_keys' is wrong"),
        (variables(config="/no/such/file"), "/no/such/file cannot be read"),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(None, {}, environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "Unknown setting 'prot'"),
        ("[upstreams.a]\nurll = 'x'", "Unknown setting 'upstreams.a.urll'"),
        ("[[routes]]\nmodel = '*'", "'routes.0.upstream' is wrong"),
        ("port = ", "is malformed"),
        ("flush_interval = -1", "'flush_interval' is wrong"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(written(tmp_path / "c.toml", text), {}, {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend": "chat"}, "'upstream' must give the address"),
        ({"upstream": "http://a"}, "'backend' must say what is there"),
        ({"backend": "echo", "upstream": "http://a"}, "'backend' must say what is there"),
        ({"backend": "chat", "upstream": "localhost:1"}, "must begin with http://"),
        (TWO | {"backend": "echo"}, "'upstreams' is given too"),
        (TWO | {"routes": [{"model": "x", "upstream": "c"}]}, "leads to 'c'"),
        (TWO | {"default_upstream": "c"}, "'default_upstream' is 'c'"),
        (TWO | {"default_upstream": None}, "neither 'routes' nor 'default_upstream'"),
        ({"default_upstream": "c"}, "'default_upstream' is 'c'"),
        ({"upstreams": {"a": {}}}, "'upstreams.a' is of kind chat, which needs a 'url'"),
        ({"upstreams": {"a": {"url": "ftp://a"}}}, "'upstreams.a.url' must begin"),
        ({"upstreams": {"a": {"kind": "echo", "url": "http://a"}}}, "kind echo, which takes no"),
        ({"upstreams": {"a": {"url": "http://a", "api_key_env": "K", "pass_bearer": True}}}, "both"),
        ({"upstreams": {"a": {"url": "http://a", "api_key_env": "KEY"}}}, "KEY, which is not set"),
        ({"upstreams": {"a": {"kind": "echo", "tools": "native"}}}, "takes no 'tools'"),
        ({"upstreams": {"a": {"kind": "responses"}}}, "kind responses, which needs a 'url'"),
        ({"upstreams": {"a": {"url": "http://a", "chain": True}}}, "takes no 'chain'. It is an option of responses."),
        (
            {"upstreams": {"a": {"kind": "messages", "url": "http://a", "item_ids": False}}},
            "takes no 'item_ids'. It is an option of background, responses.",
        ),
        ({"upstreams": {"a": {"kind": "background", "url": "http://a", "retries": 1}}}, "takes no 'retries'"),
        ({"upstreams": {"a": {"kind": "background", "url": "http://a", "on_disconnect": "cancel"}}}, "'on_disconnect'"),
        ({"upstreams": {"a": {"kind": "background", "url": "http://a", "pass_bearer": True}}}, "keys of clients"),
        ({"upstreams": {"a": {"kind": "background", "url": "http://a", "first_poll": 31}}}, "longer than its"),
        ({"upstreams": {"a": {"kind": "background", "url": "http://a", "cancel_timeout": 6}}}, "less than or equal"),
        ({"upstreams": {"a": {"url": "http://a", "system": "user"}}}, "which only messages knows"),
        ({"upstreams": {"a:b": {"url": "http://a"}}}, "must not hold a colon, as 'a:b' does"),
        ({"upstreams": {"a": {"url": "https://a", "ca_file": "/no/such.pem"}}}, "cannot be used: No such file"),
        ({"upstreams": {"a": {"url": "https://a", "ca_file": __file__}}}, "cannot be used: it holds no cert"),
        ({"backend": "messages"}, "'backend' is messages, so 'upstream' must give"),
        ({"admins": ["a"]}, "'admins' names 'a', which is no tenant"),
        ({"host": "0.0.0.0"}, "'host' is 0.0.0.0"),
        ({"host": "example.org"}, "'host' is example.org"),
        ({"database_url": "mysql://x"}, "'database_url' must begin"),
        ({"database_url": "sqlite://"}, "must name a file"),
        ({"database_url": "sqlite:///:memory:"}, "must name a file"),
        ({"api_keys": {"a": []}}, "'api_keys.a' is wrong"),
        ({"api_keys": {"a": ""}}, "is empty"),
        ({"api_keys": {"": "key"}}, "is empty"),
        ({"api_keys": {"a": "key", "b": "key"}}, "stands twice"),
        ({"api_keys": {"a": "sha256:12"}}, "64 hex digits"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(None, given, {})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.9", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert load(None, {"host": host}, {}).key_hashes == ()


@pytest.mark.parametrize("more", [{"insecure": True}, {"api_keys": {"a": "key"}}])
def test_keys_or_insecure_open_the_server(more: dict[str, Any]) -> None:
    assert load(None, {"host": "0.0.0.0", **more}, {}).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("url", "full", "migrates"),
    [
        ("sqlite:////x/y.db", "sqlite+aiosqlite:////x/y.db", True),
        ("sqlite+aiosqlite:///y.db", "sqlite+aiosqlite:///y.db", True),
        ("postgresql://u:p@h/d", "postgresql+asyncpg://u:p@h/d", False),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+asyncpg://u:p@h/d", False),
    ],
)
def test_the_driver_is_ours(url: str, full: str, migrates: bool) -> None:
    settings = load(None, {"database_url": url}, {})
    assert (settings.async_database_url, settings.migrates) == (full, migrates)
    assert load(None, {"database_url": url, "auto_migrate": not migrates}, {}).migrates is not migrates


def test_the_short_form_is_one_upstream_for_every_model() -> None:
    settings = load(None, {"backend": "chat", "upstream": "http://127.0.0.1:11434/v1/"}, {})
    assert settings.effective_upstreams == {"default": Upstream(url="http://127.0.0.1:11434/v1")}
    assert settings.effective_routes == (Route(model="*", upstream="default"),)


@pytest.mark.parametrize("kind", ["responses", "background", "messages"])
def test_the_short_form_is_good_for_every_kind(kind: Any) -> None:
    settings = load(None, {"backend": kind, "upstream": "http://a/v1"}, {})
    assert settings.effective_upstreams == {"default": Upstream(kind=kind, url="http://a/v1")}


def test_every_kind_takes_its_options() -> None:
    common: dict[str, Any] = {"url": "https://a/v1", "max_concurrent": 2, "max_waiting": 0, "tools": "emulated"}
    kinds: dict[str, dict[str, Any]] = {
        "chat": {"system": "leading", "reasoning": "text", "retries": 2},
        "responses": {"chain": True, "on_disconnect": "continue"},
        "background": {"completion_window": "24h", "idempotency": True, "item_ids": True},
        "messages": {"system": "user", "thinking": "budget", "authorization": "bearer"},
    }
    upstreams = {kind: {"kind": kind, **common, **more} for kind, more in kinds.items()}
    settings = load(None, {"upstreams": upstreams, "default_upstream": "chat"}, {})
    again = load(None, {}, settings.to_environment())
    assert again.upstreams == settings.upstreams == {kind: Upstream(**given) for kind, given in upstreams.items()}


def test_admins_are_tenants() -> None:
    assert load(None, {"api_keys": {"ops": "key"}, "admins": ["ops"]}, {}).admins == ("ops",)


def test_routes_come_before_the_default() -> None:
    route = {"model": "gpt-*", "upstream": "b", "upstream_model": "qwen3"}
    assert load(None, TWO | {"routes": [route]}, {}).effective_routes == (
        Route(**route),
        Route(model="*", upstream="a"),
    )


def test_a_single_upstream_takes_every_model_unless_routes_say_which() -> None:
    one = {"upstreams": {"a": {"url": "http://a"}}}
    assert load(None, one, {}).effective_routes == (Route(model="*", upstream="a"),)
    routed = load(None, one | {"routes": [{"model": "x", "upstream": "a"}]}, {})
    assert routed.effective_routes == (Route(model="x", upstream="a"),)


def test_keys_are_hashes_of_what_tenants_send() -> None:
    given = {"acme": ["one", "two"], "zeta": f"sha256:{sha256(b'three').hexdigest()}"}
    assert load(None, {}, variables(api_keys=json.dumps(given))).key_hashes == (
        ("acme", sha256(b"one").digest()),
        ("acme", sha256(b"two").digest()),
        ("zeta", sha256(b"three").digest()),
    )


@pytest.mark.parametrize(("name", "text"), [("k.json", '{"b": ["two"]}'), ("k.toml", "b = 'two'")])
def test_a_file_adds_keys(tmp_path: Path, name: str, text: str) -> None:
    file = written(tmp_path / name, text)
    settings = load(None, {"api_keys": {"a": "one"}, "api_keys_file": str(file)}, {})
    assert [tenant for tenant, _ in settings.key_hashes] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"), [("[]", "must hold an object"), ("{", "is malformed"), ('{"a": "two"}', "tenant 'a' stands both")]
)
def test_a_wrong_file_of_keys_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = written(tmp_path / "k.json", text)
    with pytest.raises(SettingsError, match=says):
        load(None, {"api_keys": {"a": "one"}, "api_keys_file": file}, {})


def secretive(extra: dict[str, str]) -> Settings:
    upstream = {"url": "http://a", "api_key_env": "KEY", "headers": {"x": "secret-1"}}
    given = {"api_keys": {"a": "secret-2"}, "database_url": "postgresql://u:secret-3@h/d", "upstreams": {"a": upstream}}
    return load(None, given, {"KEY": "secret-4"} | extra)


def test_no_secret_is_shown() -> None:
    assert "secret" not in repr(secretive({}))


def test_an_upstreams_key_comes_from_the_environment() -> None:
    assert secretive({}).upstreams["a"].api_key == "secret-4"


def test_an_error_does_not_repeat_the_value() -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, {}, variables(api_keys='{"a": {"secret": 1}}'))
    assert "secret" not in caught.value.message


def test_settings_travel_through_the_environment() -> None:
    settings = secretive(variables(strict="true", routes='[{"model": "x", "upstream": "a"}]'))
    environ = settings.to_environment()
    again = load(None, {}, environ | {"KEY": "secret-4"})
    assert "secret-2" not in json.dumps(environ)
    assert again.key_hashes == settings.key_hashes
    assert again.model_dump(exclude={"api_keys"}) == settings.model_dump(exclude={"api_keys"})
    assert load(None, {}, {}).to_environment() == {}


def test_loaded_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(None, {}, {}).port = 1


def test_a_password_in_an_address_is_not_shown() -> None:
    url = "http://me:hidden@a/v1"
    for settings in (Settings(upstreams={"a": Upstream(url=url)}), Settings(backend="chat", upstream=url)):
        assert "hidden" not in repr(settings)
    assert "hidden" not in repr(Settings(backend="chat", upstream=url).effective_upstreams)
