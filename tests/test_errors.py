"""The error tree: that it is drawn as it is, and what a client gets of it."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from responses_ingress import errors
from responses_ingress.errors import IngressError, InvalidValue, PlacementOutdated, ResponseRunning, UpstreamError

_LINE = re.compile(r"    (?P<lead>[ │├└─]*)(?P<name>[A-Z]\w+)(?: +(?P<status>\d{3}))?(?: +(?P<rest>.*))?")


@dataclass(frozen=True)
class Drawn:
    """A line of the tree in the module's docstring."""

    name: str
    parent: str | None
    status: int | None
    words: str


def drawn() -> Iterator[Drawn]:
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        path[len(match["lead"]) // 4 :] = [match["name"]]
        status = int(match["status"]) if match["status"] else None
        yield Drawn(match["name"], path[-2] if len(path) > 1 else None, status, match["rest"] or "")


def descendants(root: type[IngressError]) -> Iterator[type[IngressError]]:
    yield root
    for child in root.__subclasses__():
        yield from descendants(child)


CLASSES = {kind.__name__: kind for kind in descendants(IngressError) if kind.__module__ == errors.__name__}


def make(kind: type[IngressError]) -> IngressError:
    if issubclass(kind, PlacementOutdated):
        return kind()
    if issubclass(kind, ResponseRunning):
        return kind("resp_1")
    return kind("It broke.")


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    classes = {name: None if kind is IngressError else kind.__mro__[1].__name__ for name, kind in CLASSES.items()}
    assert {line.name: line.parent for line in drawn()} == classes


def test_the_module_holds_no_other_error() -> None:
    found = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert found == set(CLASSES)


@pytest.mark.parametrize("line", list(drawn()), ids=lambda line: line.name)
def test_a_line_of_the_tree_tells_status_and_code_as_they_are(line: Drawn) -> None:
    kind = CLASSES[line.name]
    inherited = CLASSES[line.parent].status if line.parent else kind.status
    assert kind.status == (line.status or inherited)
    codes = re.findall(r"^[a-z]+(?:_[a-z]+)+|^cancelled", line.words)
    assert codes in ([], [kind.code])
    if "no code" in line.words:
        assert kind.code is None


@pytest.mark.parametrize("kind", list(CLASSES.values()), ids=list(CLASSES))
def test_every_body_has_the_four_keys(kind: type[IngressError]) -> None:
    error = make(kind)
    body = error.body()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"] == str(error) != ""
    assert isinstance(body["error"]["type"], str)


@pytest.mark.parametrize("kind", list(CLASSES.values()), ids=list(CLASSES))
def test_the_error_of_a_failed_response_always_has_a_code(kind: type[IngressError]) -> None:
    error = make(kind)
    detail = error.detail()
    assert list(detail) == ["code", "message"]
    assert detail["code"]
    assert detail["message"] == error.message


def test_what_a_client_can_mend_is_a_400_and_is_called_its_own() -> None:
    for kind in descendants(errors.InvalidRequest):
        assert (kind.status, kind.type) == (400, "invalid_request_error")


def test_an_error_can_name_its_field_and_a_code_of_its_own() -> None:
    error = InvalidValue("Too small.", param="top_p", code="decimal_below_min_value")
    assert error.body()["error"] == {
        "message": "Too small.",
        "type": "invalid_request_error",
        "param": "top_p",
        "code": "decimal_below_min_value",
    }
    assert InvalidValue("Wrong.").code == "invalid_value"


def test_an_upstream_error_passes_on_the_upstreams_status_and_delay() -> None:
    error = UpstreamError("Slow down.", status=429, code="rate_limit_exceeded", retry_after=7)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", 7)
    assert (UpstreamError.status, UpstreamError.code) == (502, "upstream_error")


def test_what_runs_still_is_named() -> None:
    assert errors.ThreadBusy("resp_1").running == "resp_1"
