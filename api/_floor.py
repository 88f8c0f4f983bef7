"""Imported before everything else: another distribution's `llama` must not be taken for ours."""

from importlib.util import find_spec
from pathlib import Path

_spec = find_spec("llama")
_found = Path(_spec.origin).parents[1] if _spec is not None and _spec.origin else None
if _found != Path(__file__).parents[1]:
    raise ImportError(f"the package 'llama' found at {_found} is not this project's; another shadows it")
