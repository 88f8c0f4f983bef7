"""Imported before everything else: another distribution's `llama` must not be taken for ours."""

from importlib.util import find_spec
from pathlib import Path

_spec = find_spec("llama")
_found = _spec.origin if _spec is not None else None
if _found is None or Path(_found).parents[1] != Path(__file__).parents[1]:
    raise ImportError(f"the package 'llama' found at {_found} is not this project's; another shadows it")
