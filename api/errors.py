"""The errors of the OpenAI interface, with the fields that openai-python's have, and how the engine's map to them.

OpenAIError
`-- APIError                    message, type, param, code, status_code, request_id, headers, body
    |-- APIStatusError              an answer with an HTTP status: 405, 408, 413, 415, 431 as they are
    |   |-- InvalidRequestError         the 2023 name of the next two
    |   |   |-- BadRequestError             400
    |   |   `-- NotFoundError               404
    |   |-- AuthenticationError         401
    |   |-- PermissionDeniedError       403
    |   |-- RateLimitError              429     (retry_after)
    |   `-- InternalServerError         500, 504
    |       `-- ServiceUnavailableError     503
    `-- APIConnectionError          no answer at all
        `-- APITimeoutError             the caller's own `timeout` passed

HTTP answers with `to_dict()` of the same errors. Messages name the value and the limit, never keys, paths or stack
traces: those stay in `__cause__`, which does not travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama import errors as engine_errors

# What `retry_after` may be, in seconds. Clients give up, or do not listen, above a minute.
SOON, MAX_RETRY_AFTER = 0.05, 60.0


class OpenAIError(Exception):
    """Root of everything that `api` raises on purpose."""


class APIError(OpenAIError):
    """A request that failed. code: a short machine-readable word; param: the field at fault, where there is one."""

    status_code: int | None = None
    type: str | None = None
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        status_code: int | None = None,
        request_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.request_id = message, param, request_id
        self.type, self.code = type or self.type, code or self.code
        self.status_code = status_code or self.status_code
        self.headers = headers or {}

    @property
    def http_status(self) -> int | None:
        """The 2023 name of status_code."""
        return self.status_code

    @property
    def body(self) -> dict[str, Any]:
        """What stands under "error" on the wire."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def to_dict(self) -> dict[str, Any]:
        """The whole body on the wire."""
        return {"error": self.body}


class APIStatusError(APIError):
    """An error that has an HTTP status."""

    status_code: int = 400
    type: str = "invalid_request_error"


class InvalidRequestError(APIStatusError):
    """The request cannot be served as it is."""


class BadRequestError(InvalidRequestError):
    """A field is wrong, or what it asks for cannot be had."""

    code = "invalid_value"


class NotFoundError(InvalidRequestError):
    """There is no such model, or none that can chat, or no such route."""

    status_code = 404
    code = "model_not_found"


class AuthenticationError(APIStatusError):
    """The key is missing or unknown."""

    status_code = 401
    code = "invalid_api_key"


class PermissionDeniedError(APIStatusError):
    """The request's host or origin is not allowed."""

    status_code = 403


class RateLimitError(APIStatusError):
    """No slot is free. retry_after: expected seconds until one is."""

    status_code = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class InternalServerError(APIStatusError):
    """This request failed on our side."""

    status_code = 500
    type = "server_error"
    code = "internal_error"


class ServiceUnavailableError(InternalServerError):
    """Nothing is served now."""

    status_code = 503
    code = "engine_failed"


class APIConnectionError(APIError):
    """No answer came."""


class APITimeoutError(APIConnectionError):
    """The request took longer than the caller's `timeout`; it was aborted."""


def bad_type(param: str, value: object, wanted: str) -> BadRequestError:
    """400 for a value of the wrong type."""
    return BadRequestError(f"'{param}' must be {wanted}, not {_json_type(value)}.", param=param, code="invalid_type")


def bad_value(param: str, value: object, limit: str) -> BadRequestError:
    """400 for a value that is out of range or breaks a rule; `limit` says what would be accepted."""
    return BadRequestError(f"'{param}' is {shorten(value)}: {limit}.", param=param, code="invalid_value")


def unsupported(param: str, message: str) -> BadRequestError:
    """400 for something that OpenAI offers and we do not."""
    return BadRequestError(message, param=param, code="unsupported_value")


def no_such_model(name: object) -> NotFoundError:
    """404 for a model that is not served."""
    return NotFoundError(f"The model {shorten(name)} does not exist.", param="model")


def from_engine(error: engine_errors.EngineError, prompt_field: str = "prompt") -> APIError:
    """This interface's error for one of the engine's. prompt_field: the request's own, "messages" or "prompt"."""
    if isinstance(error, engine_errors.ContextLengthExceeded):
        text = str(error).partition(": ")[2]
        message = f"{text[:1].upper()}{text[1:]}. Please shorten the {prompt_field}."
        return BadRequestError(message, param=prompt_field, code="context_length_exceeded")
    if isinstance(error, engine_errors.ChatFormatError) and error.field.endswith(".content"):
        message = f"'{error.field}' holds {shorten(error.value)}: {error.limit}."
        return BadRequestError(message, param=error.field, code="special_tags")
    if isinstance(error, engine_errors.InvalidRequest):
        return bad_value(error.field, error.value, error.limit)
    if isinstance(error, engine_errors.SlotsFull):
        message = f"All {error.limit} slots are taken by requests in flight. Please try again later."
        return RateLimitError(message, retry_after=min(max(error.retry_after, SOON), MAX_RETRY_AFTER))
    if isinstance(error, engine_errors.RequestFailed):
        return InternalServerError("This request failed while it ran; others were not touched.", code=error.reason)
    if isinstance(error, engine_errors.EngineClosed):
        return ServiceUnavailableError("The model is shutting down.", code="shutting_down")
    if isinstance(error, engine_errors.EngineDead):
        return ServiceUnavailableError("The engine has stopped on an internal error.", code="engine_failed")
    return InternalServerError("An internal error occurred.")


@contextmanager
def translated(prompt_field: str = "prompt") -> Iterator[None]:
    """Raise this interface's errors for the engine's; what the engine said stays in `__cause__`."""
    try:
        yield
    except engine_errors.EngineError as error:
        raise from_engine(error, prompt_field) from error


def shorten(value: object) -> str:
    """A value as messages show it: ASCII, of bounded length."""
    try:
        shown = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return f"{_json_type(value)} too large to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _json_type(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
