"""Where tests keep what they fetch: real clients from npm and PyPI, installed once per version.

What must stay true: an install appears whole or not at all, also when several test workers start at
once; where its tool is missing a test is skipped, but fails in CI, where nothing may be left out.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

CACHE = "RESPONSES_INGRESS_TEST_CACHE"


def installed(name: str, install: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `install` fills it if it is not there yet."""
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "responses-ingress")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as made:
                install(Path(made) / name)
                (Path(made) / name).rename(target)
    return target


def tool(name: str) -> str:
    """The path of a program the test cannot do without."""
    path = shutil.which(name)
    return path if path is not None else missing(f"{name} is not installed.")


def fetch(*command: str) -> None:
    """Run an installer; where it fails (no network), the test is left out."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        missing(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def missing(reason: str) -> NoReturn:
    """Leave the test out; in CI, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
