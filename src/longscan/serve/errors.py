"""What clients get to see of errors."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException

from longscan.errors import LongscanError
from longscan.serve.formats import UnsupportedError

__all__ = ["ApiError", "BusyError", "api_error"]


class BusyError(Exception):
    """The queue is full.

    Attributes:
        seconds: after which another attempt may succeed.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        kind: OpenAI's type of the error.
        code: for programs.
        param: the field at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})
        self.kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            self.kind = "rate_limit_error"


def api_error(error: BaseException) -> ApiError:
    """Return what a client gets to see of an error.

    Args:
        error: any.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        retry = {"Retry-After": str(error.seconds)}
        message = f"too many requests are waiting: try again in {error.seconds} s."
        return ApiError(429, message, "rate_limit_exceeded", headers=retry)
    if isinstance(error, UnsupportedError):
        return ApiError(400, str(error), "unsupported_parameter", error.field)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the deadline has passed before the first token.", "deadline_exceeded")
    if isinstance(error, HTTPException):
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{error.detail}: see /openapi.json for what this server answers."
        return ApiError(error.status_code, message, code, headers=error.headers)
    if isinstance(error, LongscanError) and "the engine failed" not in str(error):
        return ApiError(400, str(error), "invalid_value")
    return ApiError(500, "the server failed; its log says why.")
