"""The operations of a Llama-2 step, on tensors. This package knows no model, no sequence and no HTTP.

Every operation has a plain-torch twin of the same signature in `reference`. This file is the one place where an
operation picks its implementation, by the device of its tensors: the Triton kernel on CUDA, the twin on the CPU.

`batch_invariant=True` promises that the bits of a row depend on that row's own tokens only: not on the other rows, not
on how many there are, not on how a sequence was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.attention_plan import (
    AttentionPlan,
    CpuPlan,
    check_layout,
    plan_capture,
    plan_triton,
    prefill_tiles,
    tiles_of,
)
from kernels.block_attention import QueryBlocks, attend_blocks
from kernels.launch import HAS_TRITON, runs_triton
from kernels.linear_weight import LinearWeight, pack_weight
from kernels.packed_linear import packed_linear
from kernels.pages import zeros_on_large_pages
from kernels.transfer import Mirror, fetch, upload

if HAS_TRITON:
    from kernels import triton_ops

__project__ = "llama-slots"  # llama/_floor.py looks for it

__all__ = [
    "AttentionPlan",
    "LinearWeight",
    "Mirror",
    "QueryBlocks",
    "adjust_logits",
    "attend_blocks",
    "cache_dtype",
    "fetch",
    "linear",
    "make_cache",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "plan_attention",
    "plan_capture",
    "prefill_tiles",
    "rms_norm",
    "rope_table",
    "rope_write",
    "sample",
    "swiglu",
    "tiles_of",
    "token_logprobs",
    "uniform",
    "upload",
]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (arXiv 1910.07467) of x, or of x + residual, over the last dimension.

    x, residual: [rows, dim] fp32, bf16 or fp16. weight: [dim]. Statistics in fp32, after rounding the sum to x's dtype.
    Returns (normed, sum), both [rows, dim] of x's dtype; without a residual the sum is x itself.
    """
    if runs_triton(x.device):
        return triton_ops.rms_norm(x, weight, eps, residual, batch_invariant=batch_invariant)
    return reference.rms_norm(x, weight, eps, residual, batch_invariant=batch_invariant)


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight.T, summed in fp32. x: [rows, k]; returns [rows, n] of x's dtype."""
    if runs_triton(x.device):
        return triton_ops.linear(x, weight, batch_invariant=batch_invariant)
    return reference.linear(x, weight, batch_invariant=batch_invariant)


def swiglu(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). gate_up: [rows, 2 * ffn], gate first. Returns [rows, ffn]."""
    if runs_triton(gate_up.device):
        return triton_ops.swiglu(gate_up, batch_invariant=batch_invariant)
    return reference.swiglu(gate_up, batch_invariant=batch_invariant)


def rope_table(head_dim: int, max_seq_len: int, theta: float, position_scale: float, device: torch.device) -> Tensor:
    """cos and sin of every position's angles (RoFormer, arXiv 2104.09864), half-split layout.

    position_scale: positions are divided by it (linear RoPE scaling; 1.0 = none).
    Returns [max_seq_len, head_dim] fp32: cos in the first half of a row, sin in the second.
    """
    return reference.rope_table(head_dim, max_seq_len, theta, position_scale, device)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the K/V cache of a model of that dtype holds on that device: on the CPU fp32, whatever the weights are.

    CPUs widen 16-bit numbers before they multiply, and torch does so anew for every step that reads the cache: one
    query over 500 bf16 keys of 12 heads took 356 us, over fp32 ones 66 us.
    """
    return dtype if runs_triton(device) else torch.float32


def make_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A K/V cache, zero-filled; on the CPU on large pages, from which a decode batch gathers its keys 7 % faster."""
    return torch.zeros(shape, dtype=dtype, device=device) if runs_triton(device) else zeros_on_large_pages(shape, dtype)


def rope_write(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, kv_index: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    """Rotate q and k to their positions and write k and v into their rows of the cache.

    qkv: [rows, (n_heads + 2 * n_kv_heads) * head_dim], q then k then v. cos_sin: from `rope_table`.
    positions: [rows] int64. kv_index: [rows] int64, flat cache row = block * block_size + offset, all different. On
    CUDA, -1 marks a padding row of a captured graph, which writes nothing.
    k_cache, v_cache: [num_blocks, block_size, n_kv_heads, head_dim], written in place.
    Returns q rotated, [rows, n_heads, head_dim] of the cache's dtype, which on CUDA is that of qkv.
    """
    if runs_triton(qkv.device):
        return triton_ops.rope_write(qkv, cos_sin, positions, kv_index, k_cache, v_cache, n_heads)
    return reference.rope_write(qkv, cos_sin, positions, kv_index, k_cache, v_cache, n_heads)


def plan_attention(
    cu_seqlens_q: np.ndarray,
    seqlens_k: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    device: torch.device,
) -> AttentionPlan:
    """Lay out one step for `paged_attention`; built once, read by every layer.

    cu_seqlens_q: [n_seqs + 1] int32. seqlens_k: [n_seqs] int32 >= 1. block_tables: [n_seqs, width] int32.
    All on the host. Raises ValueError on a layout whose rows or keys lie nowhere.
    """
    check_layout(cu_seqlens_q, seqlens_k, block_tables, block_size)
    on_cpu = not runs_triton(device)
    starts, lengths, tables = upload(device, cu_seqlens_q, seqlens_k, block_tables)
    return AttentionPlan(
        starts,
        lengths,
        tables,
        int(np.diff(cu_seqlens_q).max()),
        int(seqlens_k.max()),
        CpuPlan(cu_seqlens_q, seqlens_k, block_tables, block_size) if on_cpu else None,
        None if on_cpu else plan_triton(cu_seqlens_q, seqlens_k, block_tables, device),
    )


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    """Causal attention of any mix of prefill chunks and single tokens over the paged cache.

    q: [rows, n_heads, head_dim], rotated; the rows of a sequence are its last positions. k_cache, v_cache:
    [num_blocks, block_size, n_kv_heads, head_dim]; n_heads a multiple of n_kv_heads. scale: usually head_dim ** -0.5.
    Returns [rows, n_heads, head_dim] of q's dtype. Cache rows past the end of a sequence are never read into a result.
    """
    if runs_triton(q.device):
        return triton_ops.paged_attention(q, k_cache, v_cache, plan, scale, batch_invariant=batch_invariant)
    return reference.paged_attention(q, k_cache, v_cache, plan, scale, batch_invariant=batch_invariant)


def adjust_logits(
    logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, repetition: Tensor, subtract: Tensor
) -> None:
    """Biases and penalties on single logits, in place: x + bias, then / or * repetition by sign, then - subtract.

    logits: [rows, vocab] fp32. The others: [entries], one per touched logit, each (row, token) at most once: rows and
    token_ids int64, bias (-inf bans), repetition (CTRL, arXiv 1909.05858; 1 = none) and subtract fp32.
    """
    if runs_triton(logits.device):
        triton_ops.adjust_logits(logits, rows, token_ids, bias, repetition, subtract)
    else:
        reference.adjust_logits(logits, rows, token_ids, bias, repetition, subtract)


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of the given tokens and of the n_top best ones (by logprob, then id).

    logits: [rows, vocab] fp32. token_ids: [rows] int64. Returns [rows] fp32, [rows, n_top] int64, [rows, n_top] fp32.
    """
    if runs_triton(logits.device):
        return triton_ops.token_logprobs(logits, token_ids, n_top)
    return reference.token_logprobs(logits, token_ids, n_top)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random numbers in [0, 1) as a function of (seed, position) alone: Philox4x32-10 (Salmon et al., SC 2011).

    The 64-bit seed is the key, the position the counter. seeds, positions: [rows] int64. Returns [rows] fp32.
    """
    if runs_triton(seeds.device):
        return triton_ops.uniform(seeds, positions)
    return reference.uniform(seeds, positions)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """One token per row by inverse transform over the filtered distribution, tokens taken in order of their ids.

    logits: [rows, vocab] fp32. temperature: [rows] fp32, 0 = greedy (lowest id among equals). top_k: [rows] int64,
    <= 0 = off. top_p: [rows] fp32, over what top_k left; the token that crosses it stays, as do tokens tied with it.
    min_p: [rows] fp32, relative to the best token. uniforms: [rows] fp32 in [0, 1).
    Returns [rows] int64; -1 for a row whose best logit is not finite.
    """
    if runs_triton(logits.device):
        return triton_ops.sample(logits, temperature, top_k, top_p, min_p, uniforms)
    return reference.sample(logits, temperature, top_k, top_p, min_p, uniforms)
