"""Sealed content goes back to its own backend only."""

import pytest

from responses_ingress.dialects.sealed import seal, unseal


@pytest.mark.parametrize("content", ["E", "", "claude:E", '{"a":1}'])
def test_a_backend_gets_back_what_it_sealed(content: str) -> None:
    sealed = seal("claude", content)
    assert sealed == f"claude:{content}"
    assert unseal("claude", sealed) == content


@pytest.mark.parametrize("content", [None, "", "E", "claude", "claude2:E", "openai:claude:E", "Claude:E"])
def test_what_another_made_is_not_unsealed(content: str | None) -> None:
    assert unseal("claude", content) is None
