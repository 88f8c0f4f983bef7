"""What the machine reaches at most: reading memory, and multiplying matrices."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.machine import measure_ceilings
from llama.config import DTYPES
from llama.setup import find_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(args.device, args.dtype)


def measure(device: str, dtype: str) -> dict[str, Any]:
    """Raises ConfigError for a device that is not there."""
    find_device(device)
    return {"dtype": dtype, "ceilings": measure_ceilings(device, dtype).report()}
