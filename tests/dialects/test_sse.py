"""The SSE parser: every way of writing and cutting a stream gives the same events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from responses_ingress.dialects.sse import Parser, ServerEvent, frame
from responses_ingress.errors import UpstreamInvalid


def parse(*chunks: bytes) -> list[ServerEvent]:
    parser = Parser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [(None, b"a")]),
        (b"data:a\n\n", [(None, b"a")]),
        (b"data:  a\n\n", [(None, b" a")]),
        (b"event: x\ndata: a\n\n", [("x", b"a")]),
        (b"data: a\nevent: x\n\n", [("x", b"a")]),
        (b"event: x\ndata: a\n\ndata: b\n\n", [("x", b"a"), (None, b"b")]),
        (b"event:\ndata: a\n\n", [(None, b"a")]),
        (b"data: a\ndata: b\n\n", [(None, b"a\nb")]),
        (b"data: a\ndata\n\n", [(None, b"a\n")]),
        (b": PROCESSING\n\ndata: a\n\n", [(None, b"a")]),
        (b": note\ndata: a\n: note\n\n", [(None, b"a")]),
        (b"\n\n\ndata: a\n\n\n\n", [(None, b"a")]),
        (b"event: x\n\ndata: a\n\n", [(None, b"a")]),
        (b"data: \n\ndata\n\nevent: x\ndata:\n\n", []),
        (b"id: 1\nretry: 3\nother: y\ndata: a\n\n", [(None, b"a")]),
        (b"data: a:b\n\n", [(None, b"a:b")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [(None, b"a")]),
        (b"event: \xff\ndata: a\n\n", [("\N{REPLACEMENT CHARACTER}", b"a")]),
        (b"data: a\n\ndata: left without its blank line\n", [(None, b"a")]),
        (b"", []),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_form_whole_and_byte_by_byte(stream: bytes, events: list[ServerEvent], end: bytes) -> None:
    sent = stream.replace(b"\n", end)
    assert parse(sent) == events
    assert parse(*(sent[i : i + 1] for i in range(len(sent)))) == events


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\r\n\r") == [(None, b"a")]
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: b\r\n\r\n") == [(None, b"b")]


def test_size_of_one_event_is_bounded() -> None:
    parser = Parser(limit=10)
    assert parser.feed(b"data: abcd\n\n" * 3) == [(None, b"abcd")] * 3
    with pytest.raises(UpstreamInvalid):
        parser.feed(b"data: abcde\n\n")
    parser = Parser(limit=10)
    parser.feed(b"data: ")
    with pytest.raises(UpstreamInvalid):
        parser.feed(b"abcde")


LINES = st.sampled_from(
    [
        b"data: a",
        b"data:{}",
        b"data",
        b"data: ",
        b"event: x",
        b"event",
        b": c",
        b"",
        b"",
        b"id: 7",
        b"\xc3\xa4: b",
        b"x",
    ]
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(
    lines=st.lists(st.tuples(LINES, ENDS), max_size=30),
    bom=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_cuts_do_not_matter(lines: list[tuple[bytes, bytes]], bom: bool, cuts: list[int]) -> None:
    stream = (b"\xef\xbb\xbf" if bom else b"") + b"".join(line + end for line, end in lines)
    borders = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    assert parse(*chunks) == parse(stream) == reference(stream)


def reference(stream: bytes) -> list[ServerEvent]:
    """The same by the letter of the standard, line by line, but for data that is empty."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events: list[ServerEvent] = []
    name, data = b"", b""
    for line in text.split(b"\n")[:-1]:
        field, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if field == b"data":
            data += value + b"\n"
        elif field == b"event":
            name = value
        elif not line:
            if data[:-1]:
                events.append((name.decode() or None, data[:-1]))
            name, data = b"", b""
    return events


def test_frame_is_read_back() -> None:
    framed = frame("response.created", b'{"type":"response.created"}')
    assert framed == b'event: response.created\ndata: {"type":"response.created"}\n\n'
    assert parse(framed) == [("response.created", b'{"type":"response.created"}')]
