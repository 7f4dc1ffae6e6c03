"""What the documents say is held against the program: settings, rooms, tables, fields, errors, examples, links."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from responses_ingress import errors
from responses_ingress.cli import _DRAIN, _KEEP_ALIVE, main
from responses_ingress.core.channels import FIELDS, PARTS
from responses_ingress.core.deltas import Delta
from responses_ingress.core.envelope import open_envelope
from responses_ingress.core.request import _MOST_NAME, KNOWN_FIELDS, parse_request
from responses_ingress.core.turn import Turn
from responses_ingress.dialects.chat import ChatOptions, encode
from responses_ingress.runs.metrics import Metrics
from responses_ingress.settings import PREFIX, Route, Settings, load
from responses_ingress.store.engine import read_engine, write_engine
from responses_ingress.store.tables import metadata
from responses_ingress.upstream_settings import Kind, Upstream
from responses_ingress.web.exchange import _MOST_VALUES
from responses_ingress.web.routes import _ROUTES
from tests.test_rooms import EVERYTHING, ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DEPLOYMENT = ROOT / "docs" / "deployment.md"
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def row(name: str, field: FieldInfo, *, variable: bool) -> str:
    """A setting's line in docs/configuration.md."""
    default = field.default
    if field.is_required():
        shown = "required"
    elif default is None or default in ((), {}):
        shown = "–"
    else:
        shown = f"`{default[0] if isinstance(default, tuple) else default}`"
    cells = [f"`{name}`", shown.replace("`True`", "`true`").replace("`False`", "`false`")]
    if variable:
        cells.append(f"`{PREFIX}{name.upper()}`")
    return f"| {' | '.join([*cells, (field.description or '').replace(chr(10), ' ')])} |"


def rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield row(name, field, variable=model is Settings)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", [*rows(Settings), *rows(Upstream), *rows(Route)])
def test_every_setting_is_described(line: str) -> None:
    assert line in CONFIGURATION.splitlines()


def test_no_setting_is_described_that_is_none() -> None:
    known = {name for model in (Settings, Upstream, Route) for name in model.model_fields}
    assert set(re.findall(r"^\| `(\w+)` \|", CONFIGURATION, re.MULTILINE)) == known


def test_the_configuration_example_loads(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "docs" / "configuration.md", "toml")
    (tmp_path / "c.toml").write_text(example, encoding="utf-8")
    settings = load(tmp_path / "c.toml", {}, {"OPENAI_API_KEY": "key"})
    assert len(settings.upstreams) == 2 and settings.routes and settings.default_upstream


@pytest.mark.parametrize("example", blocks(ROOT / "docs" / "backends.md", "toml"))
def test_the_examples_of_backends_load(tmp_path: Path, example: str) -> None:
    (tmp_path / "c.toml").write_text(example, encoding="utf-8")
    keys = dict.fromkeys(re.findall(r'api_key_env = "(\w+)"', example), "key")
    assert load(tmp_path / "c.toml", {}, keys).effective_routes


def test_every_kind_of_upstream_is_described() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `(\w+)`$", page, re.MULTILINE) == list(get_args(Kind))


@pytest.mark.parametrize("example", blocks(DEPLOYMENT, "toml"))
def test_the_examples_of_deployment_load(tmp_path: Path, example: str) -> None:
    (tmp_path / "c.toml").write_text(example, encoding="utf-8")
    assert load(tmp_path / "c.toml", {}, {f"{PREFIX}API_KEYS": '{"a": "key"}'}).upstreams


def test_the_times_and_sizes_of_deployment_fit_those_of_the_program() -> None:
    (nginx,), (unit,), defaults = blocks(DEPLOYMENT, "nginx"), blocks(DEPLOYMENT, "ini"), Settings()

    def told(text: str, pattern: str) -> int:
        (number,) = re.findall(pattern, text, re.MULTILINE)
        return int(number)

    assert told(nginx, r"client_max_body_size (\d+)m;") * 1024**2 == defaults.max_body
    assert told(nginx, r"proxy_read_timeout (\d+)h;") * 3600 > defaults.keepalive_interval
    assert told(nginx, r" keepalive_timeout (\d+)s;") < _KEEP_ALIVE
    outage = told(DEPLOYMENT.read_text(encoding="utf-8"), r"waits for it up to (\d+) s more")
    assert told(unit, r"^TimeoutStopSec=(\d+)$") > defaults.shutdown_grace + _DRAIN + outage


def test_the_connections_of_a_worker_are_those_of_the_program() -> None:
    url = "postgresql+asyncpg://u@h/d"
    pools = [engine.sync_engine.pool for engine in (write_engine(url), write_engine(url, spare=1), read_engine(url))]
    kept = [pool.size() for pool in pools]  # type: ignore[attr-defined]
    most = [size + pool._max_overflow for size, pool in zip(kept, pools, strict=True)]  # type: ignore[attr-defined]
    page = DEPLOYMENT.read_text(encoding="utf-8")
    shown = [[int(cell.strip("*")) for cell in row[1:]] for row in table(page, "## Connections to PostgreSQL")]
    assert shown == [*([a, b] for a, b in zip(kept, most, strict=True)), [1, 1], [sum(kept) + 1, sum(most) + 1]]
    assert f"hosts × workers × {sum(most) + 1}" in page


def test_the_metrics_of_deployment_are_those_of_the_program() -> None:
    exposed = Metrics().expose().decode()
    (row,) = [row for row in table(DEPLOYMENT.read_text(encoding="utf-8"), "## Watching it") if row[0] == "`/metrics`"]
    assert [name for name in code(row[1]) if f"# HELP {name.removesuffix('_total')}" not in exposed] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_well_formed(page: Path) -> None:
    for text in blocks(page, "toml"):
        tomllib.loads(text)
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for command in re.findall(r"responses-ingress (\w+)", page.read_text(encoding="utf-8")):
        assert command in main.commands, command


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    assert README.count("\n") <= 150
    run = "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/responses-ingress serve"
    assert README.splitlines().count(run) == 1
    assert len(re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)) == 1


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, row by row, without its head."""
    below = page[page.index(f"\n{heading}") :]
    (rows, *_) = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", below, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows.splitlines()]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_rooms_are_those_of_the_test_of_rooms() -> None:
    rooms = {code(room)[0]: (imports, set(code(imports))) for room, _, imports, _ in table(ARCHITECTURE, "## Rooms")}
    assert {room for room, (imports, _) in rooms.items() if imports == "everything"} == EVERYTHING
    assert {room: allowed for room, (_, allowed) in rooms.items() if room not in EVERYTHING} == {
        room: allowed - {room} for room, allowed in ROOMS.items()
    }


def test_the_deltas_are_those_of_the_program() -> None:
    shown = {code(row[0])[0] for row in table(ARCHITECTURE, "## Deltas become events")}
    assert shown == {f"{delta.__name__}({', '.join(delta.__dataclass_fields__)})" for delta in get_args(Delta)}


def test_the_channels_are_those_of_the_program() -> None:
    shown = [tuple(cell.strip("`") for cell in row) for row in table(ARCHITECTURE, "### How text streams")]
    channels = [*PARTS.items(), *FIELDS.items()]
    assert shown == [(name, c.place or "item", c.field, c.event, c.part or "–") for name, c in channels]


def test_the_tables_are_those_of_the_store() -> None:
    shown = {code(name)[0]: code(columns) for name, columns in table(ARCHITECTURE, "## Store")}
    assert shown == {table.name: table.columns.keys() for table in metadata.sorted_tables}


def all_tests() -> set[str]:
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_every_law_has_tests() -> None:
    tests = all_tests()
    named = re.findall(r"`(test_\w+)`", ARCHITECTURE)
    assert {f"test_law_{law}_" for law in range(1, 8)} <= set(named)
    assert [name for name in named if not any(test.startswith(name) for test in tests)] == []


def test_every_promise_names_tests_that_exist() -> None:
    durability = (ROOT / "docs" / "durability.md").read_text(encoding="utf-8")
    tests = all_tests()
    named = re.findall(r"`(test_\w+)`", durability)
    assert [name for name in named if not any(test.startswith(name) for test in tests)] == []


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in _ROUTES])
def test_every_endpoint_is_described(method: str, path: str) -> None:
    assert f"`{method} {path.replace(':path', '')}`" in [row[0] for row in table(API, "## Endpoints")]


LEAST = {"model": "m", "input": "hi", "tools": [{"type": "function", "name": "f"}]}
SAMPLES: dict[str, Any] = {
    "model": "n",
    "input": "ho",
    "instructions": "Be brief.",
    "previous_response_id": "resp_1",
    "store": False,
    "background": True,
    "stream": True,
    "stream_options": {"include_obfuscation": True},
    "include": ["message.output_text.logprobs"],
    "metadata": {"key": "value"},
    "tools": [{"type": "function", "name": "g"}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "max_output_tokens": 100,
    "max_tool_calls": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "top_logprobs": 3,
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "low"},
    "truncation": "auto",
    "context_management": [{"type": "compaction"}],
    "service_tier": "flex",
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "auto"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "somebody",
    "user": "somebody",
    "moderation": {"model": "m"},
    "access_programs": {"some": "program"},
    "image": {"some": "image"},
    "client_metadata": {"some": "client"},
}
"""Each field with a value that could make a difference. Those that are missing are refused."""


def fates() -> dict[str, set[str]]:
    """What docs/api.md says of each field of the request."""
    return {code(field)[0]: set(fate.split(", ")) for field, fate, *_ in table(API, "### Fields")}


def test_every_field_of_the_request_is_described() -> None:
    assert fates().keys() == KNOWN_FIELDS
    assert {field for field, fate in fates().items() if fate == {"refused"}} == KNOWN_FIELDS - SAMPLES.keys()


@pytest.mark.parametrize("field", SAMPLES)
def test_a_field_of_the_request_fares_as_described(field: str) -> None:
    before, after = (parse_request(body) for body in (LEAST, {**LEAST, field: SAMPLES[field]}))
    fate = fates()[field]
    assert fate <= {"honoured", "forwarded", "echoed", "ignored"}
    assert (open_envelope(before, "resp", 0) != open_envelope(after, "resp", 0)) == ("echoed" in fate)
    calls = [
        encode(
            Turn(
                "resp",
                "thread",
                request.model,
                instructions=request.instructions,
                new=request.input,
                tools=request.tools,
                tool_choice=request.body.get("tool_choice", "auto"),
                parameters=request.body,
                stream=request.stream,
            ),
            ChatOptions(),
        ).body
        for request in (before, after)
    ]
    assert (calls[0] != calls[1]) == ("forwarded" in fate)


def test_every_field_of_the_response_is_described() -> None:
    shown = [name for field, _ in table(API, "## The response object") for name in code(field)]
    assert sorted(shown) == sorted(open_envelope(parse_request(LEAST), "resp", 0))


def sent(error: type[errors.IngressError] = errors.IngressError) -> Iterator[type[errors.IngressError]]:
    """The errors that reach clients."""
    unsent = (
        errors.StaleWriter,
        errors.Cancelled,
        errors.PlacementOutdated,
        errors.ResponseRunning,
        errors.SettingsError,
    )
    if error not in unsent:
        yield error
        for kind in error.__subclasses__():
            yield from sent(kind)


def test_the_fixed_limits_are_those_of_the_program() -> None:
    limits = [row[1] for row in table(API, "## Limits")]
    assert {f"{_MOST_VALUES:,}", f"{_MOST_NAME} characters"} <= set(limits)


def test_every_error_is_described() -> None:
    shown = {(int(row[0]), row[1].strip("`")) for row in table(API, "## Errors")}
    assert {(error.status, error.code or "–") for error in sent()} <= shown
    for error in (errors.Cancelled, errors.SettingsError):
        assert f"`{error.code}`" in API
