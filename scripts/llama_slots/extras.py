"""Packages that an installation may leave out, and the one line that says how to get a missing one."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "llama-slots"
PROJECT = ("kernels", "llama", "api")
EXTRAS = {
    "serve": ("starlette", "uvicorn", "h11", "prometheus-client"),
    "gguf": ("gguf",),
    "bench": ("matplotlib", "transformers"),
}


def installed_version() -> str | None:
    """The version of the installed project; None where it runs from a checkout that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def pip_command(extra: str) -> str:
    """What installs an extra. The project is on no index: where it is not installed, pip needs its folder."""
    return f"pip install '{DISTRIBUTION if installed_version() else '.'}[{extra}]'"


def needs(module: str) -> str:
    """Why a command stops without a module, and what to do: "needs NAME, which is not installed: pip ..."."""
    name = module.partition(".")[0].replace("_", "-")
    if name in PROJECT:
        return f"needs {name}, which is not found: run `pip install .` in the checkout, or set PYTHONPATH to it"
    for extra, packages in EXTRAS.items():
        if name in packages:
            return f"needs {name}, which is not installed: {pip_command(extra)}"
    return f"needs {name}, which is not installed: run `pip install .` in the checkout"
