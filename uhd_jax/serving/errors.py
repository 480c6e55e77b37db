"""Refusals, each with its HTTP status, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or could not be answered.

    Args:
      status: of HTTP: 400 what is asked cannot be, 401 no or a wrong key, 404 no such model or page, 405 wrong method,
        408 the request came too slowly, 413 too large, 415 no JSON, 421 another host's name, 429 the queue is full,
        500 the server has a fault, 503 it is stopping, 504 the answer took too long.
      message: one line for the person who asks.
      code: a word for programs.
      param: the field that is meant, as in "messages[0].content".
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, where that helps."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
