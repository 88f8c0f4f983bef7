"""`AttentionPlan`: where the queries of each sequence lie in the batch and its keys in the cache, for one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.transfer import to_device

# One entry of the Triton kernels' list of work; every prefill tile divides it.
TILE_POSITIONS = 128
MAX_KV_HEADS = 128


@dataclass(frozen=True)
class AttentionPlan:
    """Layout of one step's batch, built once and read by every layer.

    cu_seqlens_q: [n_seqs + 1] int32, running sum of the query rows per sequence.
    seqlens_k: [n_seqs] int32, keys per sequence, this step's included; 0 marks padding of a captured graph.
    block_tables: [n_seqs, width] int32, cache blocks per sequence, 0 past the end.
    """

    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_tables: Tensor


@dataclass(frozen=True)
class TritonPlan(AttentionPlan):
    """A plan for the Triton kernels.

    tiles: [n_tiles, 2] int32 (sequence, t), longest first: positions from t * TILE_POSITIONS on, of sequences with
    several queries. (0, -1) pads a captured graph. single: whether a sequence may have one query.
    semaphores: [n_seqs * MAX_KV_HEADS] int32 zeros, where the programs that share a sequence's keys count themselves.
    n_rows: query rows of the batch. max_seqlen_k: the largest of seqlens_k. last_block: the highest of block_tables.
    """

    tiles: Tensor
    single: bool
    semaphores: Tensor
    n_rows: int
    max_seqlen_k: int
    last_block: int


def plan_triton(
    cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, block_tables: np.ndarray, device: torch.device
) -> TritonPlan:
    """The plan of a step whose layout is known on the host. Arguments as in `kernels.plan_attention`."""
    arrays = cu_seqlens_q, seqlens_k, block_tables, prefill_tiles(cu_seqlens_q, seqlens_k)
    starts, lengths, tables, tiles = to_device(device, *arrays)
    single, semaphores = bool((np.diff(cu_seqlens_q) == 1).any()), _semaphores(len(seqlens_k), device)
    n_rows, longest, last_block = int(cu_seqlens_q[-1]), int(seqlens_k.max()), int(block_tables.max())
    return TritonPlan(starts, lengths, tables, tiles, single, semaphores, n_rows, longest, last_block)


def plan_capture(
    cu_seqlens_q: Tensor, seqlens_k: Tensor, block_tables: Tensor, tiles: Tensor, n_rows: int, max_seqlen_k: int
) -> TritonPlan:
    """A plan for a graph to capture. max_seqlen_k: the longest that a sequence can be.

    The tensors are as in `TritonPlan`, on a card, long enough for the graph's largest step, and written before every
    replay. The rest is padding: sequences of no queries and length 0, rows of no sequence, and tiles (0, -1).
    """
    semaphores = _semaphores(len(seqlens_k), seqlens_k.device)
    last_block = 0  # what the tables will hold cannot be checked from here
    return TritonPlan(cu_seqlens_q, seqlens_k, block_tables, tiles, True, semaphores, n_rows, max_seqlen_k, last_block)


def _semaphores(n_seqs: int, device: torch.device) -> Tensor:
    return torch.zeros(n_seqs * MAX_KV_HEADS, dtype=torch.int32, device=device)


def tiles_of(first: int, n_queries: int) -> range:
    """The tiles that queries from position `first` on lie in."""
    return range(first // TILE_POSITIONS, -(-(first + n_queries) // TILE_POSITIONS))


def prefill_tiles(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray) -> np.ndarray:
    """`TritonPlan.tiles` as a numpy array."""
    n_queries = np.diff(cu_seqlens_q)
    several = np.flatnonzero(n_queries > 1).tolist()
    work = [(s, t) for s in several for t in tiles_of(int(seqlens_k[s] - n_queries[s]), int(n_queries[s]))]
    work.sort(key=lambda item: -item[1])
    return np.array(work, np.int32).reshape(-1, 2)
