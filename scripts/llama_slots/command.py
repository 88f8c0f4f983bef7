"""`llama-slots`: one program for the commands of this package, which scripts/*.py in a checkout run as well."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from llama_slots.extras import DISTRIBUTION, installed_version, needs

# Each module has main(argv, program) -> exit code. It is imported when it is asked for: only serve needs HTTP.
MODULES = {"serve": "llama_slots.serve", "chat": "llama_slots.chat", "weights": "llama_slots.weights.command"}
DESCRIPTION = """A small Llama-2 inference engine with an OpenAI-style API.

    llama-slots serve --model demo      an HTTP server
    llama-slots chat                    a conversation in the terminal
    llama-slots weights inspect demo    look at, check, convert and plan checkpoints

`llama-slots COMMAND --help` lists the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """The entry point of an installed project; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        DISTRIBUTION, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {installed_version() or 'checkout'}")
    parser.add_argument("command", choices=MODULES)
    command = parser.parse_args(argv[:1]).command
    return run(command, argv[1:], f"{DISTRIBUTION} {command}")


def run(command: str, argv: list[str], program: str) -> int:
    """Run a command; returns its exit code, 2 where a package is missing.

    program: how the command was called, which its help and its errors repeat.
    """
    try:
        module = importlib.import_module(MODULES[command])
    except ModuleNotFoundError as error:
        print(f"{Path(program).name}: {needs(error.name or str(error))}", file=sys.stderr)
        return 2
    return module.main(argv, program)
