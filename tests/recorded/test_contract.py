"""What the builder makes, checked against the published contracts: OpenAI's document and Open Responses'."""

import os
from pathlib import Path

import pytest

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Item, Mark, Note, Open, Part, Text
from responses_ingress.core.replay import deltas_of
from tests.contract import Contract
from tests.core.shapes import (
    DONE,
    ENVELOPE,
    ERROR,
    QUEUED,
    Json,
    build,
    call,
    code_call,
    custom_call,
    mcp_call,
    message,
    parsed,
    reasoning,
    search_call,
    text_item,
)

VARIABLE = "RESPONSES_INGRESS_CONTRACT"
FOLDER = os.environ.get(VARIABLE)
if FOLDER is None and os.environ.get("CI"):
    pytest.fail(f"{VARIABLE} does not name the folder of contracts.", pytrace=False)
if FOLDER is None:
    pytest.skip(f"{VARIABLE} does not name the folder of contracts.", allow_module_level=True)

OPENAI = Contract(Path(FOLDER, "openapi-responses.json"))
OPEN_RESPONSES = Contract(Path(FOLDER, "openresponses-openapi.json"))

CITATION = {"type": "url_citation", "url": "https://a.example", "title": "A", "start_index": 0, "end_index": 1}
SCORED = [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]
SPOKEN: list[Delta] = [Accepted(), Open(0, message()), Part(0, "output_text"), Text(0, "a", SCORED), Note(0, CITATION)]
THOUGHT: Item = {**reasoning(), "summary": [{"type": "summary_text", "text": "thought"}], "encrypted_content": "e"}
CALLED: Item = {**call(), "arguments": "{}", "status": "completed"}

# What both contracts know. Open Responses has no other output items, and other names for raw reasoning.
COMMON: dict[str, list[Delta]] = {
    "nothing": [DONE],
    "text": [*SPOKEN, Close(0), DONE],
    "refusal": [Open(0, message()), Part(0, "refusal"), Text(0, "no"), Close(0), DONE],
    "summary": [*deltas_of([THOUGHT]), DONE],
    "call": [*deltas_of([text_item("hm"), CALLED]), DONE],
    "incomplete": [*SPOKEN, Finish("incomplete", reason="max_output_tokens")],
    "failed": [*SPOKEN, Finish("failed", error=ERROR)],
}
HOSTED: dict[str, list[Delta]] = {
    "raw reasoning": [Open(0, reasoning()), Part(0, "reasoning_text"), Text(0, "hm"), Close(0), DONE],
    "custom call": [*deltas_of([{**custom_call(), "input": "x", "status": "completed"}]), DONE],
    "code": [
        Open(0, code_call()),
        Mark(0, "response.code_interpreter_call.in_progress"),
        Text(0, "1+1"),
        Mark(0, "response.code_interpreter_call.interpreting"),
        Mark(0, "response.code_interpreter_call.completed"),
        Close(0),
        DONE,
    ],
    "mcp": [
        Open(0, mcp_call()),
        Mark(0, "response.mcp_call.in_progress"),
        Text(0, "{}"),
        Mark(0, "response.mcp_call.completed"),
        Close(0),
        DONE,
    ],
    "search": [Open(0, search_call()), Mark(0, "response.web_search_call.searching"), Close(0), DONE],
    "cancelled": [*SPOKEN, Finish("cancelled")],
}


def check(contract: Contract, deltas: list[Delta], envelope: Json) -> None:
    builder = build(deltas, envelope)
    for event in parsed(builder):
        contract.check_event(event)
    contract.check_response(builder.response())
    contract.check_response(build(deltas[:-1], envelope).response())


@pytest.mark.parametrize("envelope", [ENVELOPE, QUEUED], ids=["at once", "queued"])
@pytest.mark.parametrize("name", [*COMMON, *HOSTED])
def test_openai(name: str, envelope: Json) -> None:
    check(OPENAI, {**COMMON, **HOSTED}[name], envelope)


@pytest.mark.parametrize("envelope", [ENVELOPE, QUEUED], ids=["at once", "queued"])
@pytest.mark.parametrize("name", COMMON)
def test_open_responses(name: str, envelope: Json) -> None:
    check(OPEN_RESPONSES, COMMON[name], envelope)


@pytest.mark.parametrize("contract", [OPENAI, OPEN_RESPONSES], ids=["openai", "open responses"])
def test_the_check_can_fail(contract: Contract) -> None:
    event = parsed(build(COMMON["text"]))[4]
    contract.check_event(event)
    with pytest.raises(AssertionError, match="delta"):
        contract.check_event({key: value for key, value in event.items() if key != "delta"})
    with pytest.raises(AssertionError, match="not in the contract"):
        contract.check_event({**event, "type": "response.odd"})
    with pytest.raises(AssertionError, match="broken"):
        contract.check_response({**ENVELOPE, "created_at": "today"})
