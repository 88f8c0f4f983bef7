"""`CpuPlan`: what attention on the CPU works out once per step instead of once per layer.

Each of its three forms is made when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.cpu.block_attention import QueryBlocks

# Rows of a query tile and keys of a key tile in batch-invariant mode, both counted from position 0.
TILE_ROWS = 16
TILE_KEYS = 64
# torch's attention skips hidden keys by whole tiles of this many. Only a prompt within the first tile gains from parts.
_SKIPPED_KEYS = 512
_PART_QUERIES = 128
# Gathering the keys of several sequences for two batched matmuls beats a call for each while the copies fit the caches.
_GATHER_BYTES = 4 << 20
_LEAST_GATHERED = 4  # sequences of one length that must fit, for that length to be gathered
_PART_BYTES = 512 << 10  # copied bytes that one more gather has to save


class SequenceSpan(NamedTuple):
    """One sequence of the batch, or a part of its queries with the keys that they see."""

    row: int  # first query row in the batch
    n_queries: int
    n_keys: int
    first_block: int
    scattered: Tensor | None  # [blocks in use] int64 where they are not adjacent and must be gathered
    bias: Tensor | None  # [n_queries, n_keys] bool, True = visible; None: no mask, or causal from position 0


class Gather(NamedTuple):
    """Some sequences with one query each, whose keys are gathered for one call.

    query_rows: [n_seqs] int64, rows of the batch. key_rows: [n_seqs * n_kv_heads * longest] int64, rows of the cache as
    [.., head_dim]; of token 0 past the end of a sequence. mask: [n_seqs, 1, 1, longest] fp32, added to the scores.
    """

    query_rows: Tensor
    key_rows: Tensor
    mask: Tensor


class CpuWork(NamedTuple):
    """A step's sequences; each is in one of the two lists."""

    gathers: list[Gather]
    spans: list[SequenceSpan]


class QueryTiles(NamedTuple):
    """Query tiles of batch-invariant attention, longest first.

    n_key_tiles: for each tile, how many key tiles hold a visible key (descending).
    rows: [n_tiles, TILE_ROWS] int64, the batch row of each tile row, or the batch's row count for padding.
    positions: [n_tiles, TILE_ROWS] int64, -1 for padding.
    keys: [n_tiles, whole key tiles * TILE_KEYS] int64, flat cache rows; 0 past the end of a sequence.
    back: [n_rows] int64, the flat tile row that computed each batch row.
    """

    n_key_tiles: list[int]
    rows: Tensor
    positions: Tensor
    keys: Tensor
    back: Tensor


@dataclass(frozen=True)
class CpuPlan(AttentionPlan):
    """A plan for tensors on the CPU."""

    block_size: int
    _work: dict[tuple[int, int], CpuWork] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.cu_seqlens_q.numpy(), self.seqlens_k.numpy(), self.block_tables.numpy()

    def work(self, n_kv_heads: int, key_bytes: int) -> CpuWork:
        """For torch's own attention. key_bytes: of one token's keys; 0: nothing is gathered. Kept for other layers."""
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
        row, end, length = int(starts[s]), int(starts[s + 1]), int(lengths[s])
        part = _PART_QUERIES if length <= _SKIPPED_KEYS else end - row
        for first in range(row, end, part):
            n_queries = min(part, end - first)
            n_keys = length - (end - first - n_queries)
            blocks = tables[s, : -(-n_keys // self.block_size)].tolist()
            adjacent = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
            bias = None
            if 1 < n_queries < n_keys:
                positions = np.arange(n_keys - n_queries, n_keys)
                bias = torch.from_numpy(np.arange(n_keys) <= positions[:, None])
            yield SequenceSpan(first, n_queries, n_keys, blocks[0], None if adjacent else torch.tensor(blocks), bias)

    def _gather(self, seqs: np.ndarray, n_kv_heads: int) -> Gather:
        starts, lengths, _ = self._arrays
        tokens, visible = self._key_rows(seqs, int(lengths[seqs].max()))
        key_rows = tokens[:, None, :] * n_kv_heads + np.arange(n_kv_heads)[:, None]
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, None, :]
        return Gather(*map(torch.from_numpy, (starts[seqs].astype(np.int64), key_rows.reshape(-1), mask)))

    def _key_rows(self, seqs: np.ndarray, n_keys: int) -> tuple[np.ndarray, np.ndarray]:
        """[len(seqs), n_keys] int64, the flat cache rows of these sequences' keys, and bool, whether the key exists.

        Past the end of a sequence stands row 0: the rest of its last block may hold another's NaN, and 0 * NaN is NaN.
        """
        _, lengths, tables = self._arrays
        at = np.arange(n_keys)
        exists = at < lengths[seqs, None]
        places = np.minimum(at // self.block_size, tables.shape[1] - 1)
        rows = tables[seqs[:, None], places].astype(np.int64) * self.block_size + at % self.block_size
        return np.where(exists, rows, 0), exists

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
        starts, lengths, _ = self._arrays
        n_rows, firsts = int(starts[-1]), lengths - np.diff(starts)  # the position of each sequence's first query
        # Tiles begin at multiples of TILE_ROWS: a row has the same place in its tile however its sequence is chunked.
        tiles = [
            (-(-min(at + TILE_ROWS, length) // TILE_KEYS), s, at)
            for s, (first, length) in enumerate(zip(firsts.tolist(), lengths.tolist(), strict=True))
            for at in range(first - first % TILE_ROWS, length, TILE_ROWS)
        ]
        tiles.sort(key=lambda tile: -tile[0])
        n_key_tiles, seqs, at = np.array(tiles).T
        positions = at[:, None] + np.arange(TILE_ROWS)
        inside = (positions >= firsts[seqs, None]) & (positions < lengths[seqs, None])
        rows = np.where(inside, positions + (starts[:-1] - firsts)[seqs, None], n_rows)
        back = np.empty(n_rows + 1, np.int64)
        back[rows] = np.arange(rows.size).reshape(rows.shape)
        keys, _ = self._key_rows(seqs, int(n_key_tiles[0]) * TILE_KEYS)
        arrays = rows, np.where(inside, positions, -1), keys, back[:n_rows]
        return QueryTiles(n_key_tiles.tolist(), *map(torch.from_numpy, arrays))


def plan_cpu(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, block_tables: np.ndarray, block_size: int) -> CpuPlan:
    """Arguments as in `kernels.plan_attention`; the plan shares their memory."""
    starts, lengths, tables = map(torch.from_numpy, (cu_seqlens_q, seqlens_k, block_tables))
    return CpuPlan(starts, lengths, tables, block_size)


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
