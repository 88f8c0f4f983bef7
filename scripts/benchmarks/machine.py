"""The machine that figures are taken on: its name, its versions, and its ceilings, measured in the same run."""

from __future__ import annotations

import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_slots.roofline import Card

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ceilings:
    """read: bytes/s of a plain sum. matmul: multiplications and additions/s of a large square product in `dtype`."""

    read: float
    matmul: float
    dtype: str

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of both, measured before and after the figures: neither end of a run is sure to be undisturbed."""
        return Ceilings(max(self.read, other.read), max(self.matmul, other.matmul), self.dtype)

    def moved(self, other: Ceilings, max_spread: float) -> str | None:
        """Why a share of these ceilings means nothing, or None."""
        pairs = {"read": (self.read, other.read), "matmul": (self.matmul, other.matmul)}
        for name, (before, after) in pairs.items():
            change = max(before, after) / min(before, after) - 1
            if change > max_spread:
                return f"no share: the {name} ceiling moved by {change:.0%} during the run, more than {max_spread:.0%}"
        return None

    @property
    def card(self) -> Card:
        return Card(memory=0, bandwidth=self.read, bf16=self.matmul, fp8=None, source="measured in this run")

    def report(self) -> dict[str, Any]:
        """Print them; the same as plain data."""
        print(f"ceilings: read {self.read / 1e9:.1f} GB/s, {self.dtype} matmul {self.matmul / 1e9:.0f} GFLOP/s")
        return {"read_GB_s": round(self.read / 1e9, 1), "matmul_GFLOP_s": round(self.matmul / 1e9, 1)}


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Takes some seconds, and 1 GiB (CPU) or 4 GiB (CUDA) for a moment.

    Runs in a process of its own: here it would leave idle OpenMP workers, which slow those of an engine, and memory of
    the card that torch keeps, which an engine's cache would miss.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        return other.submit(_measure, device, dtype, torch.get_num_threads()).result()


def _measure(device: str, dtype: str, threads: int) -> Ceilings:
    torch.set_num_threads(threads)
    on_cuda = device.startswith("cuda")
    data = torch.ones(1 << (30 if on_cuda else 28), device=device)
    read = data.nbytes / _best(data.sum, device)
    del data
    n = 8192 if on_cuda else 1536
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return Ceilings(read, 2 * n**3 / _best(lambda: a @ b, device), dtype)


def _best(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of 7 runs, after one that warms up."""
    taken = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine_title(device: str) -> str:
    """The processor or card that was measured, in a few words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def machine_facts() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """Of this checkout, with a + when files were changed; None where there is no git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
