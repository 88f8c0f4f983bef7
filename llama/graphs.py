"""`StepGraph`: a step as a CUDA graph, so that it costs one launch from the host instead of hundreds.

A graph replays fixed kernels on fixed addresses. So it has input buffers of its own that a step overwrites, and what
the step leaves of them is padding, which reaches no result. The work of a row is found on the device from its length,
so a graph serves every length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.batch import Batch, LastStep
from llama.cache import KVCache
from llama.model import Transformer

log = logging.getLogger("llama")

# Turns a step (a function that computes into fresh tensors) into a replay of it (into the same tensors, every time).
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """What a captured step reads, on the host or on the device; n_rows tokens of n_seqs sequences.

    token_ids, positions: [n_rows] int64. kv_index: [n_rows] int64, flat row of the cache; -1 for padding.
    unread_rows, unread_sources: [n_seqs] int64, rows whose token the host does not know, and its row of the last step.
    wanted: [n_seqs] int64, rows whose logits are made.
    cu_seqlens_q: [n_seqs + 1]. seqlens_k: [n_seqs]. block_tables: [n_seqs, width]. tiles: [n_tiles, 2]. All int32, as
    in `kernels.plan_capture`.
    """

    token_ids: Array
    positions: Array
    kv_index: Array
    unread_rows: Array
    unread_sources: Array
    wanted: Array
    cu_seqlens_q: Array
    seqlens_k: Array
    block_tables: Array
    tiles: Array


class StepGraph:
    """Of up to n_rows tokens of up to n_seqs sequences; n_tiles: of `kernels.prefill_tiles`."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        device: torch.device,
        max_seq_len: int,
        capture: Capture,
        n_rows: int,
        n_seqs: int,
        n_tiles: int,
    ) -> None:
        blank: StepInputs[np.ndarray] = StepInputs(
            token_ids=np.zeros(n_rows, np.int64),
            positions=np.zeros(n_rows, np.int64),
            kv_index=np.full(n_rows, -1, np.int64),
            unread_rows=np.zeros(n_seqs, np.int64),
            unread_sources=np.zeros(n_seqs, np.int64),
            wanted=np.zeros(n_seqs, np.int64),
            cu_seqlens_q=np.zeros(n_seqs + 1, np.int32),
            seqlens_k=np.zeros(n_seqs, np.int32),
            block_tables=np.zeros((n_seqs, -(-max_seq_len // cache.block_size)), np.int32),
            tiles=np.array([(0, -1)] * n_tiles, np.int32).reshape(-1, 2),
        )
        self._mirror = kernels.Mirror(device, *(getattr(blank, field.name) for field in fields(blank)))
        self._host: StepInputs[np.ndarray] = StepInputs(*self._mirror.arrays)
        self._device: StepInputs[Tensor] = StepInputs(*self._mirror.tensors)
        there = self._device
        attention = kernels.plan_capture(
            there.cu_seqlens_q, there.seqlens_k, there.block_tables, there.tiles, n_rows, max_seq_len
        )
        # What the graph reads must outlive it.
        self._batch = Batch(there.token_ids, there.positions, there.kv_index, attention, there.wanted)
        self._replay = capture(lambda: model.logits(model.forward(self._batch, cache)))

    def begin(self) -> StepInputs[np.ndarray]:
        """Arrays to write the next step into; they hold the last one. Waits until the device has read that."""
        self._mirror.wait()
        return self._host

    def run(self, n_unread: int, last: LastStep | None) -> Tensor:
        """What `begin` gave, computed. n_unread: how many of the step's tokens `last` has.

        Logits [n_seqs, vocab_size] fp32, of the rows `wanted`; valid until the next run of any graph.
        """
        self._mirror.send()
        if n_unread and last is not None:
            there = self._device
            last.fill(there.token_ids, there.unread_rows[:n_unread], there.unread_sources[:n_unread])
        return self._replay()


class GraphStore:
    """Graphs by what they serve, each made when first asked for. make: (n_rows, n_seqs, n_tiles) -> a graph."""

    def __init__(self, make: Callable[[int, int, int], StepGraph]) -> None:
        self._make = make
        self._graphs: dict[tuple[int, int, int], StepGraph | None] = {}

    def get(self, n_rows: int, n_seqs: int, n_tiles: int) -> StepGraph | None:
        """None for one that there was no memory for: its steps run kernel by kernel."""
        key = n_rows, n_seqs, n_tiles
        if key not in self._graphs:
            try:
                self._graphs[key] = self._make(*key)
            except torch.OutOfMemoryError as error:
                log.warning("no memory for a graph of %d tokens of %d sequences: %s", n_rows, n_seqs, error)
                self._graphs[key] = None
        return self._graphs[key]


def capture_cuda() -> Capture:
    """Capture into CUDA graphs that share their memory: what one computes may lie where another has its logits.

    For that they are captured on one stream, and the largest first.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compile every kernel and fill every cache: neither may happen while capturing
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    return capture


def sizes_up_to(most: int, sizes: tuple[int, ...]) -> list[int]:
    """Those below `most`, and then that itself, or the largest."""
    largest = min(most, sizes[-1])
    return [size for size in sizes if size < largest] + [largest]
