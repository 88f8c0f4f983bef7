"""`DecodeGraphs`: decode steps as CUDA graphs, so that a step costs one launch from the host instead of hundreds.

A graph replays fixed kernels on fixed addresses. So there is one for each of a few batch sizes, with input buffers of
its own that a step overwrites; rows beyond the step's own sequences are padding: length 0, and cache row -1, which is
written nowhere. The work of a row is found on the device from its length, so a graph serves every length.

The buffers keep what they hold from step to step: of the block tables only what was appended is written, as long as a
sequence keeps its row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.batch import Batch, LastStep
from llama.cache import KVCache
from llama.model import Transformer
from llama.scheduler import Plan

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
        return len(plan.seqs) <= self.sizes[-1] and max(plan.counts) == 1 and all(plan.yields)

    def run(self, plan: Plan, last: LastStep | None = None) -> Tensor:
        """Logits [len(plan.seqs), vocab_size] fp32; valid until the next run. last: has the tokens not read yet."""
        size = next(size for size in self.sizes if size >= len(plan.seqs))
        return self._graph(size).run(plan, last)[: len(plan.seqs)]

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
    """One size. The inputs travel in one copy, as int64: six columns [size], then the block tables [size, width].

    The columns: cache row, position, token, row whose token is not read yet, its row of the last step, length.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, device: torch.device, max_seq_len: int, size: int, capture: Capture
    ) -> None:
        self.size, self.block_size = size, cache.block_size
        self.width = -(-max_seq_len // cache.block_size)
        starts, lengths = np.arange(size + 1, dtype=np.int32), np.full(size, max_seq_len, np.int32)
        tables = np.zeros((size, self.width), np.int32)
        plan = kernels.plan_attention(starts, lengths, tables, cache.block_size, device)
        on_cuda = device.type == "cuda"
        self._host = torch.zeros(size * (6 + self.width), dtype=torch.int64, pin_memory=on_cuda)
        self._columns, self._tables = (part.numpy() for part in self._parts(self._host))
        self._columns[:3] = [[-1], [0], [0]]
        self._inputs = self._host.to(device)
        self._device_columns, device_tables = self._parts(self._inputs)
        kv_index, positions, token_ids, _, _, device_lengths = self._device_columns.unbind(0)
        batch = Batch(token_ids, positions, kv_index, plan, torch.arange(size, device=device))
        self._batch = batch  # what the graph reads must outlive it
        self._copied = torch.cuda.Event() if on_cuda else None
        # What each row of the host's tables holds: how many blocks of which list. A sequence only ever appends to its
        # block table, or gets another list.
        self._held: list[tuple[list[int], int]] = [([], 0)] * size

        def step() -> Tensor:
            plan.seqlens_k.copy_(device_lengths)
            plan.block_tables.copy_(device_tables)
            return model.logits(model.forward(batch, cache))

        self._replay = capture(step)

    def run(self, plan: Plan, last: LastStep | None) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy out of the buffer; made by now, but for a stalled device
        n_unread = self._fill(plan, last)
        self._inputs.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if n_unread and last is not None:
            last.fill(self._batch.token_ids, self._device_columns[3, :n_unread], self._device_columns[4, :n_unread])
        return self._replay()

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [6, size] and tables [size, width] of a flat buffer."""
        columns, tables = buffer.split([6 * self.size, self.size * self.width])
        return columns.view(6, self.size), tables.view(self.size, self.width)

    def _fill(self, plan: Plan, last: LastStep | None) -> int:
        """Write the plan into the host's buffer. Returns how many of its tokens are not read yet."""
        n, size, held = len(plan.seqs), self.block_size, self._held
        tokens: list[int] = []
        unread: list[tuple[int, int]] = []
        for i, (seq, first) in enumerate(zip(plan.seqs, plan.firsts, strict=True)):
            ids, table = seq.token_ids, seq.block_table
            if held[i][0] is not table or held[i][1] != len(table):
                begin = held[i][1] if held[i][0] is table else 0
                self._tables[i, begin : len(table)] = table[begin:]
                held[i] = table, len(table)
            if first < len(ids) or last is None:
                tokens.append(ids[first])
            else:
                tokens.append(0)
                unread.append((i, last.row_of[seq]))
        kv_index, positions, token_ids, _, _, lengths = self._columns
        positions[:n], token_ids[:n] = plan.firsts, tokens
        lengths[:n] = positions[:n] + 1
        kv_index[:n] = self._tables[np.arange(n), positions[:n] // size] * size + positions[:n] % size
        kv_index[n:], positions[n:], token_ids[n:], lengths[n:] = -1, 0, 0, 0
        if unread:
            self._columns[3:5, : len(unread)] = np.array(unread).T
        return len(unread)


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
