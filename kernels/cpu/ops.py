"""The operations tuned for CPUs: names and signatures of `kernels.reference`, which the tests compare them with.

With `batch_invariant=True` the bits of a row depend on that row alone. With another number of threads, a narrow and
long matrix may sum in another order. Three things in torch move bits and are avoided here:
- `x @ w.T` rounds a row differently for 1, 2, 3, 5, 7 or 9 rows: rows go through in tiles of exactly 16;
- `silu`, `sigmoid` and `exp2` have another formula for the last elements of a buffer: everything is written with `exp`;
- scaled_dot_product_attention picks its loop by the number of queries: queries and keys go in 16 x 64 tiles counted
  from position 0 of their sequence.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.cpu.attention_plan import TILE_KEYS, TILE_ROWS, CpuPlan, Gather, QueryTiles, SequenceSpan
from kernels.linear_weight import LinearWeight
from kernels.reference import Filters, apply_penalties, draw, last_kept, softmax_at, top_threshold, uniform

__all__ = [
    "apply_penalties", "linear", "paged_attention", "rms_norm", "rope_write", "sample", "swiglu", "token_logprobs",
    "uniform",
]  # fmt: skip

_HIDDEN = -1e30  # a minus infinity that can be subtracted from itself
_FIRST_LOOK = 256  # this many best tokens of a row decide most top-k and top-p


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    wide = summed.float()
    # One row takes as long as its number of operators says, and F.rms_norm runs more of them.
    norm = torch.linalg.vector_norm(wide, 2, (-1,), True)
    scale = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return torch.mul(wide, scale).to(x.dtype).mul_(weight), summed


@lru_cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    if not batch_invariant:
        return _matmul(x, weight)
    tiles = [_matmul(tile, weight) for tile in F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS)).split(TILE_ROWS)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: len(x)]


def _matmul(x: Tensor, weight: LinearWeight) -> Tensor:
    if weight.blocked:
        return torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")
    return F.linear(x, weight.data)


def swiglu(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if not batch_invariant:
        return F.silu(gate).mul_(up)
    wide = gate.float()
    return (wide / (1.0 + torch.exp(-wide))).to(gate.dtype) * up


def rope_write(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, kv_index: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    n_kv_heads, head_dim = k_cache.shape[2:]
    rows, half = qkv.shape[0], head_dim // 2
    qk, v = qkv.view(rows, -1, 2, half).split((n_heads + n_kv_heads, n_kv_heads), dim=1)
    cos, sin = cos_sin.index_select(0, positions).view(rows, 2, 1, half).unbind(1)
    wide = qk.float()
    rotated = wide * cos.unsqueeze(1)
    (first, second), (x_first, x_second) = rotated.unbind(2), wide.unbind(2)
    first.addcmul_(x_second, sin, value=-1)
    second.addcmul_(x_first, sin)
    q, k = rotated.to(k_cache.dtype).view(rows, -1, head_dim).split((n_heads, n_kv_heads), dim=1)
    v = v.reshape(rows, n_kv_heads, head_dim).to(v_cache.dtype)
    k_cache.view(-1, n_kv_heads, head_dim).index_copy_(0, kv_index, k)
    v_cache.view(-1, n_kv_heads, head_dim).index_copy_(0, kv_index, v)
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    if not isinstance(plan, CpuPlan):
        raise ValueError("plan: made for a CUDA kernel, but the tensors are on the CPU")
    if batch_invariant:
        return _attend_tiles(q, k_cache, v_cache, plan.tiles, scale)
    # The matmuls over gathered keys would round the scores of 16-bit keys. The engine's cache is fp32.
    key_bytes = k_cache[0, 0].numel() * k_cache.element_size() if k_cache.dtype == torch.float32 else 0
    work = plan.work(k_cache.shape[2], key_bytes)
    if len(work.gathers) + len(work.spans) == 1:  # it holds all rows, in order
        if work.gathers:
            return _attend_gathered(q, k_cache, v_cache, work.gathers[0], scale)
        return _attend_span(q, k_cache, v_cache, work.spans[0], scale)
    out = torch.empty_like(q)
    for part in work.gathers:
        at = part.query_rows
        out.index_copy_(0, at, _attend_gathered(q.index_select(0, at), k_cache, v_cache, part, scale))
    for span in work.spans:
        rows = slice(span.row, span.row + span.n_queries)
        out[rows] = _attend_span(q[rows], k_cache, v_cache, span, scale)
    return out


def _attend_gathered(q: Tensor, k_cache: Tensor, v_cache: Tensor, part: Gather, scale: float) -> Tensor:
    """One query per sequence, and the heads of a group in the place of queries.

    All heads of all sequences are one batch of matrices. scaled_dot_product_attention calls a matmul for each of them.
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads, longest = k_cache.shape[2], part.mask.shape[-1]
    k, v = (c.view(-1, head_dim).index_select(0, part.key_rows).view(-1, longest, head_dim) for c in (k_cache, v_cache))
    scores = torch.bmm(q.reshape(n * n_kv_heads, -1, head_dim), k.transpose(1, 2)).view(n, n_kv_heads, -1, longest)
    weights = torch.softmax(torch.add(part.mask, scores, alpha=scale), -1)
    return torch.bmm(weights.view(n * n_kv_heads, -1, longest), v).view(n, n_heads, head_dim)


def _attend_span(q: Tensor, k_cache: Tensor, v_cache: Tensor, span: SequenceSpan, scale: float) -> Tensor:
    """All queries of one sequence or of a part, straight from the cache where its blocks are adjacent."""
    n, n_heads, head_dim = q.shape
    n_kv_heads = k_cache.shape[2]
    group = n_heads // n_kv_heads
    if span.scattered is None:
        block_stride, row_stride, head_stride, _ = k_cache.stride()
        shape, strides = (1, n_kv_heads, span.n_keys, head_dim), (block_stride, head_stride, row_stride, 1)
        first = span.first_block * block_stride
        k, v = (c.as_strided(shape, strides, c.storage_offset() + first) for c in (k_cache, v_cache))
    else:
        k, v = (c.index_select(0, span.scattered).view(1, -1, n_kv_heads, head_dim) for c in (k_cache, v_cache))
        k, v = (c[:, : span.n_keys].transpose(1, 2) for c in (k, v))
    if n == 1:
        return F.scaled_dot_product_attention(q.view(1, n_kv_heads, group, head_dim), k, v, scale=scale).view_as(q)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=span.bias, is_causal=span.bias is None, scale=scale
    )
    return out[0].transpose(0, 1)


def _attend_tiles(q: Tensor, k_cache: Tensor, v_cache: Tensor, tiles: QueryTiles, scale: float) -> Tensor:
    """Flash attention (arXiv 2205.14135) in tiles of fixed shape; tiles that need no further keys drop out."""
    n_heads, head_dim = q.shape[1:]
    n_kv_heads = k_cache.shape[2]
    group = n_heads // n_kv_heads
    keys, values = (c.view(-1, n_kv_heads, head_dim) for c in (k_cache, v_cache))
    n_tiles = tiles.rows.shape[0]
    # [tiles, kv_heads, group * TILE_ROWS, head_dim]: one matrix per tile and key head
    queries = F.pad(q, (0, 0, 0, 0, 0, 1))[tiles.rows].float() * scale
    queries = queries.view(n_tiles, TILE_ROWS, n_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    positions = tiles.positions.repeat(1, group)[:, None, :, None]
    m_i = queries.new_full((*queries.shape[:3], 1), _HIDDEN)
    l_i, acc = torch.zeros_like(m_i), torch.zeros_like(queries)
    for t in range(tiles.n_key_tiles[0]):
        live = sum(n > t for n in tiles.n_key_tiles)
        columns = slice(t * TILE_KEYS, (t + 1) * TILE_KEYS)
        rows = tiles.keys[:live, columns]
        # contiguous() even where a view would do: the matmul must see one layout however many tiles are live
        k, v = (c[rows].float().transpose(1, 2).contiguous() for c in (keys, values))
        visible = torch.arange(columns.start, columns.stop) <= positions[:live]
        scores = torch.where(visible, queries[:live] @ k.transpose(2, 3), _HIDDEN)
        m_new = torch.maximum(m_i[:live], scores.amax(-1, keepdim=True))
        alpha = torch.exp(m_i[:live] - m_new)
        p = torch.where(visible, torch.exp(scores - m_new), 0.0)
        l_i[:live] = l_i[:live] * alpha + p.sum(-1, keepdim=True)
        acc[:live] = acc[:live] * alpha + p @ v
        m_i[:live] = m_new
    out = (acc / l_i).view(n_tiles, n_kv_heads, group, TILE_ROWS, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_tiles * TILE_ROWS, n_heads, head_dim)[tiles.back].to(q.dtype)


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.long().clamp(min=0)[:, None])[:, 0]
    if n_top == 0:
        empty = logits.new_empty((logits.shape[0], 0))
        return chosen, empty.long(), empty
    # A stable sort puts the lowest id first among equals; topk promises no order there.
    n_wide = min(logits.shape[1], n_top + 32)
    top, ids = logprobs.topk(n_wide, dim=-1)
    if n_wide < logits.shape[1] and bool((top[:, n_top - 1] == top[:, -1]).any()):
        top, ids = logprobs.sort(dim=-1, descending=True, stable=True)  # equals may lie beyond the ones looked at
    by_id = ids.argsort(dim=-1)
    ids, top = ids.gather(1, by_id), top.gather(1, by_id)
    order = top.argsort(dim=-1, descending=True, stable=True)[:, :n_top]
    return chosen, ids.gather(1, order), top.gather(1, order)


def sample(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    # NumPy's argmax is far faster than torch's: of equals it takes the lowest id, and NaN wins over all. The rest of a
    # greedy row is plain Python, as an operator of torch or NumPy is slow while the caches are cold after a step.
    rows = logits.numpy()
    best = rows.argmax(-1)
    lost = [row for row, token in enumerate(best.tolist()) if not math.isfinite(rows[row, token])]
    ids = torch.from_numpy(best)
    if any(filters.temperature.tolist()):
        drawn = filters.temperature.nonzero()[:, 0]
        part = slice(None) if len(drawn) == len(logits) else drawn
        ids[part] = _draw(logits[part], Filters(*(tensor[part] for tensor in filters)), uniforms[part])
    if lost:
        ids[lost] = -1
    return ids


def _draw(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    probs = softmax_at(logits, filters.temperature)
    floor = filters.min_p * probs.amax(-1)
    limited = ((filters.top_k > 0) | (filters.top_p < 1)).nonzero()[:, 0]
    if len(limited):
        threshold = _top_threshold(probs[limited], filters.top_k[limited], filters.top_p[limited])
        floor[limited] = torch.maximum(floor[limited], threshold)
    return draw(probs, floor, uniforms)


def _top_threshold(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """As `top_threshold`, without sorting the vocabulary where the best tokens of each row decide."""
    vocab = probs.shape[1]
    if vocab > _FIRST_LOOK:
        best = probs.topk(_FIRST_LOOK, dim=-1).values
        last = last_kept(best, vocab, top_k, top_p)
        if int(last.max()) < _FIRST_LOOK:
            return best.gather(1, last[:, None])[:, 0]
    return top_threshold(probs, top_k, top_p)
