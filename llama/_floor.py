"""Imported first: refuses to go on where another distribution's package stands in the place of the floor below.

pip installs others' `kernels`, `llama` and `api` over ours without a word. Ours carry a mark, which is read before
anything of them runs. The floors above read this file by its path: `llama` itself may be another's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_MARK = b'__project__ = "llama-slots"'


def check_floor(package: str) -> None:
    """Raises ImportError, naming the file and the remedy, unless `package` is this project's."""
    spec = find_spec(package)
    file = Path(spec.origin) if spec is not None and spec.origin else None
    if file is not None and _MARK in file.read_bytes():
        return
    folder = file.parent if file else Path(__file__).parents[1] / package
    records = ((path.parent.name, path.read_text()) for path in folder.parent.glob("*.dist-info/RECORD"))
    owners = {name.split("-")[0] for name, record in records if f"\n{package}/" in f"\n{record}"} - {"llama_slots"}
    raise ImportError(
        f"llama-slots needs its own package {package!r}, but "
        + (f"{file} is another distribution's. " if file else f"{folder} has no __init__.py. ")
        + "Use an environment without the other one, or: "
        + (f"pip uninstall {' '.join(sorted(owners))}" if owners else f"remove what is not llama-slots's from {folder}")
        + "; pip install --force-reinstall --no-deps PATH_OF_LLAMA_SLOTS"
    )


check_floor("kernels")
