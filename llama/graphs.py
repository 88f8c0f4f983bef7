"""`DecodeGraphs`: decode steps as CUDA graphs, so that a step costs one launch from the host instead of hundreds.

A graph replays fixed kernels on fixed addresses. So there is one for each of a few batch sizes, with input buffers of
its own that a step overwrites; rows beyond the step's own sequences are padding: length 0, and cache row -1, which is
written nowhere. The work of a row is found on the device from its length, so a graph serves every length.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.batch import Batch
from llama.cache import KVCache
from llama.model import Transformer
from llama.scheduler import Plan
from llama.sequence import Sequence

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Turns a step (a function that computes into fresh tensors) into a replay of it (into the same tensors, every time).
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class DecodeGraphs:
    """Graphs for up to `max_size` sequences (at most 256), each captured when first needed, or by `capture_all`."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        device: torch.device,
        max_seq_len: int,
        max_size: int,
        capture: Capture,
    ) -> None:
        self.model, self.cache, self.device, self.max_seq_len = model, cache, device, max_seq_len
        largest = min(max_size, SIZES[-1])
        self.sizes = [size for size in SIZES if size < largest] + [largest]
        self._capture = capture
        self._graphs: dict[int, DecodeGraph] = {}

    def serves(self, plan: Plan) -> bool:
        """Whether the plan is a decode of sequences that all yield a token, few enough for the largest graph."""
        return (
            len(plan.seqs) <= self.sizes[-1]
            and max(plan.counts) == 1
            and all(seq.num_computed + 1 == len(seq.token_ids) < seq.max_len for seq in plan.seqs)
        )

    def run(self, plan: Plan) -> Tensor:
        """Logits [len(plan.seqs), vocab_size] fp32; valid until the next run."""
        size = next(size for size in self.sizes if size >= len(plan.seqs))
        return self._graph(size).run(plan)[: len(plan.seqs)]

    def capture_all(self, up_to: int) -> None:
        """Capture the graphs for up to that many sequences, smallest first, so that serving need not stop for it."""
        for size in self.sizes:
            self._graph(size)
            if size >= up_to:
                break

    def _graph(self, size: int) -> DecodeGraph:
        if size not in self._graphs:
            self._graphs[size] = DecodeGraph(self.model, self.cache, self.device, self.max_seq_len, size, self._capture)
        return self._graphs[size]


class DecodeGraph:
    """One size. The inputs travel in one copy: [kv_index | positions | token_ids | lengths | tables] as int64."""

    def __init__(
        self, model: Transformer, cache: KVCache, device: torch.device, max_seq_len: int, size: int, capture: Capture
    ) -> None:
        self.size, self.block_size = size, cache.block_size
        self.width = -(-max_seq_len // cache.block_size)
        starts, lengths = np.arange(size + 1, dtype=np.int32), np.full(size, max_seq_len, np.int32)
        tables = np.zeros((size, self.width), np.int32)
        plan = kernels.plan_attention(starts, lengths, tables, cache.block_size, device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(size * (4 + self.width), dtype=torch.int64, pin_memory=pinned)
        self._inputs = torch.zeros_like(self._host, device=device)
        rows, lengths_in, tables_in = self._parts(self._inputs)
        batch = Batch(rows[2], rows[1], rows[0], plan, torch.arange(size, device=device))
        self._batch = batch  # what the graph reads must outlive it

        def step() -> Tensor:
            plan.seqlens_k.copy_(lengths_in)
            plan.block_tables.copy_(tables_in)
            return model.logits(model.forward(batch, cache))

        self._fill([])
        self._inputs.copy_(self._host)
        self._replay = capture(step)

    def run(self, plan: Plan) -> Tensor:
        self._fill(plan.seqs)
        self._inputs.copy_(self._host, non_blocking=True)
        return self._replay()

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows [3, size] (cache row, position, token), lengths [size] and tables [size, width] of a flat buffer."""
        size = self.size
        rows, lengths, tables = buffer.split([3 * size, size, size * self.width])
        return rows.view(3, size), lengths, tables.view(size, self.width)

    def _fill(self, seqs: list[Sequence]) -> None:
        rows, lengths, tables = (part.numpy() for part in self._parts(self._host))
        n, size = len(seqs), self.block_size
        for i, seq in enumerate(seqs):
            at, table = seq.num_computed, seq.block_table
            rows[:, i] = table[at // size] * size + at % size, at, seq.token_ids[at]
            tables[i, : len(table)] = table
        lengths[:n] = rows[1, :n] + 1
        rows[:, n:], lengths[n:] = np.array([[-1], [0], [0]]), 0


def capture_cuda() -> Capture:
    """Capture into CUDA graphs that share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
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
