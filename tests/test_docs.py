"""What the documents say is held against the program: settings, commands, examples, links."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from responses_ingress.cli import main
from responses_ingress.settings import PREFIX, Route, Settings, Upstream, load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


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
