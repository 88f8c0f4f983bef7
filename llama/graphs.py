"""`GraphExecutor`: decodes and steps with short prompts as CUDA graphs, which cost one launch from the host each.

A graph replays fixed kernels on fixed addresses. So a step overwrites input buffers, and what it leaves of them is
padding, which reaches no result. The device finds the work of a row from its length, so a graph serves every length.
There is one for each bucket of rows, sequences and tiles of prompts; decodes take the buckets without tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.batch import Batch, LastStep, Step
from llama.cache import KVCache
from llama.model import Transformer

log = logging.getLogger("llama")

# Turns a step (a function that computes into fresh tensors) into a replay of it (into the same tensors, every time).
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

Array = TypeVar("Array", np.ndarray, Tensor)

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PROMPT_SIZES = (16, 64, 128, 192, 256)
# Sequences and tiles of the buckets for prompts. Every layer starts programs for unused ones, too; and the more
# sequences, the fewer programs share the keys of each.
_PROMPT_SEQS_AND_TILES = ((4, 8), (12, 12), (32, 16))


class Bucket(NamedTuple):
    """What a graph has room for: tokens, sequences, and entries of `kernels.prefill_tiles`."""

    n_rows: int
    n_seqs: int
    n_tiles: int

    def holds(self, n_rows: int, n_seqs: int, n_tiles: int) -> bool:
        return n_rows <= self.n_rows and n_seqs <= self.n_seqs and n_tiles <= self.n_tiles


class StepInputs(NamedTuple, Generic[Array]):
    """What a captured step reads, on the host or on the device: int64, the last four int32."""

    token_ids: Array  # [n_rows]
    positions: Array  # [n_rows]
    kv_index: Array  # [n_rows], flat row of the cache; -1 for padding
    unread_rows: Array  # [n_seqs], rows whose token the host does not know
    unread_sources: Array  # [n_seqs], and its row of the last step
    logit_rows: Array  # [n_seqs], rows whose logits are made
    cu_seqlens_q: Array  # [n_seqs + 1]
    seqlens_k: Array  # [n_seqs]
    block_tables: Array  # [n_seqs, width]
    tiles: Array  # [n_tiles, 2]


class StepGraph:
    """The graph of one bucket."""

    def __init__(self, model: Transformer, cache: KVCache, capture: Capture, bucket: Bucket) -> None:
        n_rows, n_seqs, n_tiles = bucket
        max_seq_len = len(model.cos_sin)
        blank: StepInputs[np.ndarray] = StepInputs(
            token_ids=np.zeros(n_rows, np.int64),
            positions=np.zeros(n_rows, np.int64),
            kv_index=np.full(n_rows, -1, np.int64),
            unread_rows=np.zeros(n_seqs, np.int64),
            unread_sources=np.zeros(n_seqs, np.int64),
            logit_rows=np.zeros(n_seqs, np.int64),
            cu_seqlens_q=np.zeros(n_seqs + 1, np.int32),
            seqlens_k=np.zeros(n_seqs, np.int32),
            block_tables=np.zeros((n_seqs, -(-max_seq_len // cache.block_size)), np.int32),
            tiles=np.array([(0, -1)] * n_tiles, np.int32).reshape(-1, 2),
        )
        self._buffer = kernels.PinnedBuffer(model.embedding.device, *blank)
        self._host, inputs = StepInputs(*self._buffer.arrays), StepInputs(*self._buffer.tensors)
        attention = kernels.plan_capture(
            inputs.cu_seqlens_q, inputs.seqlens_k, inputs.block_tables, inputs.tiles, n_rows, max_seq_len
        )
        # What the graph reads must outlive it.
        self._device = inputs
        self._batch = Batch(inputs.token_ids, inputs.positions, inputs.kv_index, attention, inputs.logit_rows)
        self._replay = capture(lambda: model.logits(model.forward(self._batch, cache)))

    def run(self, step: Step, last: LastStep | None) -> Tensor:
        """Logits [sequences that yield a token, vocab_size] fp32; valid until the next run of any graph."""
        self._buffer.wait()
        _fill(self._host, step)
        self._buffer.send()
        if (n_unread := len(step.unread)) and last is not None:
            inputs = self._device
            last.fill(inputs.token_ids, inputs.unread_rows[:n_unread], inputs.unread_sources[:n_unread])
        return self._replay()[: len(step.sampled)]


def _fill(inputs: StepInputs[np.ndarray], step: Step) -> None:
    n_rows, (n_seqs, width), n_tiles = step.n_rows, step.block_tables.shape, len(step.tiles)
    n_logits, n_unread = len(step.sampled_rows), len(step.unread)
    inputs.token_ids[:n_rows], inputs.positions[:n_rows], inputs.kv_index[:n_rows] = step.rows
    inputs.token_ids[n_rows:], inputs.positions[n_rows:], inputs.kv_index[n_rows:] = 0, 0, -1
    inputs.cu_seqlens_q[: n_seqs + 1], inputs.cu_seqlens_q[n_seqs + 1 :] = step.cu_seqlens_q, n_rows
    inputs.seqlens_k[:n_seqs], inputs.seqlens_k[n_seqs:] = step.seqlens_k, 0
    inputs.block_tables[:n_seqs, :width] = step.block_tables
    inputs.tiles[:n_tiles], inputs.tiles[n_tiles:] = step.tiles, (0, -1)
    inputs.logit_rows[:n_logits], inputs.logit_rows[n_logits:] = step.sampled_rows, 0
    inputs.unread_rows[:n_unread], inputs.unread_sources[:n_unread] = step.unread.T


class GraphExecutor:
    """Serves steps of up to `max_seqs` decodes, or up to `max_tokens` tokens of up to 32 sequences (both at most 256).

    make: captures the graph of a bucket, when it is first needed or in `capture_all`.
    """

    def __init__(self, make: Callable[[Bucket], StepGraph], max_seqs: int, max_tokens: int) -> None:
        self._make = make
        self.decode_buckets = [Bucket(size, size, 0) for size in sizes_up_to(max_seqs, DECODE_SIZES)]
        self.prompt_buckets = [
            Bucket(size, min(n_seqs, size), n_tiles)
            for size in sizes_up_to(max_tokens, PROMPT_SIZES)
            for n_seqs, n_tiles in _PROMPT_SEQS_AND_TILES
        ]
        self._graphs: dict[Bucket, StepGraph | None] = {}

    def serves(self, step: Step) -> bool:
        return not step.prompt_spans and self._graph_for(step) is not None

    def run(self, step: Step, last: LastStep | None) -> Tensor | None:
        graph = self._graph_for(step)
        assert graph is not None
        logits = graph.run(step, last)
        return logits if step.sampled else None

    def capture_all(self, up_to: int) -> None:
        """Capture the graphs for up to that many sequences, largest first, so that serving need not stop for it."""
        prompts = [n_seqs for n_seqs, _ in _PROMPT_SEQS_AND_TILES]
        decodes = [bucket.n_seqs for bucket in self.decode_buckets]
        for buckets, sizes in ((self.prompt_buckets, prompts), (self.decode_buckets, decodes)):
            enough = next((size for size in sizes if size >= up_to), sizes[-1])
            for bucket in reversed(buckets):
                if bucket.n_seqs <= enough:
                    self._graph(bucket)

    def _graph_for(self, step: Step) -> StepGraph | None:
        """None: no bucket holds the step, or there was no memory for its graph."""
        n_rows, n_seqs = step.n_rows, len(step.seqlens_k)
        buckets = self.decode_buckets if n_rows == n_seqs else self.prompt_buckets
        if n_rows > buckets[-1].n_rows:
            return None
        n_tiles = len(step.tiles)
        bucket = next((bucket for bucket in buckets if bucket.holds(n_rows, n_seqs, n_tiles)), None)
        return None if bucket is None else self._graph(bucket)

    def _graph(self, bucket: Bucket) -> StepGraph | None:
        if bucket not in self._graphs:
            try:
                self._graphs[bucket] = self._make(bucket)
            except torch.OutOfMemoryError as error:
                log.warning("no memory for a graph of %d tokens of %d sequences: %s", *bucket[:2], error)
                self._graphs[bucket] = None
        return self._graphs[bucket]


def capture_cuda() -> Capture:
    """Capture into CUDA graphs that share their memory, so on one stream, and the largest first."""
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
