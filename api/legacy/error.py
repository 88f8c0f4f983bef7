"""The names of 2023 (openai 0.28) for the errors in `api.errors`, as `api.error`: `except api.error.Timeout:`."""

from api.errors import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    InvalidRequestError,
    OpenAIError,
    RateLimitError,
    ServiceUnavailableError,
)
from api.errors import APITimeoutError as Timeout
from api.errors import PermissionDeniedError as PermissionError

__all__ = [
    "OpenAIError", "APIError", "APIConnectionError", "Timeout", "InvalidRequestError", "AuthenticationError",
    "PermissionError", "RateLimitError", "ServiceUnavailableError",
]  # fmt: skip
