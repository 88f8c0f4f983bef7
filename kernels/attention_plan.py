"""`AttentionPlan`: where each sequence's queries lie in the batch and where its keys lie in the cache, for one step.

It is built once per step and read by every layer. The tensors serve the CUDA kernels; `cpu` holds what the plain-torch
twin can work out once instead of once per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.block_attention import QueryBlocks
from kernels.transfer import upload

# The twin's tiles in batch-invariant mode: rows of a query tile and keys of a key tile, both counted from position 0.
TILE_ROWS = 16
TILE_KEYS = 64
# One entry of the Triton kernels' list of work; every prefill tile divides it.
TILE_POSITIONS = 128
MAX_KV_HEADS = 128
# torch's attention on the CPU skips what causality hides by whole tiles of 512 keys only: a prompt within the first
# tile goes in parts of so many queries, which took 4.1 ms instead of 5.4 for 512 tokens and 12 heads. Behind it nothing
# is won.
_SKIPPED_KEYS = 512
_PART_QUERIES = 128
# Gathering the keys of several decoding sequences, for two batched matmuls, beats a call for each while the copies stay
# in the cores' caches: in a step of 32 with 12 heads of 64 and 95 keys each, 28 ms against 33.
_GATHER_BYTES = 4 << 20
_LEAST_GATHERED = 4  # a sequence of which not so many would fit is not gathered
_PART_BYTES = 512 << 10  # of copies, that one gather more has to save


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence of the batch on the CPU, or a part of its queries with the keys that they see.

    Blocks that lie side by side are read in place, others are gathered.
    """

    row: int  # first query row in the batch
    n_queries: int
    n_keys: int
    first_block: int
    scattered: Tensor | None  # [blocks in use] int64 where they do not lie side by side
    bias: Tensor | None  # [n_queries, n_keys] bool, True = visible; None: no mask, or causal from position 0


@dataclass(frozen=True, slots=True)
class Gather:
    """Some sequences with one query each, whose keys are gathered for one call.

    at: [n_seqs] int64, their query rows in the batch. rows: [n_seqs * n_kv_heads * longest] int64, rows of the cache as
    [.., head_dim]; past the end of a sequence, those of the pad block's first token. mask: [n_seqs, 1, 1, longest]
    fp32, to be added to the scores.
    """

    at: Tensor
    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class CpuWork:
    """A step's sequences, each in one of both lists."""

    gathers: list[Gather]
    spans: list[SequenceSpan]


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Query tiles of the batch-invariant twin, longest first.

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


class CpuPlan:
    """What attention on the CPU needs, in three forms; each is worked out when it is first asked for."""

    def __init__(
        self, cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, block_tables: np.ndarray, block_size: int
    ) -> None:
        self._starts, self._lengths, self._tables = cu_seqlens_q, seqlens_k, block_tables
        self._block_size = block_size
        self._work: dict[tuple[int, int], CpuWork] = {}

    def work(self, n_kv_heads: int, key_bytes: int) -> CpuWork:
        """key_bytes: of one token's keys; 0: nothing is gathered. Kept for the layers that ask for the same."""
        made = self._work.get((n_kv_heads, key_bytes))
        if made is None:
            decoding = np.flatnonzero(np.diff(self._starts) == 1)
            parts = _parts(decoding, self._lengths[decoding], key_bytes) if key_bytes else []
            gathered = set(np.concatenate(parts).tolist()) if parts else set()
            gathers = [self._gather(seqs, n_kv_heads) for seqs in parts]
            spans = [span for s in range(len(self._lengths)) if s not in gathered for span in self._spans(s)]
            made = self._work[n_kv_heads, key_bytes] = CpuWork(gathers, spans)
        return made

    def _spans(self, s: int) -> Iterator[SequenceSpan]:
        row, end, n_keys = int(self._starts[s]), int(self._starts[s + 1]), int(self._lengths[s])
        part = _PART_QUERIES if n_keys <= _SKIPPED_KEYS else end - row
        for first in range(row, end, part):
            last = min(first + part, end)
            yield _span(first, last - first, n_keys - (end - last), self._tables[s], self._block_size)

    def _gather(self, seqs: np.ndarray, n_kv_heads: int) -> Gather:
        lengths, size = self._lengths[seqs], self._block_size
        at = np.arange(int(lengths.max()))
        visible = at[None, :] < lengths[:, None]
        # Row by row, not block by block: what lies past an end may be another sequence's NaN, and 0 * NaN is NaN.
        blocks = self._tables[seqs[:, None], (at // size)[None, :]].astype(np.int64)
        tokens = np.where(visible, blocks * size + at % size, 0)
        rows = tokens[:, None, :] * n_kv_heads + np.arange(n_kv_heads)[None, :, None]
        mask = np.where(visible, np.float32(0), np.float32(-np.inf))
        places = torch.from_numpy(self._starts[seqs].astype(np.int64))
        return Gather(places, torch.from_numpy(rows.reshape(-1)), torch.from_numpy(mask)[:, None, None, :])

    @cached_property
    def blocks(self) -> QueryBlocks:
        """For `attend_blocks`, which all layers share."""
        n_queries = np.diff(self._starts)
        owners = np.repeat(np.arange(len(n_queries)), n_queries)
        after = self._starts[1:][owners] - np.arange(len(owners)) - 1  # later queries of the same sequence
        return QueryBlocks.plan(self._lengths[owners] - after, self._tables[owners], self._block_size)

    @cached_property
    def tiles(self) -> QueryTiles:
        """For batch-invariant attention."""
        return _tiles(self._starts, self._lengths, self._tables, self._block_size)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """What the Triton kernels need beyond the lengths.

    n_rows, last_block: query rows of the batch, and the highest block of its tables.
    tiles: [n_tiles, 2] int32 (sequence, t), longest first: positions t * TILE_POSITIONS on, of sequences with several
    queries. (0, -1) is padding of a captured graph. single: may a sequence with one query exist?
    arrivals: [n_seqs * MAX_KV_HEADS] int32 zeros, where the programs that share a sequence's keys count themselves.
    """

    n_rows: int
    last_block: int
    tiles: Tensor
    single: bool
    arrivals: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Layout of one step's batch.

    cu_seqlens_q: [n_seqs + 1] int32, running sum of the query rows per sequence.
    seqlens_k: [n_seqs] int32, keys per sequence, this step's included; 0 marks padding of a captured graph.
    block_tables: [n_seqs, width] int32, cache blocks per sequence, 0 past the end.
    max_seqlen_q, max_seqlen_k: the largest of each, on the host.
    cpu: only for CPU tensors. triton: only where operations run as Triton kernels.
    """

    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    cpu: CpuPlan | None = None
    triton: TritonPlan | None = None


def check_layout(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, tables: np.ndarray, block_size: int) -> None:
    """ValueError unless every query has its key and every key a block: on the device nothing could be refused."""
    n_queries = np.diff(cu_seqlens_q)
    if cu_seqlens_q[0] != 0 or len(n_queries) != len(seqlens_k) or n_queries.min() < 1:
        raise ValueError(f"cu_seqlens_q: expected 0 and {len(seqlens_k)} larger numbers, got {cu_seqlens_q.tolist()}")
    if (short := np.flatnonzero(seqlens_k < n_queries)).size:
        i = int(short[0])
        raise ValueError(f"seqlens_k[{i}]: expected at least its {n_queries[i]} queries, got {seqlens_k[i]}")
    if len(tables) != len(seqlens_k) or tables.shape[1] * block_size < seqlens_k.max():
        wanted = f"[{len(seqlens_k)}, >= {-(-int(seqlens_k.max()) // block_size)}]"
        raise ValueError(f"block_tables: expected shape {wanted}, got {list(tables.shape)}")
    if tables.min() < 0:
        raise ValueError(f"block_tables: expected blocks from 0 on, got {tables.min()}")


def _parts(seqs: np.ndarray, lengths: np.ndarray, key_bytes: int) -> list[np.ndarray]:
    """Those of the decoding sequences whose keys are to be gathered, in parts of like length, each in order."""
    short = lengths <= _GATHER_BYTES // (key_bytes * _LEAST_GATHERED)
    seqs, lengths = seqs[short], lengths[short]
    order = np.argsort(-lengths, kind="stable")
    return [np.sort(part) for part in _divided(seqs[order], lengths[order] * key_bytes) if len(part) > 1]


def _divided(seqs: np.ndarray, n_bytes: np.ndarray) -> list[np.ndarray]:
    """Sequences, the longest first, in parts that are copied as if all were as long as their first."""
    n = len(seqs)
    if n == 0:
        return []
    saved = (n_bytes[0] - n_bytes) * np.arange(n, 0, -1)
    cut = int(saved.argmax())
    if saved[cut] > _PART_BYTES:
        return _divided(seqs[:cut], n_bytes[:cut]) + _divided(seqs[cut:], n_bytes[cut:])
    return np.array_split(seqs, -(-n // int(_GATHER_BYTES // n_bytes[0])))


def _span(row: int, n_queries: int, n_keys: int, table: np.ndarray, block_size: int) -> SequenceSpan:
    blocks = table[: -(-n_keys // block_size)].tolist()
    side_by_side = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    bias = None
    if 1 < n_queries < n_keys:
        positions = np.arange(n_keys - n_queries, n_keys)
        bias = torch.from_numpy(np.arange(n_keys)[None, :] <= positions[:, None])
    scattered = None if side_by_side else torch.tensor(blocks)
    return SequenceSpan(row, n_queries, n_keys, blocks[0], scattered, bias)


def _tiles(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, tables: np.ndarray, block_size: int) -> QueryTiles:
    n_rows = int(cu_seqlens_q[-1])
    made: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # (key tiles, sequence, rows, positions)
    for s, (row, n_keys) in enumerate(zip(cu_seqlens_q[:-1].tolist(), seqlens_k.tolist(), strict=True)):
        n = int(cu_seqlens_q[s + 1]) - row
        first = n_keys - n
        # Row tiles at absolute multiples of TILE_ROWS: a row sits in the same place of its tile however it is chunked.
        for start in range(first - first % TILE_ROWS, n_keys, TILE_ROWS):
            positions = np.arange(start, start + TILE_ROWS)
            inside = (positions >= first) & (positions < n_keys)
            rows = np.where(inside, positions - first + row, n_rows)
            last = min(start + TILE_ROWS, n_keys) - 1
            made.append((last // TILE_KEYS + 1, s, rows, np.where(inside, positions, -1)))
    made.sort(key=lambda tile: -tile[0])
    rows = np.stack([tile[2] for tile in made])
    back = np.empty(n_rows + 1, np.int64)
    back[rows.reshape(-1)] = np.arange(rows.size)
    at = np.arange(made[0][0] * TILE_KEYS)
    keys = np.zeros((len(made), len(at)), np.int64)
    for i, (_, s, _, _) in enumerate(made):
        seen = at[: min(int(seqlens_k[s]), len(at))]
        keys[i, : len(seen)] = tables[s, seen // block_size].astype(np.int64) * block_size + seen % block_size
    return QueryTiles(
        torch.from_numpy(rows),
        torch.from_numpy(np.stack([tile[3] for tile in made])),
        torch.from_numpy(keys),
        [tile[0] for tile in made],
        torch.from_numpy(back[:n_rows].copy()),
    )


def plan_triton(
    cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, tables: np.ndarray, device: torch.device
) -> TritonPlan:
    """The Triton side of a plan. Arguments as in `AttentionPlan`, as numpy arrays."""
    n_queries = np.diff(cu_seqlens_q)
    (tiles,) = upload(device, prefill_tiles(cu_seqlens_q, seqlens_k))
    arrivals = torch.zeros(len(n_queries) * MAX_KV_HEADS, dtype=torch.int32, device=device)
    return TritonPlan(int(cu_seqlens_q[-1]), int(tables.max()), tiles, bool((n_queries == 1).any()), arrivals)


def tiles_of(first: int, n_queries: int) -> range:
    """The tiles that queries from position `first` on lie in."""
    return range(first // TILE_POSITIONS, -(-(first + n_queries) // TILE_POSITIONS))


def prefill_tiles(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray) -> np.ndarray:
    """`TritonPlan.tiles`, as a numpy array."""
    n_queries = np.diff(cu_seqlens_q)
    work = [
        (s, t)
        for s in np.flatnonzero(n_queries > 1).tolist()
        for t in tiles_of(int(seqlens_k[s] - n_queries[s]), int(n_queries[s]))
    ]
    work.sort(key=lambda item: -item[1])
    return np.array(work, np.int32).reshape(-1, 2)


def plan_capture(
    cu_seqlens_q: Tensor, seqlens_k: Tensor, block_tables: Tensor, tiles: Tensor, n_rows: int, max_seqlen_k: int
) -> AttentionPlan:
    """A plan for a graph to capture, of tensors on a card that hold something else in every replay.

    They are as `AttentionPlan` and `TritonPlan` say, and as long as the graph's largest step wants them. What a replay
    does not need of them is padding: sequences of no queries and length 0, rows that belong to no sequence, and tiles
    (0, -1). max_seqlen_k: the longest that a sequence can be.
    """
    arrivals = torch.zeros(len(seqlens_k) * MAX_KV_HEADS, dtype=torch.int32, device=seqlens_k.device)
    # Which blocks the tables will hold nobody can check from here: those of the scheduler's own sequences.
    work = TritonPlan(n_rows=n_rows, last_block=0, tiles=tiles, single=True, arrivals=arrivals)
    return AttentionPlan(cu_seqlens_q, seqlens_k, block_tables, n_rows, max_seqlen_k, triton=work)
