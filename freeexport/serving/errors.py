"""Errors as clients see them: OpenAI's shape, types and codes."""

from __future__ import annotations

import re
from typing import Any

from runtime import (
    FreeExportError,
    OptionError,
    PromptError,
    PromptLengthError,
    QueueFullError,
)

# Options of a session, and the fields of a request that they came from.
FIELDS = {
    "max_new_tokens": "max_tokens",
    "mode": "free.mode",
    "threshold": "free.threshold",
    "deadline": "free.deadline",
    "rollback_threshold": "free.mode",
    "sequence_bias": "logit_bias",
    "predicted_output": "prediction",
}
SAME = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "cache_salt")

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An HTTP status and what its body says; `param` is the field that is wrong, `retry_after` seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, "invalid_value", param)


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down; ask another, or again later", "shutting_down", retry_after=1)


def api_error(error: BaseException) -> ApiError:
    """Return an exception as the client sees it; one that is not the client's mistake is 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"the queue is full: {error}", "queue_full", retry_after=1)
    if isinstance(error, PromptLengthError):
        return ApiError(400, str(error), "context_length_exceeded", "prompt")
    if isinstance(error, PromptError):
        return ApiError(400, str(error), "invalid_prompt", "prompt")
    if isinstance(error, OptionError):
        message = str(error)
        if message.startswith("the session is closed"):
            return draining()
        name = re.match(r"\w*", message)[0]  # type: ignore[index]
        param = FIELDS.get(name, name if name in SAME else None)
        # The message begins with the option's name: the client knows the field's.
        shown = message if param in (None, name) else f"{param}{message[len(name) :]}"
        return ApiError(400, shown, "invalid_value", param)
    if isinstance(error, FreeExportError):
        return ApiError(500, str(error), "engine_error")
    return ApiError(500, f"{type(error).__name__} in the server; its log has the traceback", "internal_error")
