"""OpenAI's interface, in this process: chat completions and completions over the batching engine in `llama`.

    client = api.Client(model="/models/Llama-2-7b-chat-hf")
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}])
    for chunk in client.completions.create(prompt="Once", max_tokens=20, stream=True): ...

`AsyncClient` is the same for event loops; `ChatCompletion` and `Completion` are the spelling of 2023.
"""

import sys

from api import _floor as _floor
from api import errors
from api.client import AsyncClient, Client
from api.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    InvalidRequestError,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
    ServiceUnavailableError,
)
from api.legacy import ChatCompletion, Completion, Model, error, init, shutdown
from llama import __version__ as __version__

__project__ = "llama-slots"  # _floor.py looks for it
sys.modules["api.error"] = error  # where openai 0.28 has it: `from api.error import Timeout`

__all__ = [
    "Client", "AsyncClient",
    "ChatCompletion", "Completion", "Model", "init", "shutdown", "error", "errors",
    "OpenAIError", "APIError", "APIConnectionError", "APITimeoutError", "APIStatusError", "InvalidRequestError",
    "BadRequestError", "AuthenticationError", "PermissionDeniedError", "NotFoundError", "RateLimitError",
    "InternalServerError", "ServiceUnavailableError",
]  # fmt: skip
