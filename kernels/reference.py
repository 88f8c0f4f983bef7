"""Every operation as the textbooks have it, in plain torch: the oracle of the tests, on any device.

Names and signatures are those of the Triton kernels and of `kernels.cpu.ops`; shapes are in `kernels/__init__.py`.
Sums are in fp32, and a result is rounded once, at its end. Operations that need no tuning run from here on the CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_plan import AttentionPlan
from kernels.linear_weight import LinearWeight


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    wide = summed.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), summed


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    """weight: row-major; the textbook cannot read a `blocked` one."""
    return (x.float() @ weight.data.float().T).to(x.dtype)


def swiglu(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rope_table(head_dim: int, max_seq_len: int, theta: float, position_scale: float, device: torch.device) -> Tensor:
    """cos and sin of every position's angles (RoFormer, arXiv 2104.09864), half-split layout.

    position_scale: positions are divided by it (linear RoPE scaling; 1.0 = none).
    Returns [max_seq_len, head_dim] fp32: cos in the first half of a row, sin in the second.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    position = torch.arange(max_seq_len, dtype=torch.float64, device=device) / position_scale
    # The angle is rounded to fp32 before cos and sin, as every implementation that trained these weights did.
    angle = (position.float()[:, None] * frequency.float()[None, :]).double()
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def rope_write(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, kv_index: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    n_kv_heads, head_dim = k_cache.shape[2:]
    qk, v = qkv.view(len(qkv), -1, head_dim).split((n_heads + n_kv_heads, n_kv_heads), dim=1)
    first, second = qk.float().chunk(2, dim=-1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(k_cache.dtype)
    q, k = rotated.split((n_heads, n_kv_heads), dim=1)
    written = kv_index >= 0
    k_cache.view(-1, n_kv_heads, head_dim)[kv_index[written]] = k[written]
    v_cache.view(-1, n_kv_heads, head_dim)[kv_index[written]] = v[written].to(v_cache.dtype)
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    """softmax(scale * q @ k.T) @ v, sequence by sequence (Vaswani et al., 2017)."""
    block_size, n_kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // n_kv_heads
    out = torch.empty_like(q)
    starts = plan.cu_seqlens_q.tolist()
    for s, n_keys in enumerate(plan.seqlens_k.tolist()):
        rows = slice(starts[s], starts[s + 1])
        blocks = plan.block_tables[s, : -(-n_keys // block_size)].long()
        k, v = (c[blocks].flatten(0, 1)[:n_keys].float().repeat_interleave(group, 1) for c in (k_cache, v_cache))
        positions = torch.arange(n_keys - (rows.stop - rows.start), n_keys, device=q.device)
        hidden = torch.arange(n_keys, device=q.device) > positions[:, None]
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def apply_penalties(
    logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, repetition: Tensor, subtract: Tensor
) -> None:
    x = logits[rows, token_ids] + bias
    logits[rows, token_ids] = torch.where(x > 0, x / repetition, x * repetition) - subtract


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=-1)
    top, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return logprobs.gather(1, token_ids.clamp(min=0)[:, None])[:, 0], ids[:, :n_top], top[:, :n_top]


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


class Filters(NamedTuple):
    """What each row of `sample` draws from; one tensor [rows] per filter, in the order in which they apply.

    temperature: fp32; 0 is greedy, the lowest id among equals. top_k: int64; <= 0 is off. top_p: fp32, a share of what
    top_k left; the token that crosses it stays. min_p: fp32, relative to the best token. Tokens tied with the last one
    that is kept stay too.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def alike(
        cls, rows: int, device: torch.device, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
    ) -> Filters:
        """The same filters for every row; those left out are off."""
        values = float(temperature), top_k, float(top_p), float(min_p)
        return cls(*(torch.full((rows,), value, device=device) for value in values))


def sample(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p = filters
    best, greedy = logits.max(dim=-1)  # of equals the first; NaN is the largest
    probs = softmax_at(logits, torch.where(temperature > 0, temperature, 1.0))
    limited = (top_k > 0) | (top_p < 1)
    floor = torch.where(limited, top_threshold(probs, top_k, top_p), 0.0)
    drawn = draw(probs, torch.maximum(floor, min_p * probs.amax(-1)), uniforms)
    return torch.where(best.isfinite(), torch.where(temperature > 0, drawn, greedy), -1)


def softmax_at(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities [rows, vocab]. temperature: [rows] > 0."""
    # The best logit is subtracted first, so that a tiny temperature cannot overflow.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature[:, None], dim=-1)


def top_threshold(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[rows]: the smallest probability that top-k, then top-p over what top-k left, keeps."""
    best = probs.sort(dim=-1, descending=True).values
    return best.gather(1, last_kept(best, probs.shape[1], top_k, top_p)[:, None])[:, 0]


def last_kept(best: Tensor, vocab: int, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[rows]: the rank, from 0, of the last token that top-k, then top-p keeps.

    best: [rows, width] fp32, the largest of a row's `vocab` probabilities, descending. A rank of width or more says
    that `best` does not reach far enough.
    """
    width = best.shape[1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    running = best.cumsum(-1)
    kept = torch.where(k <= width, running.gather(1, k.clamp(max=width)[:, None] - 1)[:, 0], 1.0)
    crossing = (running < (top_p * kept)[:, None]).sum(-1)
    return torch.minimum(k - 1, crossing)


def draw(probs: Tensor, floor: Tensor, uniforms: Tensor) -> Tensor:
    """[rows] int64: inverse transform over the probabilities that are at least the row's floor [rows]."""
    running = torch.where(probs >= floor[:, None], probs, 0.0).cumsum(-1)
    # The first token whose running sum exceeds u * total. u * total may round up to total: then the last token kept.
    total = running[:, -1:]
    goal = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, goal, right=True)[:, 0]
