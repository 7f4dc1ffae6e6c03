import pytest

from responses_ingress.backends.base import Route, find_route
from responses_ingress.errors import ModelNotFound
from responses_ingress.testing import ScriptedBackend

ONE, TWO = ScriptedBackend(name="one"), ScriptedBackend(name="two")


@pytest.mark.parametrize(
    ("pattern", "model", "matches"),
    [
        ("gpt-5", "gpt-5", True),
        ("gpt-5", "gpt-5-mini", False),
        ("gpt-5", "GPT-5", False),
        ("gpt-*", "gpt-5", True),
        ("gpt-*", "gpt-", True),
        ("*", "anything/at all", True),
        ("*-mini", "gpt-5-mini", True),
        ("vendor/*", "vendor/deep/model", True),
        ("gpt-?", "gpt-5", True),
        ("gpt-?", "gpt-50", False),
        ("gpt-[45]", "gpt-4", True),
        ("gpt-[45]", "gpt-3", False),
        ("gpt-[!45]", "gpt-3", True),
    ],
)
def test_a_pattern_is_matched_as_a_whole_and_to_the_letter(pattern: str, model: str, matches: bool) -> None:
    routes = [Route(pattern, ONE)]
    if matches:
        assert find_route(routes, model) == (ONE, model)
        return
    with pytest.raises(ModelNotFound):
        find_route(routes, model)


def test_the_first_pattern_that_matches_wins() -> None:
    routes = [Route("gpt-5-mini", ONE), Route("gpt-*", TWO), Route("gpt-5", ONE)]
    assert find_route(routes, "gpt-5-mini")[0] is ONE
    assert find_route(routes, "gpt-5")[0] is TWO


def test_a_route_may_give_the_upstreams_own_name() -> None:
    routes = [Route("small", ONE, "vendor/small-1"), Route("*", TWO, "vendor/big-1")]
    assert find_route(routes, "small") == (ONE, "vendor/small-1")
    assert find_route(routes, "else") == (TWO, "vendor/big-1")


def test_a_model_without_a_route_is_refused_in_the_recorded_form() -> None:
    with pytest.raises(ModelNotFound) as refused:
        find_route([Route("gpt-*", ONE)], "o3")
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "model_not_found", "model")
    assert refused.value.message == "The requested model 'o3' does not exist."


def test_a_name_as_long_as_a_book_is_not_repeated() -> None:
    with pytest.raises(ModelNotFound) as refused:
        find_route([], "x" * 100_000)
    assert len(refused.value.message) < 250
