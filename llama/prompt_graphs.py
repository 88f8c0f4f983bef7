"""`PromptGraphs`: steps with short prompts, or pieces of them, as CUDA graphs for a few numbers of tokens.

Kernel by kernel, a step of Llama-2 7B is 290 launches of some 20 microseconds of Python each. By its rates on paper a
card needs less than that with few tokens, the time of reading the weights, and more from some hundred tokens on.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from torch import Tensor

import kernels
from llama.batch import LastStep, Layout
from llama.graphs import GraphStore, StepGraph, StepInputs, sizes_up_to
from llama.scheduler import Plan

SIZES = (16, 64, 128, 192, 256)
# Sequences of a graph, and its tiles of attention for pieces of more than one token. For what a step does not use of
# them, every layer starts programs that find nothing to do; and the more sequences, the fewer programs share the keys
# of one.
_ROOMS = ((4, 8), (12, 12), (32, 16))


class PromptGraphs:
    """Graphs for steps of up to `max_tokens` tokens (at most 256) of up to 32 sequences, each captured when first
    needed, or by `capture_all`."""

    def __init__(self, store: GraphStore, block_size: int, max_tokens: int) -> None:
        self._store, self.block_size = store, block_size
        self.sizes = sizes_up_to(max_tokens, SIZES)

    def serves(self, plan: Plan) -> bool:
        """Whether the plan's tokens, sequences and pieces of prompts are few enough."""
        return plan.n_tokens <= self.sizes[-1] and _room(plan) is not None

    def run(self, plan: Plan, rows: list[int], last: LastStep | None = None) -> Tensor | None:
        """Logits [len(rows), vocab_size] fp32 of those rows, at most one of each sequence; valid until the next run of
        any graph. None: there was no memory for the graph. last: has the tokens not read yet."""
        room = _room(plan)
        assert room is not None
        graph = self._graph(next(size for size in self.sizes if size >= plan.n_tokens), *room)
        if graph is None:
            return None
        layout = Layout.of(plan, self.block_size, last)
        _fill(graph.begin(), layout, rows)
        return graph.run(len(layout.unread), last)[: len(rows)]

    def capture_all(self, up_to: int) -> None:
        """Capture the graphs for up to that many sequences, largest first, so that serving need not stop for it."""
        rooms = _ROOMS[: bisect_left(_ROOMS, (up_to,)) + 1]
        for size in reversed(self.sizes):
            for room in reversed(rooms):
                self._graph(size, *room)

    def _graph(self, n_rows: int, n_seqs: int, n_tiles: int) -> StepGraph | None:
        return self._store.get(n_rows, min(n_seqs, n_rows), n_tiles)


def _room(plan: Plan) -> tuple[int, int] | None:
    """The smallest that the plan's sequences and tiles fit into."""
    pieces = zip(plan.firsts, plan.counts, strict=True)
    n_tiles = sum(len(kernels.tiles_of(first, n)) for first, n in pieces if n > 1)
    return next((room for room in _ROOMS if len(plan.seqs) <= room[0] and n_tiles <= room[1]), None)


def _fill(inputs: StepInputs[np.ndarray], layout: Layout, rows: list[int]) -> None:
    n_rows, (n_seqs, width) = layout.rows.shape[1], layout.block_tables.shape
    tiles = kernels.prefill_tiles(layout.cu_seqlens_q, layout.seqlens_k)
    inputs.token_ids[:n_rows], inputs.positions[:n_rows], inputs.kv_index[:n_rows] = layout.rows
    inputs.token_ids[n_rows:], inputs.positions[n_rows:], inputs.kv_index[n_rows:] = 0, 0, -1
    inputs.cu_seqlens_q[: n_seqs + 1], inputs.cu_seqlens_q[n_seqs + 1 :] = layout.cu_seqlens_q, n_rows
    inputs.seqlens_k[:n_seqs], inputs.seqlens_k[n_seqs:] = layout.seqlens_k, 0
    inputs.block_tables[:n_seqs, :width] = layout.block_tables
    inputs.tiles[: len(tiles)], inputs.tiles[len(tiles) :] = tiles, (0, -1)
    inputs.wanted[: len(rows)], inputs.wanted[len(rows) :] = rows, 0
    n_unread = len(layout.unread)
    inputs.unread_rows[:n_unread], inputs.unread_sources[:n_unread] = layout.unread.T
