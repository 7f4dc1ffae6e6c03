import gzip
from collections.abc import AsyncIterator, Callable

import orjson
import pytest
import zstandard

from responses_ingress.testing import spoken
from responses_ingress.web.exchange import decode_headers
from responses_ingress.web.responses import RequestLimits
from tests.web.asgi import Site, opened_site
from tests.wire import Answer

LIMIT = 1000
ASK = orjson.dumps({"model": "scripted-model", "input": "hi"})


def padded(size: int) -> bytes:
    """A good request of exactly `size` bytes."""
    return ASK + b" " * (size - len(ASK))


@pytest.fixture
async def site(migrated_database: str) -> AsyncIterator[Site]:
    async with opened_site(migrated_database, requests=RequestLimits(max_body=LIMIT)) as site:
        site.stage.backend.script(*[spoken("hi")] * 2)
        yield site


async def post(site: Site, *body: bytes, **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await site.visit("POST", "/v1/responses", body, given).answer()


# How large a body may be.


@pytest.mark.parametrize("pieces", [1, 7])
async def test_a_body_of_the_limit_is_read(site: Site, pieces: int) -> None:
    body, size = padded(LIMIT), -(-LIMIT // pieces)
    assert (await post(site, *(body[at : at + size] for at in range(0, LIMIT, size)))).status == 200


async def test_a_body_over_the_limit_is_refused_by_its_declared_length_before_it_is_read(site: Site) -> None:
    visit = site.visit("POST", "/v1/responses", ASK, {"content-length": str(LIMIT + 1)})
    answer = await visit.answer()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert visit.unread == 1


async def test_a_body_over_the_limit_is_refused_where_it_passes_it(site: Site) -> None:
    visit = site.visit("POST", "/v1/responses", [padded(LIMIT), b" ", b" " * 10])
    answer = await visit.answer()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert str(LIMIT) in answer.error["message"]
    assert visit.unread == 1


async def test_a_body_that_breaks_off_is_nothing_to_run(site: Site) -> None:
    visit = site.visit("POST", "/v1/responses", [ASK])
    visit.break_off()
    assert (await visit.answer()).status == 400
    assert site.stage.backend.calls == []


# Packed bodies.

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "ZSTD ": zstandard.compress,
    "identity": bytes,
}


@pytest.mark.parametrize("encoding", PACKERS)
async def test_a_packed_body_is_unpacked(site: Site, encoding: str) -> None:
    assert (await post(site, PACKERS[encoding](ASK), content_encoding=encoding)).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
async def test_a_body_packed_in_two_frames_is_one_body(site: Site, encoding: str) -> None:
    pack = PACKERS[encoding]
    assert (await post(site, pack(ASK[:20]) + pack(ASK[20:]), content_encoding=encoding)).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
async def test_the_limit_counts_what_is_unpacked(site: Site, encoding: str) -> None:
    fits, bomb = PACKERS[encoding](padded(LIMIT)), PACKERS[encoding](padded(LIMIT + 1))
    assert (await post(site, fits, content_encoding=encoding)).status == 200
    refused = await post(site, bomb, content_encoding=encoding)
    assert (refused.status, refused.error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("spoil", [lambda packed: b"no" + packed, lambda packed: packed[:-9]], ids=["odd", "cut"])
async def test_a_packed_body_that_is_none_is_refused(
    site: Site, encoding: str, spoil: Callable[[bytes], bytes]
) -> None:
    answer = await post(site, spoil(PACKERS[encoding](ASK)), content_encoding=encoding)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


async def test_an_unknown_encoding_is_refused_and_named_in_part(site: Site) -> None:
    answer = await post(site, ASK, content_encoding="br" * 100)
    assert (answer.status, answer.error["code"]) == (400, "unsupported_parameter")
    assert len(answer.error["message"]) < 150


# What a body may hold.


def nested(levels: int) -> bytes:
    """A request with an unknown field of so many levels."""
    return ASK[:-1] + b',"odd":' + b"[" * levels + b"]" * levels + b"}"


async def test_json_is_refused_where_it_is_nested_deeper_than_it_could_be_written_again(migrated_database: str) -> None:
    async with opened_site(migrated_database) as site:
        site.stage.backend.script(spoken("hi"))
        assert (await post(site, nested(240))).status == 200
        for levels in (250, 1000, 100_000):
            refused = await post(site, nested(levels))
            assert (refused.status, refused.error["type"]) == (400, "invalid_request_error")


def crowded(pair: bytes, count: int) -> bytes:
    """A request with an unknown field of so many values."""
    return ASK[:-1] + b',"odd":[' + pair * count + b"0]}"


@pytest.mark.parametrize("pair", [b"{},", b"[],", b"0,", b'"",', b'{"a":0},'])
async def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(migrated_database: str, pair: bytes) -> None:
    async with opened_site(migrated_database) as site:
        packed = zstandard.compress(crowded(pair, 1_000_001))
        assert len(packed) < 10_000
        answer = await post(site, packed, content_encoding="zstd")
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert "at most 1000000 commas, braces and brackets" in answer.error["message"]


async def test_a_large_body_of_few_values_is_read(migrated_database: str) -> None:
    async with opened_site(migrated_database) as site:
        site.stage.backend.script(spoken("hi"))
        body = crowded(b'"' + b"x" * 100 + b'",', 100_000)
        assert (await post(site, body)).status == 200


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000], ids=["odd", "long"])
async def test_a_declared_length_that_is_no_length_is_no_failure_of_ours(site: Site, length: str) -> None:
    answer = await post(site, ASK, content_length=length)
    assert answer.status in (200, 413)


@pytest.mark.parametrize("body", [b"", b"{", ASK + b"x", b'{"a": NaN}', b"\xff"])
async def test_what_is_no_json_is_refused_with_the_place(site: Site, body: bytes) -> None:
    answer = await post(site, body)
    assert answer.status == 400
    assert "line 1, column" in answer.error["message"]


# Answers.


async def test_every_answer_has_a_request_id_of_its_own(site: Site) -> None:
    answers = [await post(site, ASK), await post(site, b"{"), await site.get("/healthz"), await site.get("/metrics")]
    ids = [answer.headers.get("x-request-id", "") for answer in answers]
    assert all(id.startswith("req_") for id in ids)
    assert len(set(ids)) == len(ids)


async def test_a_database_that_does_not_answer_is_for_the_client_to_wait_for(site: Site) -> None:
    async with site.stage.database.transaction() as connection:
        await connection.exec_driver_sql("DROP TABLE preambles")
    answer = await site.get("/v1/responses/resp_x")
    assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "2"


async def test_a_failure_of_our_own_is_an_error_object_and_tells_nothing_of_the_content(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    created = await post(site, ASK)
    await site.stage.change("UPDATE responses SET envelope = ?", b"secret")
    answer = await site.get(f"/v1/responses/{created.json['id']}")
    assert (answer.status, answer.error["code"]) == (500, "server_error")
    assert answer.error["message"] == "The server failed (JSONDecodeError)."
    assert answer.headers["x-request-id"] in caplog.text


def test_header_names_are_lower_case_and_the_first_of_two_counts() -> None:
    assert decode_headers([(b"x-a", b"1"), (b"x-b", b"3"), (b"x-a", b"2")]) == {"x-a": "1", "x-b": "3"}


@pytest.mark.parametrize("text", ["café", "straße", "日本", "plain", ""])
def test_header_values_are_utf_8(text: str) -> None:
    assert decode_headers([(b"x-a", text.encode())]) == {"x-a": text}


@pytest.mark.parametrize("text", ["café", "straße"])
def test_header_values_that_are_no_utf_8_are_latin_1(text: str) -> None:
    assert decode_headers([(b"x-a", text.encode("latin-1"))]) == {"x-a": text}


@pytest.mark.parametrize("name", ["café", "straße", "日本"])
async def test_a_session_has_a_name_in_any_script(site: Site, name: str) -> None:
    sent = name.encode().decode("latin-1")  # the same bytes
    assert (await post(site, ASK, session_id=sent)).status == 200
    (row,) = site.stage.rows("SELECT key FROM threads")
    assert row["key"] == name
