"""The house rules that a machine can hold: who may import whom, and how big a thing may grow.

The table is the one of docs/architecture.md. Imports inside functions and under TYPE_CHECKING count.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "responses_ingress"
FILES = sorted(PACKAGE.rglob("*.py"))

ALWAYS = {"errors", "ids"}
ROOMS = {
    "core": {"core"},
    "dialects": {"core", "dialects"},
    "store": {"core", "store"},
    "backends": {"core", "dialects", "backends"},
    "runs": {"core", "store", "runs", "backends.base"},
    "web": {"core", "dialects", "runs", "store", "web"},
    "testing": {"core", "backends.base"},
    "settings": set(),
    "errors": set(),
    "ids": set(),
    "serving": set(),
}
EVERYTHING = {"app", "cli"}
PURE = {"core", "dialects"}
IMPURE = {"aiohttp", "alembic", "asyncio", "datetime", "os", "random", "secrets", "socket", "sqlalchemy", "starlette"}
IMPURE |= {"time", "uuid", "uvicorn"}
HTTP = {"aiohttp", "http", "starlette", "uvicorn"}
NOT_A_ROOM = {"utils", "common", "services", "managers", "schemas"}


def module_name(path: Path) -> str:
    """`store.engine` for responses_ingress/store/engine.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in FILES if path.name != "__init__.py"}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports; of ours, the modules and not the names inside them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name.removeprefix("responses_ingress.") in MODULES]
            yield from modules or [node.module]


def ours(path: Path) -> set[str]:
    prefix = "responses_ingress."
    return {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = room_of(module)
    if room in EVERYTHING:
        return
    allowed = ROOMS[room] | (ALWAYS if room not in ("errors", "ids") else set())
    for other in ours(MODULES[module]):
        assert room_of(other) in allowed or other in allowed, f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in PURE))
def test_a_pure_room_knows_no_outside(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & IMPURE


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in {"store", "runs"}))
def test_the_store_and_the_runs_know_no_http(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & HTTP


def test_only_the_settings_read_the_environment() -> None:
    readers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= {"settings", "cli"}


def test_there_is_no_import_cycle() -> None:
    graph = {name: ours(path) & MODULES.keys() for name, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_every_folder_is_a_room_and_no_room_has_rooms() -> None:
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        assert len(parts) <= 2, f"{path}: a room inside a room"
        assert parts[0].removesuffix(".py") in ROOMS.keys() | EVERYTHING | {"__init__"}, path
        assert not {Path(part).stem for part in parts} & NOT_A_ROOM, path


@pytest.mark.parametrize("room", sorted(name for name in ROOMS if (PACKAGE / name).is_dir()))
def test_a_room_has_at_most_thirteen_files_and_exports_nothing(room: str) -> None:
    assert len([path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py"]) <= 13
    assert (PACKAGE / room / "__init__.py").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("folder", ["responses_ingress", "tests", "migrations"])
def test_no_file_is_longer_than_six_hundred_lines(folder: str) -> None:
    long = [path for path in (ROOT / folder).rglob("*.py") if path.read_text(encoding="utf-8").count("\n") > 600]
    assert not long


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent
