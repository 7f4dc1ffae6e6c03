"""Upstream errors as ours: who can mend it, and the one code for a full context."""

from typing import Any

import orjson
import pytest

from responses_ingress.dialects.failures import in_band, read_error

OVERFLOWS = [
    # In the servers' own words.
    {"error": {"message": "…", "code": "context_length_exceeded", "type": "invalid_request_error"}},
    {"error": {"message": "This model's maximum context length is 4097 tokens, however you requested 4231 tokens."}},
    {"object": "error", "message": "The decoder prompt (length 9) is longer than the maximum model length of 4."},
    {"error": {"code": 400, "message": "…", "type": "exceed_context_size_error", "n_ctx": 4096}},
    {"error": {"message": "the request exceeds the available context size, try increasing it"}},
    {"error": "The number of tokens to keep from the initial prompt is greater than the context length"},
    {"error": {"message": "prompt too long; exceeded max context length by 4 tokens"}},
    {"error": "the input length exceeds the context length"},
    {"type": "error", "error": {"message": "prompt is too long: 213462 tokens > 200000 maximum"}},
    {"error": {"message": "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease it"}},
    {"message": "Input is too long for requested model."},
    [
        {
            "error": {
                "code": 400,
                "message": "The input token count (1196265) exceeds the maximum number of tokens allowed",
            }
        }
    ],
    {"error": {"message": "This model's maximum prompt length is 131072 but the request contains 537812 tokens."}},
    {"error": {"message": "Please reduce the length of the messages or completion."}},
    {
        "object": "error",
        "message": "Prompt contains 65673 tokens, too large for model with 32768 maximum context length",
    },
    {"error": {"message": "Your request exceeded model token limit: 262144"}},
    {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."},
    {"error": {"message": "The input (5000 tokens) is longer than the model's context length (4096 tokens)."}},
]


@pytest.mark.parametrize("body", OVERFLOWS)
@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_full_context_has_one_code(body: Any, status: int) -> None:
    error = read_error(status, orjson.dumps(body))
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert in_band(body)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("status", "ours"),
    [
        *((status, status) for status in (400, 401, 403, 404, 413, 429)),
        *((status, 400) for status in (402, 405, 409, 410, 422)),
        *((status, 502) for status in (500, 502, 520, 302, 204)),
        *((status, 503) for status in (503, 529)),
        *((status, 504) for status in (408, 504)),
    ],
)
def test_statuses(status: int, ours: int) -> None:
    error = read_error(status, b'{"error":{"message":"m"}}', 1.5)
    assert (error.status, error.retry_after) == (ours, 1.5)


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (404, {"error": {"message": "No such model.", "code": "model_not_found"}}, "model_not_found", "No such model."),
        (
            400,
            {"error": {"message": "Bad", "type": "invalid_request_error", "code": None}},
            "upstream_refused",
            "Bad.",
        ),
        (400, {"error": {"message": "Bad", "code": 400}}, "upstream_refused", "Bad."),
        (400, {"object": "error", "message": "Bad", "type": "BadRequestError"}, "upstream_refused", "Bad."),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, "upstream_refused", "field required."),
        (422, {"detail": "no"}, "upstream_refused", "no."),
        (400, {"error": "why not?"}, "upstream_refused", "why not?"),
        (429, {"error": {"message": "Slow down", "code": 429}}, "rate_limit_exceeded", "Slow down."),
        (
            429,
            {"type": "error", "error": {"message": "Slow", "type": "rate_limit_error"}},
            "rate_limit_exceeded",
            "Slow.",
        ),
        (
            529,
            {"type": "error", "error": {"message": "Overloaded", "type": "overloaded_error"}, "request_id": "r"},
            "server_is_overloaded",
            "Overloaded.",
        ),
        (529, {"message": "Wait"}, "server_is_overloaded", "Wait."),
        (429, {"error": {"message": "Pay", "code": "insufficient_quota"}}, "insufficient_quota", "Pay."),
        # Groq says a limit of tokens a minute with 413.
        (413, {"error": {"message": "Too large", "code": "rate_limit_exceeded"}}, "rate_limit_exceeded", "Too large."),
        (
            502,
            {"error": {"message": "Provider returned error", "metadata": {"raw": "It burns"}}},
            "upstream_error",
            "Provider returned error It burns.",
        ),
    ],
)
def test_code_and_message(status: int, body: Any, code: str, message: str) -> None:
    error = read_error(status, orjson.dumps(body))
    assert error.code == code
    assert (
        error.message
        == f"The upstream {'failed' if status > 499 else 'refused the request'} (status {status}): {message}"
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, {"message": "Wrong key sk-1", "code": "invalid_api_key"}),
        (401, {"message": "maximum context length, rate_limit"}),
        (403, {"message": "No, sk-1", "type": "permission_error"}),
        (400, {"message": "Incorrect API key provided: sk-1"}),
        (400, {"message": "API key not valid. Please pass a valid API key."}),
        (400, {"message": "sk-1", "type": "authentication_error"}),
    ],
)
def test_nothing_is_told_of_the_operators_key(status: int, said: Any) -> None:
    error = read_error(status, orjson.dumps({"error": said}))
    assert (error.status, error.code) == (status, "upstream_refused")
    assert error.message == "The upstream refused its credentials."
    assert in_band({"error": {**said, "status_code": status}}) == error.detail()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The upstream failed (status 500)."),
        (b"<html>Bad gateway</html>", "The upstream failed (status 500)."),
        (b"upstream connect error\n", "The upstream failed (status 500): upstream connect error."),
        (b"{}", "The upstream failed (status 500)."),
        (b"[]", "The upstream failed (status 500)."),
        (b"7", "The upstream failed (status 500)."),
        (b'{"error":{"message":null},"message":"outer"}', "The upstream failed (status 500): outer."),
        (b'{"error":true,"message":{}}', "The upstream failed (status 500)."),
        (b"\xff" * 9000, "The upstream failed (status 500): " + "\ufffd" * 500 + "."),
        (b'{"message":"' + b"x" * 900 + b'"}', "The upstream failed (status 500): " + "x" * 500 + "."),
    ],
)
def test_bodies_of_all_sorts(body: bytes, message: str) -> None:
    error = read_error(500, body)
    assert (error.message, error.code, error.param) == (message, "upstream_error", None)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (
            {"error": {"message": "Tool choice is required.", "code": "tool_use_failed", "status_code": 400}},
            "server_error",
            "The upstream reported an error (tool_use_failed): Tool choice is required.",
        ),
        (
            {"error": {"message": "Overloaded", "code": 429}},
            "rate_limit_exceeded",
            "The upstream reported an error (status 429): Overloaded.",
        ),
        (
            {"error": {"message": "Rate limit reached"}},
            "rate_limit_exceeded",
            "The upstream reported an error: Rate limit reached.",
        ),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
            "server_is_overloaded",
            "The upstream reported an error (overloaded_error): Overloaded.",
        ),
        ({"message": "bare", "type": "oops"}, "server_error", "The upstream reported an error (oops): bare."),
        ("gone!", "server_error", "The upstream reported an error: gone!"),
        ({"error": True}, "server_error", "The upstream reported an error."),
        (None, "server_error", "The upstream reported an error."),
    ],
)
def test_errors_inside_of_a_200(body: Any, code: str, message: str) -> None:
    assert in_band(body) == {"code": code, "message": message}
