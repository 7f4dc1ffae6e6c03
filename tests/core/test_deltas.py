"""The journal form of deltas."""

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from responses_ingress.core.deltas import Accepted, Close, Delta, Finish, Note, Open, Part, Text, decode, encode
from tests.core.shapes import DONE, ENVELOPE, any_delta, build, legal_deltas, message, text_item


@given(st.lists(any_delta, max_size=12))
def test_decode_gives_back_what_was_encoded(deltas: list[Delta]) -> None:
    assert decode(encode(deltas)) == deltas


@settings(max_examples=30)
@given(legal_deltas(), st.data())
def test_a_journal_in_any_batches_builds_the_same_bytes(deltas: list[Delta], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(deltas)))
    again = [*decode(encode(deltas[:cut])), *decode(encode(deltas[cut:]))]
    assert build(again).take() == build(deltas).take()


def test_no_deltas_are_an_empty_array() -> None:
    assert encode([]) == b"[]"
    assert decode(b"[]") == []


def test_a_run_of_text_costs_three_bytes_a_token() -> None:
    deltas: list[Delta] = [Text(0, f" word{number:03}") for number in range(1000)]
    assert len(encode(deltas)) - sum(len(f" word{number:03}") for number in range(1000)) < 3 * 1000 + 20


def test_a_lone_text_costs_at_most_twenty_bytes() -> None:
    assert len(encode([Text(7, "hello")])) - len("hello") <= 20


def test_borders_of_events_survive() -> None:
    deltas: list[Delta] = [Text(0, "a"), Text(0, ""), Text(0, "b"), Text(1, "c"), Text(0, "d")]
    assert orjson.loads(encode(deltas)) == [["t", 0, ["a", "", "b"]], ["t", 1, ["c"]], ["t", 0, ["d"]]]
    assert decode(encode(deltas)) == deltas


def test_text_with_logprobs_stands_alone() -> None:
    deltas: list[Delta] = [Text(0, "a"), Text(0, "b", [{"token": "b"}]), Text(0, "c", []), Text(0, "d")]
    assert decode(encode(deltas)) == deltas


def test_text_on_both_sides_of_another_delta_is_not_joined() -> None:
    deltas: list[Delta] = [Text(0, "a"), Note(0, {"type": "x"}), Text(0, "b")]
    assert decode(encode(deltas)) == deltas


def test_indexes_of_final_items_stay_numbers() -> None:
    finish = Finish("completed", items={0: text_item("a"), 12: text_item("b")}, echo={"model": "m"}, at=3)
    assert decode(encode([finish])) == [finish]
    assert decode(encode([Finish("completed", items={})])) == [Finish("completed", items={})]


def test_a_whole_answer() -> None:
    deltas: list[Delta] = [Accepted(), Open(0, message()), Part(0, "output_text"), Text(0, "hi"), Close(0), DONE]
    again = build(decode(encode(deltas)), ENVELOPE)
    assert again.output == [text_item("hi")]
