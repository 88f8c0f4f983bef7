"""`CpuPlan`: what attention on the CPU works out once per step instead of once per layer.

The plan has three forms, each made when it is first asked for: `work` for the plain path, `blocks` for compiled steps
and `tiles` for batch-invariant attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.cpu.block_attention import QueryBlocks

# Rows of a query tile and keys of a key tile in batch-invariant mode, both counted from position 0.
TILE_ROWS = 16
TILE_KEYS = 64
# torch's attention skips hidden keys by whole tiles of this many only. Within the first tile a prompt goes in parts of
# _PART_QUERIES; behind it, parts gain nothing.
_SKIPPED_KEYS = 512
_PART_QUERIES = 128
# Gathering the keys of several decoding sequences, for two batched matmuls, beats a call for each while the copies fit
# the cores' caches.
_GATHER_BYTES = 4 << 20
_LEAST_GATHERED = 4  # sequences of one length that must fit, for that length to be gathered
_PART_BYTES = 512 << 10  # copied bytes that one more gather has to save


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of the batch, or a part of its queries with the keys that they see.

    Adjacent blocks are read in place, others are gathered.
    """

    row: int  # first query row in the batch
    n_queries: int
    n_keys: int
    first_block: int
    scattered: Tensor | None  # [blocks in use] int64 where they are not adjacent
    bias: Tensor | None  # [n_queries, n_keys] bool, True = visible; None: no mask, or causal from position 0


@dataclass(frozen=True, slots=True)
class Gather:
    """Some sequences with one query each, whose keys are gathered for one call.

    query_rows: [n_seqs] int64, rows of the batch. key_rows: [n_seqs * n_kv_heads * longest] int64, rows of the cache as
    [.., head_dim]; those of block 0's first token past the end of a sequence. mask: [n_seqs, 1, 1, longest] fp32, to
    be added to the scores.
    """

    query_rows: Tensor
    key_rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class CpuWork:
    """A step's sequences; each is in one of the two lists."""

    gathers: list[Gather]
    spans: list[SequenceSpan]


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Query tiles of batch-invariant attention, longest first.

    rows: [n_tiles, TILE_ROWS] int64, the batch row of each tile row, or the batch's row count for padding.
    positions: [n_tiles, TILE_ROWS] int64, -1 for padding.
    keys: [n_tiles, whole key tiles * TILE_KEYS] int64, flat cache rows; 0 past the end of a sequence.
    n_key_tiles: for each tile, how many key tiles hold a visible key (descending).
    back: [n_rows] int64, the flat tile row that computed each batch row.
    """

    rows: Tensor
    positions: Tensor
    keys: Tensor
    n_key_tiles: list[int]
    back: Tensor


@dataclass(frozen=True)
class CpuPlan(AttentionPlan):
    """A plan for tensors on the CPU."""

    block_size: int
    _work: dict[tuple[int, int], CpuWork] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def cpu(self) -> CpuPlan:
        return self

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.cu_seqlens_q.numpy(), self.seqlens_k.numpy(), self.block_tables.numpy()

    def work(self, n_kv_heads: int, key_bytes: int) -> CpuWork:
        """key_bytes: of one token's keys; 0: nothing is gathered. The result is kept for the other layers."""
        work = self._work.get((n_kv_heads, key_bytes))
        if work is None:
            starts, lengths, _ = self._arrays
            decoding = np.flatnonzero(np.diff(starts) == 1)
            groups = _groups(decoding, lengths[decoding], key_bytes) if key_bytes else []
            gathered = set(np.concatenate(groups).tolist()) if groups else set()
            gathers = [self._gather(seqs, n_kv_heads) for seqs in groups]
            spans = [span for s in range(len(lengths)) if s not in gathered for span in self._spans(s)]
            work = self._work[n_kv_heads, key_bytes] = CpuWork(gathers, spans)
        return work

    def _spans(self, s: int) -> Iterator[SequenceSpan]:
        starts, lengths, tables = self._arrays
        row, end, n_keys = int(starts[s]), int(starts[s + 1]), int(lengths[s])
        part = _PART_QUERIES if n_keys <= _SKIPPED_KEYS else end - row
        for first in range(row, end, part):
            last = min(first + part, end)
            yield _span(first, last - first, n_keys - (end - last), tables[s], self.block_size)

    def _gather(self, seqs: np.ndarray, n_kv_heads: int) -> Gather:
        starts, lengths, tables = self._arrays
        at, size = np.arange(int(lengths[seqs].max())), self.block_size
        visible = at[None, :] < lengths[seqs][:, None]
        # Row by row, not block by block: past an end there may be NaN of another sequence, and 0 * NaN is NaN.
        blocks = tables[seqs[:, None], (at // size)[None, :]].astype(np.int64)
        tokens = np.where(visible, blocks * size + at % size, 0)
        key_rows = tokens[:, None, :] * n_kv_heads + np.arange(n_kv_heads)[None, :, None]
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, None, :]
        query_rows = starts[seqs].astype(np.int64)
        return Gather(*(torch.from_numpy(array) for array in (query_rows, key_rows.reshape(-1), mask)))

    @cached_property
    def blocks(self) -> QueryBlocks:
        """For `attend_blocks`."""
        starts, lengths, tables = self._arrays
        owners = np.repeat(np.arange(len(lengths)), np.diff(starts))
        later = starts[1:][owners] - np.arange(len(owners)) - 1  # later queries of the same sequence
        return QueryBlocks.plan(lengths[owners] - later, tables[owners], self.block_size)

    @cached_property
    def tiles(self) -> QueryTiles:
        """For batch-invariant attention."""
        return _tiles(*self._arrays, self.block_size)


def plan_cpu(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, block_tables: np.ndarray, block_size: int) -> CpuPlan:
    """Arguments as in `kernels.plan_attention`; the plan shares their memory."""
    return CpuPlan(
        torch.from_numpy(cu_seqlens_q), torch.from_numpy(seqlens_k), torch.from_numpy(block_tables), block_size
    )


def _groups(seqs: np.ndarray, lengths: np.ndarray, key_bytes: int) -> list[np.ndarray]:
    """Those of the decoding sequences whose keys are to be gathered, in groups of like length, each in order."""
    short = lengths <= _GATHER_BYTES // (key_bytes * _LEAST_GATHERED)
    seqs, lengths = seqs[short], lengths[short]
    order = np.argsort(-lengths, kind="stable")
    return [np.sort(group) for group in _split(seqs[order], lengths[order] * key_bytes) if len(group) > 1]


def _split(seqs: np.ndarray, n_bytes: np.ndarray) -> list[np.ndarray]:
    """Split sequences (longest first) into groups; a group is padded to its longest member."""
    n = len(seqs)
    if n == 0:
        return []
    saved = (n_bytes[0] - n_bytes) * np.arange(n, 0, -1)
    cut = int(saved.argmax())
    if saved[cut] > _PART_BYTES:
        return _split(seqs[:cut], n_bytes[:cut]) + _split(seqs[cut:], n_bytes[cut:])
    return np.array_split(seqs, -(-n // int(_GATHER_BYTES // n_bytes[0])))


def _span(row: int, n_queries: int, n_keys: int, table: np.ndarray, block_size: int) -> SequenceSpan:
    blocks = table[: -(-n_keys // block_size)].tolist()
    adjacent = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    bias = None
    if 1 < n_queries < n_keys:
        positions = np.arange(n_keys - n_queries, n_keys)
        bias = torch.from_numpy(np.arange(n_keys)[None, :] <= positions[:, None])
    return SequenceSpan(row, n_queries, n_keys, blocks[0], None if adjacent else torch.tensor(blocks), bias)


def _tiles(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, tables: np.ndarray, block_size: int) -> QueryTiles:
    n_rows = int(cu_seqlens_q[-1])
    tiles: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # (key tiles, sequence, rows, positions)
    for s, (row, n_keys) in enumerate(zip(cu_seqlens_q[:-1].tolist(), seqlens_k.tolist(), strict=True)):
        first = n_keys - (int(cu_seqlens_q[s + 1]) - row)
        # Row tiles at absolute multiples of TILE_ROWS: a row sits in the same place of its tile however it is chunked.
        for start in range(first - first % TILE_ROWS, n_keys, TILE_ROWS):
            positions = np.arange(start, start + TILE_ROWS)
            inside = (positions >= first) & (positions < n_keys)
            rows = np.where(inside, positions - first + row, n_rows)
            last = min(start + TILE_ROWS, n_keys) - 1
            tiles.append((last // TILE_KEYS + 1, s, rows, np.where(inside, positions, -1)))
    tiles.sort(key=lambda tile: -tile[0])
    rows = np.stack([tile[2] for tile in tiles])
    back = np.empty(n_rows + 1, np.int64)
    back[rows.reshape(-1)] = np.arange(rows.size)
    at = np.arange(tiles[0][0] * TILE_KEYS)
    keys = np.zeros((len(tiles), len(at)), np.int64)
    for i, (_, s, _, _) in enumerate(tiles):
        seen = at[: min(int(seqlens_k[s]), len(at))]
        keys[i, : len(seen)] = tables[s, seen // block_size].astype(np.int64) * block_size + seen % block_size
    return QueryTiles(
        torch.from_numpy(rows),
        torch.from_numpy(np.stack([tile[3] for tile in tiles])),
        torch.from_numpy(keys),
        [tile[0] for tile in tiles],
        torch.from_numpy(back[:n_rows].copy()),
    )
