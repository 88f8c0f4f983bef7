"""How long kernels take on this card, and the card's own ceilings, measured the same way.

A time is the median over replays of a CUDA graph, so it includes no launch from the host. A graph walks through so many
copies of its inputs that no call finds them in the L2 cache. The sides of a comparison are replayed in turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

COLD_BYTES = 256 << 20  # several times the L2 of any card
LEAST_CALLS = 4  # of one graph, so that it is not one short kernel
Call = Callable[[], object]
# Seconds per call of each side; a side is calls that do the same work on different copies.
Timer = Callable[[Sequence[Sequence[Call]]], list[float]]


@dataclass(frozen=True)
class Ceilings:
    """copy: GB/s, read and written together. read: GB/s. matmul: TFLOP/s of torch's own, bf16, 8192 each way."""

    copy: float
    read: float
    matmul: float


def copies(n_bytes: int) -> range:
    """How many copies of an input of so many bytes make it cold every time."""
    return range(max(1, min(64, -(-COLD_BYTES // n_bytes))))


def time_on_card(sides: Sequence[Sequence[Call]], replays: int = 30) -> list[float]:
    """The `Timer` of a CUDA device."""
    graphs = [_capture([*calls] * -(-LEAST_CALLS // len(calls))) for calls in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(replays):
        for (graph, n_calls), times in zip(graphs, seconds, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / n_calls)
    return [statistics.median(times[replays // 3 :]) for times in seconds]


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    for call in calls:
        call()  # compiled, and every buffer touched, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, len(calls)


def measure_ceilings(timer: Timer, device: torch.device) -> Ceilings:
    """Of memory with a gigabyte, of the matrix units with two random matrices."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    (copy,) = timer([[lambda: target.copy_(source)]])
    (read,) = timer([[lambda: source.sum()]])
    (matmul,) = timer([[lambda: a @ b]])
    n_bytes = source.numel() * source.itemsize
    return Ceilings(2 * n_bytes / copy / 1e9, n_bytes / read / 1e9, 2 * 8192**3 / matmul / 1e12)
