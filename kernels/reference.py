"""Every operation in plain torch: the oracle of the kernel tests and the CPU path of the engine.

Same signatures as the Triton kernels. With `batch_invariant=True` the bits of a row depend on that row alone, for a
given number of threads (with another one, a narrow and long matrix may sum in another order). torch does not give that
for free; three things move bits and are avoided here:
- `x @ w.T` rounds a row differently for 1, 2, 3, 5, 7 or 9 rows: rows go through in tiles of exactly 16;
- `silu`, `sigmoid` and `exp2` use another formula for the last elements of a buffer than for the rest (the vector
  tail), `exp` does not: everything is written with `exp`;
- scaled_dot_product_attention picks its loop by the number of queries: queries and keys go in 16 x 64 tiles counted
  from position 0 of their sequence.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import TILE_KEYS, TILE_ROWS, AttentionPlan, Gather, QueryTiles, SequenceSpan
from kernels.linear_weight import LinearWeight


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    # As few operators as there are: on one row their number is the time. F.rms_norm runs six and takes 1.7x as long.
    norm = torch.linalg.vector_norm(wide, 2, (-1,), True)
    scale = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return torch.mul(wide, scale).to(x.dtype).mul_(weight), total


@lru_cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value)


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    if not batch_invariant:
        return _matmul(x, weight)
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % TILE_ROWS))
    if padded.shape[0] == TILE_ROWS:
        return _matmul(padded, weight)[:rows]
    return torch.cat([_matmul(tile, weight) for tile in padded.split(TILE_ROWS)])[:rows]


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
    turned = wide * cos.unsqueeze(1)
    first, second = turned.unbind(2)
    own_first, own_second = wide.unbind(2)
    first.addcmul_(own_second, sin, value=-1)
    second.addcmul_(own_first, sin)
    q, k = turned.to(k_cache.dtype).view(rows, -1, head_dim).split((n_heads, n_kv_heads), dim=1)
    v = v.reshape(rows, n_kv_heads, head_dim).to(v_cache.dtype)
    k_cache.view(-1, n_kv_heads, head_dim).index_copy_(0, kv_index, k)
    v_cache.view(-1, n_kv_heads, head_dim).index_copy_(0, kv_index, v)
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    if plan.cpu is None:
        raise ValueError("plan: made for a CUDA kernel, but the tensors are on the CPU")
    if batch_invariant:
        return _attend_tiles(q, k_cache, v_cache, plan.cpu.tiles, scale)
    # On the CPU the cache is fp32; batched matmuls would round the scores of 16-bit keys, which the oracle must not.
    key_bytes = k_cache[0, 0].numel() * k_cache.element_size() if k_cache.dtype == torch.float32 else 0
    work = plan.cpu.work(k_cache.shape[2], key_bytes)
    if len(work.gathers) + len(work.spans) == 1:  # it holds all rows, in order
        if work.gathers:
            return _attend_gathered(q, k_cache, v_cache, work.gathers[0], scale)
        return _attend_span(q, k_cache, v_cache, work.spans[0], scale)
    out = torch.empty_like(q)
    for part in work.gathers:
        out.index_copy_(0, part.at, _attend_gathered(q.index_select(0, part.at), k_cache, v_cache, part, scale))
    for span in work.spans:
        rows = slice(span.row, span.row + span.n_queries)
        out[rows] = _attend_span(q[rows], k_cache, v_cache, span, scale)
    return out


def _attend_gathered(q: Tensor, k_cache: Tensor, v_cache: Tensor, part: Gather, scale: float) -> Tensor:
    """One query per sequence, and the heads of a group in the place of queries. The keys of each head come to lie
    together, so that all heads of all sequences are one batch of matrices: scaled_dot_product_attention calls a matmul
    of its own for each, which is most of its time when they are small."""
    n, n_heads, head_dim = q.shape
    n_kv_heads, longest = k_cache.shape[2], part.mask.shape[-1]
    k, v = (c.view(-1, head_dim).index_select(0, part.rows).view(-1, longest, head_dim) for c in (k_cache, v_cache))
    scores = torch.bmm(q.reshape(n * n_kv_heads, -1, head_dim), k.transpose(1, 2)).view(n, n_kv_heads, -1, longest)
    weights = torch.softmax(torch.add(part.mask, scores, alpha=scale), -1)
    return torch.bmm(weights.view(n * n_kv_heads, -1, longest), v).view(n, n_heads, head_dim)


def _attend_span(q: Tensor, k_cache: Tensor, v_cache: Tensor, span: SequenceSpan, scale: float) -> Tensor:
    """All queries of one sequence, straight from the cache where its blocks lie side by side."""
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
        grouped = q.view(1, n_kv_heads, group, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).view(1, n_heads, head_dim)
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
    laid = F.pad(q, (0, 0, 0, 0, 0, 1))[tiles.rows].float() * scale
    laid = laid.view(n_tiles, TILE_ROWS, n_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    laid = laid.reshape(n_tiles, n_kv_heads, group * TILE_ROWS, head_dim)
    at = tiles.positions[:, None, None, :, None].expand(n_tiles, 1, group, TILE_ROWS, 1)
    at = at.reshape(n_tiles, 1, group * TILE_ROWS, 1)

    top = laid.new_full((*laid.shape[:3], 1), -1e30)
    total = laid.new_zeros((*laid.shape[:3], 1))
    acc = torch.zeros_like(laid)
    for t in range(tiles.n_key_tiles[0]):
        live = sum(n > t for n in tiles.n_key_tiles)
        columns = slice(t * TILE_KEYS, (t + 1) * TILE_KEYS)
        rows = tiles.keys[:live, columns]
        # contiguous() even where a view would do: the matmul must see one layout however many tiles are live
        k, v = (c[rows].float().transpose(1, 2).contiguous() for c in (keys, values))
        visible = torch.arange(columns.start, columns.stop) <= at[:live]
        scores = torch.where(visible, laid[:live] @ k.transpose(2, 3), -1e30)
        new_top = torch.maximum(top[:live], scores.amax(-1, keepdim=True))
        shrink = torch.exp(top[:live] - new_top)
        weights = torch.where(visible, torch.exp(scores - new_top), 0.0)
        total[:live] = total[:live] * shrink + weights.sum(-1, keepdim=True)
        acc[:live] = acc[:live] * shrink + weights @ v
        top[:live] = new_top
    out = (acc / total).view(n_tiles, n_kv_heads, group, TILE_ROWS, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_tiles * TILE_ROWS, n_heads, head_dim)[tiles.back].to(q.dtype)


def rope_table(head_dim: int, max_seq_len: int, theta: float, position_scale: float, device: torch.device) -> Tensor:
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    position = torch.arange(max_seq_len, dtype=torch.float64, device=device) / position_scale
    # The angle is rounded to fp32 before cos and sin, as every implementation that trained these weights did.
    angle = (position.float()[:, None] * frequency.float()[None, :]).double()
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def adjust_logits(
    logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, repetition: Tensor, subtract: Tensor
) -> None:
    x = logits[rows, token_ids] + bias
    x = torch.where(x > 0, x / repetition, x * repetition) - subtract
    logits[rows, token_ids] = x


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.long().clamp(min=0)[:, None])[:, 0]
    # A stable sort puts the lowest id first among equals; topk promises no order there.
    if n_top == 0:
        empty = logits.new_empty((logits.shape[0], 0))
        return chosen, empty.long(), empty
    n_wide = min(logits.shape[1], n_top + 32)
    top, ids = logprobs.topk(n_wide, dim=-1)
    if n_wide < logits.shape[1] and bool((top[:, n_top - 1] == top[:, -1]).any()):
        top, ids = logprobs.sort(dim=-1, descending=True, stable=True)  # equals may lie beyond the ones looked at
    by_id = ids.argsort(dim=-1)
    ids, top = ids.gather(1, by_id), top.gather(1, by_id)
    order = top.argsort(dim=-1, descending=True, stable=True)[:, :n_top]
    return chosen, ids.gather(1, order), top.gather(1, order)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    counter = [positions & 0xFFFFFFFF, (positions >> 32) & 0xFFFFFFFF, torch.zeros_like(seeds), torch.zeros_like(seeds)]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # int64 wraps; the bits are those of uint64
        counter = [
            ((second >> 32) & 0xFFFFFFFF) ^ counter[1] ^ low,
            second & 0xFFFFFFFF,
            ((first >> 32) & 0xFFFFFFFF) ^ counter[3] ^ high,
            first & 0xFFFFFFFF,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return (counter[0] >> 8).float() * 2.0**-24


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    # 32,000 logits take NumPy's argmax 1.3 us and torch's 51 us. The rest of a greedy row is plain Python: behind a
    # step that has swept the caches, every operator of torch or NumPy takes some 10 us, however little it does.
    # Of equals the first, the lowest id; NaN wins over all.
    rows = logits.numpy()
    best = rows.argmax(-1)
    lost = [row for row, token in enumerate(best.tolist()) if not math.isfinite(rows[row, token])]
    ids = torch.from_numpy(best)
    if any(temperature.tolist()):
        drawn = temperature.nonzero()[:, 0]
        part = slice(None) if len(drawn) == len(logits) else drawn
        ids[part] = _draw(logits[part], temperature[part], top_k[part], top_p[part], min_p[part], uniforms[part])
    if lost:
        ids[lost] = -1
    return ids


def _draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    # The best logit is taken off first, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature[:, None], dim=-1)
    floor = min_p * probs.amax(-1)
    limited = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
    if len(limited):
        threshold = _top_threshold(probs[limited], top_k[limited], top_p[limited])
        floor[limited] = torch.maximum(floor[limited], threshold)
    running = torch.where(probs >= floor[:, None], probs, 0.0).cumsum(-1)
    # The first token whose running sum exceeds u * total. u * total may round up to total: then the last token kept.
    total = running[:, -1:]
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, wanted, right=True)[:, 0]


def _top_threshold(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability that top-k, then top-p over what top-k left, keeps; tokens tied with it stay too."""
    vocab = probs.shape[1]
    for width in (256, vocab):
        width = min(width, vocab)
        best = probs.topk(width, dim=-1).values if width < vocab else probs.sort(dim=-1, descending=True).values
        k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).long()
        running = best.cumsum(-1)
        rest = 1.0 if width < vocab else running[:, -1]
        kept = torch.where(k <= width, running.gather(1, k.clamp(max=width)[:, None] - 1)[:, 0], rest)
        crossing = (running < (top_p * kept)[:, None]).sum(-1)  # how many tokens lie before the crossing one
        last = torch.minimum(k - 1, crossing)
        if width == vocab or int(last.max()) < width:
            return best.gather(1, last.clamp(max=width - 1)[:, None])[:, 0]
    raise AssertionError("the last width is the whole vocabulary")
