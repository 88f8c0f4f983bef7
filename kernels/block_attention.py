"""Attention block by block, for torch.compile: `QueryBlocks` is the plan, `attend_blocks` the sums.

Every query attends to each block of its keys by itself, and what the blocks give is put together (as FlashDecoding does
it: Dao et al., 2023). So the blocks of all queries are one dimension, whatever their lengths, every sum over tokens
has the same number of terms, and Inductor makes loops of it that read keys and values where they lie, as fast as memory
gives them. Run without a compiler it copies every block: the same numbers, slowly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The score of a token that is not to be seen. Finite, so that a block without any is worth nothing, and not NaN.
_UNSEEN = -1e30
# fp32 numbers of a vector register with AVX-512.
_LANES = 16


class QueryBlocks(NamedTuple):
    """The blocks that each query sees, one query's behind the other's, and a last one that nobody sees.

    rows: [n_blocks + 1, block_size] int64, each token's row in the cache; row 0 where it is not seen.
    seen: [n_blocks + 1, block_size] bool. owners: [n_blocks + 1] int64, the block's query.
    tables: [n_queries, most] int64, at least 2 wide: the numbers of a query's blocks, then nobody's, n_blocks.
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
        # The last one's place lies behind all that anybody has, so that nothing of it is seen.
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

    Returns `kernels.paged_attention` [n_queries, n_heads, head_dim] fp32, and what a compiled function should return as
    well: Inductor stores what it returns, and would compute the rest anew for everything that reads it.
    """
    n_queries, n_heads, head_dim = q.shape
    q = q.view(n_queries, k.shape[1], -1, head_dim)
    products = k[blocks.rows].unsqueeze(3) * q[blocks.owners].unsqueeze(1)
    # Hidden before they are summed, in the same loop: [blocks, tokens, n_kv_heads, group].
    scores = torch.where(blocks.seen[:, :, None, None, None], products, _UNSEEN / head_dim).sum(-1)
    top, part, total, stored = _exponents(scores.flatten(2))
    mixed = _mix(part.view_as(scores), v, blocks.rows).view(-1, n_heads, head_dim)

    tops = top[blocks.tables]  # [n_queries, most, n_heads]
    share = torch.exp(tops - tops.amax(1, keepdim=True))
    whole = (share * total[blocks.tables]).sum(1)
    out = (share.unsqueeze(-1) * mixed[blocks.tables]).sum(1) / whole.unsqueeze(-1)
    return out, [scores, part, share, *stored]


def _exponents(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """scores: [blocks, tokens, heads]. Returns each block's maximum [blocks, heads], exp(scores - it), the sum of those
    over tokens, and what is to be stored.

    Heads that do not fill vector registers are taken several tokens at a time: 12 heads took eight times as long.
    """
    n_blocks, tokens, heads = scores.shape
    fold = _LANES // math.gcd(heads, _LANES)
    if tokens % fold:
        fold = 1
    wide = scores.view(n_blocks, tokens // fold, fold * heads)
    top = wide.amax(1).view(n_blocks, fold, heads).amax(1)
    tops = top.unsqueeze(1).expand(-1, fold, -1).reshape(n_blocks, 1, fold * heads)
    part = torch.exp(wide - tops)
    total = part.sum(1).view(n_blocks, fold, heads).sum(1)
    return top, part, total, [tops]


def _mix(part: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """part: [blocks, tokens, n_kv_heads, group]. v: [cache rows, n_kv_heads, head_dim]. Returns each block's values
    weighted by its part and summed over tokens, [blocks, n_kv_heads, group, head_dim].

    Vector by vector of a head, so that all its sums are one loop, which reads the head's values of a token together.
    """
    n_kv_heads, head_dim = v.shape[1:]
    lanes = math.gcd(head_dim, _LANES)
    if lanes < _LANES // 2:
        lanes = head_dim  # too many sums of too few numbers each
    vectors = v.view(-1, n_kv_heads, head_dim // lanes, lanes).unbind(2)
    sums = [(part.unsqueeze(-1) * vector[rows].unsqueeze(3)).sum(1) for vector in vectors]
    return torch.stack(sums, dim=3)
