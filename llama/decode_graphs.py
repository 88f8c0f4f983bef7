"""`DecodeGraphs`: steps of one token each, as CUDA graphs for a few batch sizes.

The graphs' inputs keep what they hold from step to step: of the block tables only what was appended is written, as
long as a sequence keeps its row.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from torch import Tensor

from llama.batch import LastStep
from llama.graphs import GraphStore, StepGraph, StepInputs, sizes_up_to
from llama.scheduler import Plan

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class DecodeGraphs:
    """Graphs for up to `max_size` sequences (at most 256), each captured when first needed, or by `capture_all`."""

    def __init__(self, store: GraphStore, block_size: int, max_size: int) -> None:
        self._store, self.block_size = store, block_size
        self.sizes = sizes_up_to(max_size, SIZES)
        self._graphs: dict[int, DecodeGraph] = {}

    def serves(self, plan: Plan) -> bool:
        """Whether the plan is a decode of sequences that all yield a token, few enough for the largest graph."""
        return len(plan.seqs) <= self.sizes[-1] and max(plan.counts) == 1 and all(plan.yields)

    def run(self, plan: Plan, last: LastStep | None = None) -> Tensor | None:
        """Logits [len(plan.seqs), vocab_size] fp32; valid until the next run of any graph. None: there was no memory
        for the graph. last: has the tokens not read yet."""
        graph = self._of_size(next(size for size in self.sizes if size >= len(plan.seqs)))
        return None if graph is None else graph.run(plan, last)[: len(plan.seqs)]

    def capture_all(self, up_to: int) -> None:
        """Capture the graphs for up to that many sequences, largest first, so that serving need not stop for it."""
        for size in reversed(self.sizes[: bisect_left(self.sizes, up_to) + 1]):
            self._of_size(size)

    def _of_size(self, size: int) -> DecodeGraph | None:
        graph = self._store.get(size, size, 0)
        if graph is not None and size not in self._graphs:
            self._graphs[size] = DecodeGraph(graph, self.block_size, size)
        return self._graphs.get(size)


class DecodeGraph:
    """One size: row i is sequence i. Padding rows have length 0."""

    def __init__(self, graph: StepGraph, block_size: int, size: int) -> None:
        self._graph, self.block_size = graph, block_size
        inputs = graph.begin()
        inputs.cu_seqlens_q[:] = np.arange(size + 1)
        inputs.wanted[:] = np.arange(size)
        # What each row of the host's tables holds: how many blocks of which list. A sequence only ever appends to its
        # block table, or gets another list.
        self._held: list[tuple[list[int], int]] = [([], 0)] * size

    def run(self, plan: Plan, last: LastStep | None) -> Tensor:
        return self._graph.run(self._fill(self._graph.begin(), plan, last), last)

    def _fill(self, inputs: StepInputs[np.ndarray], plan: Plan, last: LastStep | None) -> int:
        """Write the plan. Returns how many of its tokens are not read yet."""
        n, size, held = len(plan.seqs), self.block_size, self._held
        tokens: list[int] = []
        unread: list[tuple[int, int]] = []
        for i, (seq, first) in enumerate(zip(plan.seqs, plan.firsts, strict=True)):
            ids, table = seq.token_ids, seq.block_table
            if held[i][0] is not table or held[i][1] != len(table):
                begin = held[i][1] if held[i][0] is table else 0
                inputs.block_tables[i, begin : len(table)] = table[begin:]
                held[i] = table, len(table)
            if first < len(ids) or last is None:
                tokens.append(ids[first])
            else:
                tokens.append(0)
                unread.append((i, last.row_of[seq]))
        positions, blocks = inputs.positions, inputs.block_tables
        positions[:n], inputs.token_ids[:n] = plan.firsts, tokens
        inputs.seqlens_k[:n] = positions[:n] + 1
        inputs.kv_index[:n] = blocks[np.arange(n), positions[:n] // size].astype(np.int64) * size + positions[:n] % size
        inputs.kv_index[n:], positions[n:], inputs.token_ids[n:], inputs.seqlens_k[n:] = -1, 0, 0, 0
        if unread:
            inputs.unread_rows[: len(unread)], inputs.unread_sources[: len(unread)] = zip(*unread, strict=True)
        return len(unread)
