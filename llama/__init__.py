"""A Llama-2 inference engine: `Engine`, `EngineConfig`, `ModelConfig`, `Request`, `SamplingParams`, `Tokenizer`.

The names are fetched when they are first used, so that importing a part of this package that needs no torch (errors,
configuration, requests, the scheduler) does not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llama import _floor as _floor

if TYPE_CHECKING:
    from llama.config import EngineConfig, Limits, ModelConfig
    from llama.engine import Completion, Engine, EngineStats
    from llama.request import Request, SamplingParams
    from llama.sequence import FinishReason
    from llama.stream import Delta, Stream
    from llama.tokenizer import Tokenizer

__project__ = "llama-slots"  # _floor.py looks for it
__version__ = "0.1.0"

_HOMES = {
    "Completion": "llama.engine",
    "Delta": "llama.stream",
    "Engine": "llama.engine",
    "EngineConfig": "llama.config",
    "EngineStats": "llama.engine",
    "FinishReason": "llama.sequence",
    "Limits": "llama.config",
    "ModelConfig": "llama.config",
    "Request": "llama.request",
    "SamplingParams": "llama.request",
    "Stream": "llama.stream",
    "Tokenizer": "llama.tokenizer",
}

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "Limits",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "Stream",
    "Tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
