"""Errors of the HTTP server, in OpenAI's format."""

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

# Request fields by session option.
SAME = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "cache_salt"),
    *("frequency_penalty", "presence_penalty", "src_lang", "tgt_lang"),
)
FIELDS = dict(zip(SAME, SAME, strict=True)) | {
    "max_new_tokens": "max_tokens",
    "mode": "free.mode",
    "threshold": "free.threshold",
    "deadline": "free.deadline",
    "rollback_threshold": "free.mode",
    "sequence_bias": "logit_bias",
    "predicted_output": "prediction",
    "prompt_logprobs": "echo",
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """HTTP error with a body in OpenAI's format.

    Args:
        status: HTTP status.
        message: Message for the client.
        code: OpenAI's error code.
        param: Field at fault.
        retry_after: Value of the Retry-After header, in seconds.
        again: OpenAI's clients may retry automatically.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        again: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if not again:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }


def invalid(param: str, message: str) -> ApiError:
    """Return an error about an invalid value of field `param`."""
    return ApiError(400, message, "invalid_value", param)


def unsupported(name: str, advice: str, value: str = "") -> ApiError:
    """Return an error about field `name`, which is not supported, or not with this value."""
    return ApiError(400, f"{name}{value} is not supported; {advice}", "unsupported", name)


def draining() -> ApiError:
    """Return the error for requests that arrive during shutdown."""
    return ApiError(
        503,
        "the server is shutting down; retry later or use another server",
        "shutting_down",
        retry_after=1,
    )


def api_error(error: BaseException) -> ApiError:
    """Convert an exception to the error that the client receives.

    Exceptions that the request did not cause have status 500, except a full queue (429) and a
    shutdown (503).
    """
    message = str(error)
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, f"the request queue is full: {error}", "queue_full", retry_after=1)
        case PromptError():
            long = isinstance(error, PromptLengthError)
            return ApiError(
                400, message, "context_length_exceeded" if long else "invalid_prompt", "prompt"
            )
        case OptionError() if message.startswith("the session is closed"):
            return draining()
        case OptionError():
            # The message begins with the option's name. Clients use the field's name.
            name, rest = re.match(r"(\w*)(.*)", message, re.DOTALL).groups()  # type: ignore[union-attr]
            param = FIELDS.get(name)
            return ApiError(400, message if param is None else param + rest, "invalid_value", param)
        case FreeExportError():
            return ApiError(500, message, "engine_error")
    return ApiError(
        500, f"{type(error).__name__} in the server; see the traceback in its log", "internal_error"
    )
