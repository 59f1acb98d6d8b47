"""The errors that a caller sees. Each has an HTTP status, a code, and `retry_after` if a retry helps.

TicketrailError
├── InvalidInput          422  the request breaks a rule; `field` names the field
├── Unauthenticated       401
├── Forbidden             403
├── NotFound              404
├── RequestTimeout        408  the body of the request did not arrive in time
├── Conflict              409  another change came first, or the current state forbids this one
├── UnsupportedMediaType  415  the body has an encoding that is not read
├── TooManyRequests       429  a limit was reached; retry after `retry_after` seconds
├── Unavailable           503  nothing was done, and nothing will appear; retry after `retry_after` seconds
└── OutcomeUnknown        504  perhaps done; repeat with the same Idempotency-Key
"""

from typing import Any, ClassVar


def described(error: BaseException) -> str:
    """Returns type and text of an error, or only the type if there is no text. A timeout has none."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class TicketrailError(Exception):
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    retry_after: float | None = None

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = code or self.code
        self.details = details


class InvalidInput(TicketrailError):
    status = 422
    code = "invalid_input"

    def __init__(self, message: str, *, field: str, code: str | None = None, **details: Any) -> None:
        super().__init__(message, code=code, field=field, **details)


class Unauthenticated(TicketrailError):
    status = 401
    code = "unauthenticated"


class Forbidden(TicketrailError):
    status = 403
    code = "forbidden"


class NotFound(TicketrailError):
    status = 404
    code = "not_found"


class RequestTimeout(TicketrailError):
    status = 408
    code = "request_timeout"


class Conflict(TicketrailError):
    status = 409
    code = "conflict"


class UnsupportedMediaType(TicketrailError):
    status = 415
    code = "unsupported_media_type"


class TooManyRequests(TicketrailError):
    status = 429
    code = "rate_limited"

    def __init__(self, message: str, *, retry_after: float, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after = retry_after


class Unavailable(TicketrailError):
    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None, **details: Any) -> None:
        super().__init__(message, code=code, **details)
        self.retry_after = retry_after


class OutcomeUnknown(TicketrailError):
    status = 504
    code = "outcome_unknown"
