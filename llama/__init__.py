"""A Llama-2 inference engine: `Engine`, `EngineConfig`, `ModelConfig`, `Request`, `SamplingParams`, `Tokenizer`.

The names are fetched when they are first used, so that importing a part of this package that needs no torch (errors,
configuration, requests, the scheduler) does not load it.
"""

# ruff: noqa: F401 (the imports below tell type checkers what `__getattr__` gives)

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

_NAMES = {
    "llama.config": ("EngineConfig", "Limits", "ModelConfig"),
    "llama.engine": ("Completion", "Engine", "EngineStats"),
    "llama.request": ("Request", "SamplingParams"),
    "llama.sequence": ("FinishReason",),
    "llama.stream": ("Delta", "Stream"),
    "llama.tokenizer": ("Tokenizer",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
