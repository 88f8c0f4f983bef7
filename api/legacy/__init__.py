"""The spelling of 2023: `ChatCompletion.create(model=..., messages=...)`, over one client for the whole process.

Without `init` the first call loads the model it names. The client is the only global state of the package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api import schema
from api.client import Client, Endpoint
from api.errors import no_such_model
from llama.errors import ConfigError

_lock = threading.RLock()
_default: Client | None = None


def init(model: str | Path = "demo", **options: Any) -> Client:
    """Make the default client; options are `Client`'s. An earlier one is closed first."""
    global _default
    with _lock:
        shutdown()
        _default = Client(model, **options)
        return _default


def shutdown() -> None:
    """Close the default client, if there is one; the next call may load another."""
    global _default
    with _lock:
        if _default is not None:
            _default.close()
            _default = None


def default_client(model: str | None = None) -> Client:
    """The default client, made for `model` if there is none yet. Raises NotFoundError if that is no checkpoint."""
    try:
        with _lock:
            return _default or init("demo" if model is None else model)
    except ConfigError as error:
        if error.field != "model":
            raise
        raise no_such_model(error.value) from error


def _prepared(fields: dict[str, Any]) -> tuple[Client, dict[str, Any]]:
    """The client for a call, and the call's fields under the names of today."""
    renamed = dict(fields)
    for old, new in (("engine", "model"), ("request_timeout", "timeout")):
        if renamed.get(new) is None and old in renamed:
            renamed[new] = renamed.pop(old)
    return default_client(renamed.get("model")), renamed


@dataclass(frozen=True)
class Endpoint2023:
    """`create` and `acreate` of 2023. of: the endpoint of a client."""

    of: Callable[[Client], Endpoint[Any, Any]]

    def create(self, **fields: Any) -> Any:
        """The whole answer, an object of `api.schema`; with stream=True a `ChunkStream` of its chunks."""
        client, renamed = _prepared(fields)
        return self.of(client).create(**renamed)

    async def acreate(self, **fields: Any) -> Any:
        """The same, for event loops."""
        client, renamed = _prepared(fields)
        return await self.of(client).acreate(**renamed)


ChatCompletion = Endpoint2023(lambda client: client.chat.completions)
Completion = Endpoint2023(lambda client: client.completions)


class Model:
    """models, as it was called in 2023."""

    @classmethod
    def list(cls) -> schema.ModelList:
        return default_client().models.list()

    @classmethod
    def retrieve(cls, id: str) -> schema.Model:
        return default_client(id).models.retrieve(id)
