"""Content of items as blocks of a message, and what is refused."""

from typing import Any

import orjson
import pytest

from responses_ingress.dialects.messages_content import blocks_of, text_block, thought_of
from responses_ingress.errors import InvalidRequest

Json = dict[str, Any]

PDF = "data:application/pdf;base64,JVBERg=="


def source(kind: str, media: str, data: str) -> Json:
    return {"type": kind, "media_type": media, "data": data}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", [text_block("hi")]),
        (
            [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": " "}, "c", {}],
            [text_block("a")],
        ),
        (
            [{"type": "input_image", "image_url": "data:image/png;base64,QQ==", "detail": "low"}],
            [{"type": "image", "source": source("base64", "image/png", "QQ==")}],
        ),
        (
            [{"type": "input_image", "image_url": "https://x/y.png"}],
            [{"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}],
        ),
        (
            [{"type": "input_file", "filename": "a.pdf", "file_data": PDF}],
            [{"type": "document", "source": source("base64", "application/pdf", "JVBERg=="), "title": "a.pdf"}],
        ),
        (
            [{"type": "input_file", "file_data": "JVBERg=="}],
            [{"type": "document", "source": source("base64", "application/pdf", "JVBERg==")}],
        ),
        (
            [{"type": "input_file", "file_url": "https://x/y.pdf", "file_data": None}],
            [{"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}}],
        ),
        (
            [{"type": "input_file", "file_data": "data:text/markdown;charset=utf-8;base64,w6Q="}],
            [{"type": "document", "source": source("text", "text/plain", "ä")}],
        ),
        (
            [{"type": "input_file", "file_data": "data:;base64,YQ=="}],
            [{"type": "document", "source": source("text", "text/plain", "a")}],
        ),
    ],
)
def test_content(content: Any, expected: list[Json]) -> None:
    assert blocks_of(content) == expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_image", "file_id": "file_1"},
        {"type": "input_image", "image_url": "data:image/png,raw"},
        {"type": "input_image", "image_url": "data:image/png;base64"},
        {"type": "input_image", "image_url": "ftp://x"},
        {"type": "input_image", "image_url": ["x"]},
        {"type": "input_file", "file_id": "file_1"},
        {"type": "input_file", "filename": "a.pdf"},
        {"type": "input_file", "file_data": 7},
        {"type": "input_file", "file_data": "data:application/zip;base64,QQ=="},
        {"type": "input_file", "file_data": "data:text/plain;base64,A"},
        {"type": "input_audio", "input_audio": {"data": "z", "format": "wav"}},
    ],
)
def test_content_that_the_api_has_no_form_for_is_refused(part: Json) -> None:
    with pytest.raises(InvalidRequest) as caught:
        blocks_of([part])
    assert (caught.value.param, caught.value.status) == ("input", 400)


@pytest.mark.parametrize(
    "block", [{"type": "thinking", "thinking": "", "signature": "S"}, {"type": "redacted_thinking", "data": "D"}]
)
def test_thoughts_come_back_with_their_own_fields_only(block: Json) -> None:
    assert thought_of(orjson.dumps({**block, "cache_control": {}}).decode()) == block


@pytest.mark.parametrize(
    "unsealed",
    [None, "", "E", "[]", "7", "{}", '{"type":"text","text":"a"}', '{"type":"redacted_thinking","data":7}']
    + ['{"type":"thinking","thinking":"a"}', "[" * 9000],
)
def test_what_is_no_thought(unsealed: str | None) -> None:
    assert thought_of(unsealed) is None
