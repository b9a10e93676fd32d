"""The one error that a caller of the API is shown, in OpenAI's form."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


OVER_LIMIT = "rate_limit_exceeded"
"""Code of a 429 by a limit of the caller's own key."""


class Refusal(Exception):
    """Why a request is not answered: HTTP status, a sentence with value and next step, and the field that it is about."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None, retry_after_s: int = 0):
        super().__init__(status, message, field, code, retry_after_s)  # all arguments, so that it pickles
        self.status = status
        self.message = message
        self.field = field
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to come again, and how to sign in."""
        found = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
