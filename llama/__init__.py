"""A Llama-2 inference engine: `Engine`, `EngineConfig`, `ModelConfig`, `Request`, `SamplingParams`, `Tokenizer`.

The names are fetched when they are first used, so that importing a part of this package that needs no torch (errors,
configuration, requests, the scheduler) does not load it.
"""

# ruff: noqa: F401 (the imports below tell type checkers what `__getattr__` gives)

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.config import EngineConfig, Limits, ModelConfig
    from llama.engine import Completion, Engine, EngineStats
    from llama.request import Request, SamplingParams
    from llama.sequence import FinishReason
    from llama.stream import Delta, Stream
    from llama.tokenizer import Tokenizer

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


def _check_floor(package: str) -> None:
    """Raise ImportError if another distribution's package of the same name shadows the floor below."""
    spec = find_spec(package)
    found = Path(spec.origin).parent.parent if spec is not None and spec.origin else None
    if found != Path(__file__).parent.parent:
        raise ImportError(f"the package {package!r} found at {found} is not this project's; another shadows it")


_check_floor("kernels")
