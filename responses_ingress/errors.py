"""The one error tree. Every error a client, an operator or another room can meet is here.

What must stay true: each class fixes `status`, `type` and `code`; the message is one plain sentence a
person can act on; nothing here holds content of a request. This module imports nothing of the project.

    IngressError
    ├── InvalidRequest              400  the client can mend it
    │   ├── MissingParameter             missing_required_parameter
    │   ├── InvalidType                  invalid_type
    │   ├── InvalidValue                 invalid_value (or a bound's own code)
    │   ├── UnknownParameter             unknown_parameter (strict mode only)
    │   ├── UnsupportedParameter         unsupported_parameter
    │   ├── MutuallyExclusive            mutually_exclusive_parameters
    │   ├── KeyReused                    idempotency_key_reused
    │   ├── CursorExpired                stream_cursor_expired
    │   ├── ModelNotFound                model_not_found
    │   ├── PreviousNotFound             previous_response_not_found
    │   ├── PreviousNotCompleted         previous_response_not_completed
    │   └── ContextLengthExceeded        context_length_exceeded
    ├── Unauthorized                401  invalid_api_key
    ├── Forbidden                   403  forbidden
    ├── NotFound                    404  no code
    ├── NotAllowed                  405  method_not_allowed
    ├── BodyTooLarge                413  request_too_large
    ├── UpgradeRequired             426  upgrade_required
    ├── QueueFull                   429  queue_full, with Retry-After
    ├── Busy                        503  server_is_busy, with Retry-After
    ├── StoreUnavailable            503  store_unavailable, with Retry-After
    ├── UpstreamError               502  the backend's fault
    │   ├── UpstreamRefused         400  upstream_refused; or the status and code the backend gave
    │   ├── UpstreamUnreachable     502  upstream_unreachable
    │   ├── UpstreamTimeout         504  upstream_timeout
    │   ├── UpstreamTruncated       502  upstream_truncated
    │   └── UpstreamInvalid         502  upstream_invalid
    ├── Cancelled                   499  cancelled (no client sees the status)
    ├── ServerRestarted             500  server_restarted
    │   └── HandedOver              503  server_restarted, with Retry-After: another process goes on with it
    ├── InternalError               500  server_error
    ├── IllegalDelta                502  a backend said what the grammar of deltas forbids
    ├── StaleWriter                 500  a write of a run that another worker has taken over
    ├── ResponseRunning                  what this builds on still runs; the runner waits, no client sees it
    │   └── ThreadBusy                   another turn has the thread
    ├── NotHandedOver                    a run that another worker cannot take over; the run ends it
    ├── AlreadyBegun                     the request was made before; the runner attaches to its response
    ├── PlacementOutdated                the thread has moved since it was read; the runner reads it again
    └── SettingsError                    for the operator, at start; never sent to a client
"""

from typing import Any


class IngressError(Exception):
    """Base of all errors of this project."""

    status = 500
    type = "server_error"
    code: str | None = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status

    def body(self) -> dict[str, Any]:
        """The HTTP error body: all four keys, always (decisions: "Error body")."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def detail(self) -> dict[str, str]:
        """The `error` field of a failed response."""
        return {"code": self.code or self.type, "message": self.message}


class InvalidRequest(IngressError):
    status, type = 400, "invalid_request_error"
    code: str | None = None


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class InvalidType(InvalidRequest):
    code = "invalid_type"


class InvalidValue(InvalidRequest):
    code = "invalid_value"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class MutuallyExclusive(InvalidRequest):
    code = "mutually_exclusive_parameters"


class KeyReused(InvalidRequest):
    code = "idempotency_key_reused"


class CursorExpired(InvalidRequest):
    code = "stream_cursor_expired"


class ModelNotFound(InvalidRequest):
    code = "model_not_found"


class PreviousNotFound(InvalidRequest):
    code = "previous_response_not_found"


class PreviousNotCompleted(InvalidRequest):
    code = "previous_response_not_completed"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(IngressError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(IngressError):
    status, type, code = 403, "invalid_request_error", "forbidden"


class NotFound(IngressError):
    status, type, code = 404, "invalid_request_error", None


class NotAllowed(IngressError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class UpgradeRequired(IngressError):
    status, type, code = 426, "invalid_request_error", "upgrade_required"


class BodyTooLarge(IngressError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class QueueFull(IngressError):
    status, type, code = 429, "rate_limit_error", "queue_full"


class Busy(IngressError):
    status, type, code = 503, "server_error", "server_is_busy"


class StoreUnavailable(IngressError):
    status, code = 503, "store_unavailable"


class UpstreamError(IngressError):
    """The backend failed or refused; `status`, `code` and `retry_after` say what a client can do."""

    status = 502
    code = "upstream_error"


class UpstreamRefused(UpstreamError):
    """The backend refused the request: the status is its own."""

    status, type, code = 400, "invalid_request_error", "upstream_refused"


class UpstreamUnreachable(UpstreamError):
    code = "upstream_unreachable"


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"


class UpstreamTruncated(UpstreamError):
    code = "upstream_truncated"


class UpstreamInvalid(UpstreamError):
    code = "upstream_invalid"


class Cancelled(IngressError):
    status, code = 499, "cancelled"


class ServerRestarted(IngressError):
    code = "server_restarted"


class HandedOver(ServerRestarted):
    status = 503


class InternalError(IngressError):
    pass


class IllegalDelta(IngressError):
    status, code = 502, "upstream_invalid"


class StaleWriter(IngressError):
    code = "stale_writer"


class ResponseRunning(IngressError):
    """The response that this request builds on is still running."""

    def __init__(self, running: str) -> None:
        super().__init__("The response this request builds on is still running.")
        self.running = running


class ThreadBusy(ResponseRunning):
    """Another turn has the thread: `running` is its response."""


class NotHandedOver(IngressError):
    """Another worker cannot go on with this response."""


class AlreadyBegun(IngressError):
    """This request was made before: `response_id` is the response it made."""

    def __init__(self, response_id: str) -> None:
        super().__init__("This request was made before.")
        self.response_id = response_id


class PlacementOutdated(IngressError):
    def __init__(self) -> None:
        super().__init__("The thread has moved since it was read.")


class SettingsError(IngressError):
    type, code = "settings_error", "settings_error"
