"""The one tree of errors that a user can meet.

Owns: the HTTP status, the OpenAI error `type`, and a stable `code` for each. A message says what was found, what is
allowed, and what to do next. Must not import anything of ours.
"""

from __future__ import annotations


class MillinerError(Exception):
    """An error with a place on the wire: `{"error": {message, type, param, code}}`."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code


class InvalidRequest(MillinerError):
    """The request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class AuthenticationFailed(MillinerError):
    """No key, an unknown key, or a revoked one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDenied(MillinerError):
    """The key is good, but this object is not the caller's to change."""

    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class NotFound(MillinerError):
    """No such object for this tenant; another tenant's object looks exactly the same."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(MillinerError):
    """The object's state does not allow it; a retry will not help, and `x-should-retry: false` says so."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLarge(MillinerError):
    """More bytes than the server takes."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TooMany(MillinerError):
    """More at once than one tenant may have; the client may retry."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_at_once"


class Unavailable(MillinerError):
    """A server that this one needs is down; the client may retry, `retry_after` seconds later if that is known."""

    status = 503
    type = "server_error"
    code = "service_unavailable"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class TrainingFailed(MillinerError):
    """A job that cannot go on, for a reason its user can mend: bad data, a bad setting, a base that does not fit.

    `retryable` marks the few that another attempt may mend by itself.
    """

    status = 422
    type = "invalid_request_error"
    code = "training_failed"

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str | None = None,
        param: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.hint = hint
        self.retryable = retryable
