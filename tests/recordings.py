"""Recorded provider traffic, where the environment says that there is some: one HTTP exchange a file."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.upstream import Reply, Stream

VARIABLE = "RESPONSES_INGRESS_RECORDINGS"

Json = dict[str, Any]


@cache
def recordings(folder: str) -> dict[str, Json]:
    """The exchanges of a folder, by name, in the order they were made. Called by a module of tests when it is
    loaded: without recordings that module is left out; in CI it fails."""
    root = os.environ.get(VARIABLE)
    if root is None and os.environ.get("CI"):
        pytest.fail(f"{VARIABLE} does not name the folder of recordings.", pytrace=False)
    if root is None:
        pytest.skip(f"{VARIABLE} does not name the folder of recordings.", allow_module_level=True)
    return {path.stem: orjson.loads(path.read_bytes()) for path in sorted(Path(root, folder).glob("*.json"))}


def replayed(recording: Mapping[str, Any]) -> Reply | Stream:
    """The answer as it came."""
    if "stream" in recording:
        return Stream([recording["stream"].encode()], close="end")
    headers = {name: value for name, value in recording["headers"].items() if name == "retry-after"}
    return Reply(recording["body"], status=recording["status"], headers=headers)


def final_response(recording: Mapping[str, Any]) -> Json:
    """The response object that a recording of a Responses server ends in."""
    if "body" in recording:
        body: Json = recording["body"]
        return body
    lines = [line for line in recording["stream"].split("\n") if line.startswith("data: {")]
    response: Json = orjson.loads(lines[-1].removeprefix("data: "))["response"]
    return response
