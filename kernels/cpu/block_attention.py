"""Attention block by block, for torch.compile: `QueryBlocks` is the plan, `attend_blocks` the sums.

Every query attends to each block of its keys separately, and the results of the blocks are merged (FlashDecoding: Dao
et al., 2023). So the blocks of all queries are one dimension, whatever their lengths. Inductor makes loops of it that
read keys and values in place; without a compiler every block is copied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_HIDDEN = -1e30  # a hidden token's score; finite, so that a block without a visible token weighs nothing and is not NaN
_LANES = 16  # fp32 numbers of a vector register with AVX-512


class QueryBlocks(NamedTuple):
    """The blocks that each query sees, query by query, and a last block of padding that no query sees.

    rows: [n_blocks + 1, block_size] int64, each token's row in the cache; row 0 where it is not seen.
    seen: [n_blocks + 1, block_size] bool. owners: [n_blocks + 1] int64, the block's query.
    tables: [n_queries, most] int64, at least 2 wide: the numbers of a query's blocks, then that of the padding.
    """

    rows: Tensor
    seen: Tensor
    owners: Tensor
    tables: Tensor

    @classmethod
    def plan(cls, n_keys: np.ndarray, block_tables: np.ndarray, block_size: int) -> QueryBlocks:
        """n_keys: [n_queries] int32 >= 1, seen by each. block_tables: [n_queries, width] int32, where they lie."""
        counts = -(-n_keys // block_size)
        n_queries, n_blocks, most = len(counts), int(counts.sum()), int(counts.max())
        owners = np.append(np.repeat(np.arange(n_queries), counts), 0)
        # The padding's place lies past the end of every query, so that nothing of it is seen.
        places = np.append(np.arange(n_blocks) - np.repeat(np.cumsum(counts) - counts, counts), most)
        tokens = np.arange(block_size)
        seen = places[:, None] * block_size + tokens < n_keys[owners][:, None]
        blocks = np.append(block_tables[owners[:-1], places[:-1]], 0).astype(np.int64)
        rows = np.where(seen, blocks[:, None] * block_size + tokens, 0)
        tables = np.full((n_queries, max(most, 2)), n_blocks)
        tables[owners[:-1], places[:-1]] = np.arange(n_blocks)
        return cls(*(torch.from_numpy(array) for array in (rows, seen, owners, tables)))


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: QueryBlocks) -> tuple[Tensor, list[Tensor]]:
    """q: [n_queries, n_heads, head_dim] fp32, rotated and scaled. k, v: the cache's rows [num_blocks * block_size,
    n_kv_heads, head_dim] fp32, row 0 finite. blocks: of these queries.

    Returns `kernels.paged_attention` [n_queries, n_heads, head_dim] fp32, and what a compiled function should return
    too: Inductor stores what it returns, and would compute the rest anew for everything that reads it.
    """
    n_queries, n_heads, head_dim = q.shape
    q = q.view(n_queries, k.shape[1], -1, head_dim)
    products = k[blocks.rows].unsqueeze(3) * q[blocks.owners].unsqueeze(1)
    # Hidden before the sum, in the same loop: [blocks, tokens, n_kv_heads, group].
    scores = torch.where(blocks.seen[:, :, None, None, None], products, _HIDDEN / head_dim).sum(-1)
    m_i, p, l_i, stored = _softmax_parts(scores.flatten(2))
    acc = _weigh_values(p.view_as(scores), v, blocks.rows).view(-1, n_heads, head_dim)

    m_blocks = m_i[blocks.tables]  # [n_queries, most, n_heads]
    alpha = torch.exp(m_blocks - m_blocks.amax(1, keepdim=True))
    l_query = (alpha * l_i[blocks.tables]).sum(1)
    out = (alpha.unsqueeze(-1) * acc[blocks.tables]).sum(1) / l_query.unsqueeze(-1)
    return out, [scores, p, alpha, *stored]


def _softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """scores: [blocks, tokens, heads]. Returns each block's maximum m_i [blocks, heads], p = exp(scores - m_i), the sum
    l_i of p over tokens, and what is to be stored. Heads that fill no vector register go several tokens at a time."""
    n_blocks, tokens, heads = scores.shape
    fold = _LANES // math.gcd(heads, _LANES)
    if tokens % fold:
        fold = 1
    wide = scores.view(n_blocks, tokens // fold, fold * heads)
    m_i = wide.amax(1).view(n_blocks, fold, heads).amax(1)
    m_wide = m_i.unsqueeze(1).expand(-1, fold, -1).reshape(n_blocks, 1, fold * heads)
    p = torch.exp(wide - m_wide)
    l_i = p.sum(1).view(n_blocks, fold, heads).sum(1)
    return m_i, p, l_i, [m_wide]


def _weigh_values(p: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """p: [blocks, tokens, n_kv_heads, group]. v: [cache rows, n_kv_heads, head_dim]. Returns each block's values
    weighted by p and summed over tokens, [blocks, n_kv_heads, group, head_dim].

    Vector by vector of a head: all its sums are one loop, which reads the head's values of a token together.
    """
    n_kv_heads, head_dim = v.shape[1:]
    lanes = math.gcd(head_dim, _LANES)
    if lanes < _LANES // 2:
        lanes = head_dim  # too many sums of too few numbers each
    vectors = v.view(-1, n_kv_heads, head_dim // lanes, lanes).unbind(2)
    sums = [(p.unsqueeze(-1) * vector[rows].unsqueeze(3)).sum(1) for vector in vectors]
    return torch.stack(sums, dim=3)
