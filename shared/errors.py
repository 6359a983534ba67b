"""All errors that users can see, in one class tree.

Owns: the HTTP status, the OpenAI error `type` and a stable `code` of each. A message says what was found, what is
allowed, and what to do next. Must not import other modules of this repository.
"""

from __future__ import annotations


class MillinerError(Exception):
    """Base class. The API sends it as `{"error": {message, type, param, code}}`."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code


class InvalidRequest(MillinerError):
    """The request is invalid: sent unchanged, it can never succeed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class AuthenticationFailed(MillinerError):
    """The API key is missing, unknown or revoked."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDenied(MillinerError):
    """The key is valid, but the caller may not change this object."""

    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class NotFound(MillinerError):
    """The tenant has no such object. The answer is exactly the same if another tenant has it."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(MillinerError):
    """The object's state does not allow the request. A retry does not help, so `x-should-retry: false` is sent."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLarge(MillinerError):
    """The request has more bytes than the server accepts."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TooMany(MillinerError):
    """The tenant has as many of these at once as it may have. The client may retry later."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_at_once"


class Unavailable(MillinerError):
    """A server that this one needs is down. The client may retry, after `retry_after` seconds if that is known."""

    status = 503
    type = "server_error"
    code = "service_unavailable"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after


class TrainingFailed(MillinerError):
    """A job cannot continue, for a reason that its user can fix: bad data, a bad setting, too large a base model.

    `hint` says what to do. `retryable` marks the few errors that may not occur in another attempt.
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
