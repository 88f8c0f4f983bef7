"""The operations of a Llama-2 step, on tensors. This package knows no model, no sequence and no HTTP.

An operation has three implementations of one signature: a Triton kernel, a tuned one in `kernels.cpu`, and the textbook
in `kernels.reference`, which the tests compare both with. This file alone picks one, by the device of the tensors.

`batch_invariant=True` promises that the bits of a row depend on that row's own tokens only: not on the other rows, not
on how many there are, not on how a sequence was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kernels import transfer
from kernels.attention_plan import AttentionPlan, plan_capture, plan_triton, prefill_tiles, tiles_of
from kernels.cpu import ops as cpu_ops
from kernels.cpu.attention_plan import CpuPlan, plan_cpu
from kernels.cpu.block_attention import QueryBlocks, attend_blocks
from kernels.cpu.huge_pages import zeros_on_huge_pages
from kernels.cpu.packed_linear import pack_weight as pack_for_cpu
from kernels.cpu.packed_linear import packed_linear
from kernels.launch import HAS_TRITON, INTERPRET
from kernels.linear_weight import LinearWeight
from kernels.linear_weight import pack_weight as pack_for_cuda
from kernels.reference import Filters, rope_table
from kernels.transfer import PinnedBuffer

if HAS_TRITON:
    from kernels import triton_ops

__project__ = "llama-slots"  # llama/_floor.py looks for it

__all__ = [
    "rms_norm", "linear", "swiglu", "rope_table", "rope_write", "paged_attention",
    "apply_penalties", "token_logprobs", "uniform", "sample", "Filters",
    "plan_attention", "AttentionPlan", "plan_capture", "prefill_tiles", "tiles_of",
    "pack_weight", "LinearWeight", "make_cache", "cache_dtype", "to_device", "to_host", "PinnedBuffer",
    "CpuPlan", "QueryBlocks", "attend_blocks", "packed_linear",
]  # fmt: skip


def _on_cpu(device: torch.device) -> bool:
    """Whether `kernels.cpu` serves the device. Under Triton's interpreter, for tests, the Triton kernels do."""
    return device.type == "cpu" and not INTERPRET


def _ops(device: torch.device) -> ModuleType:
    return cpu_ops if _on_cpu(device) else triton_ops


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (arXiv 1910.07467) of x, or of x + residual, over the last dimension.

    x, residual: [rows, dim] fp32, bf16 or fp16. weight: [dim]. Statistics in fp32, after rounding the sum to x's dtype.
    Returns (normed, sum), both [rows, dim] of x's dtype; without a residual the sum is x itself.
    """
    return _ops(x.device).rms_norm(x, weight, eps, residual, batch_invariant=batch_invariant)


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    """x @ weight.T, summed in fp32. x: [rows, k]; returns [rows, n] of x's dtype."""
    return _ops(x.device).linear(x, weight, batch_invariant=batch_invariant)


def swiglu(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202). gate_up: [rows, 2 * ffn], gate first. Returns [rows, ffn]."""
    return _ops(gate_up.device).swiglu(gate_up, batch_invariant=batch_invariant)


def rope_write(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, kv_index: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    """Rotate q and k to their positions and write k and v into their rows of the cache, in place.

    qkv: [rows, (n_heads + 2 * n_kv_heads) * head_dim], q then k then v. cos_sin: from `rope_table`. k_cache, v_cache:
    [num_blocks, block_size, n_kv_heads, head_dim]. positions: [rows] int64. kv_index: [rows] int64, all different, flat
    cache row = block * block_size + offset; on CUDA, -1 marks a padding row of a captured graph, which is not written.
    Returns q rotated, [rows, n_heads, head_dim] of the cache's dtype, which on CUDA is that of qkv.
    """
    return _ops(qkv.device).rope_write(qkv, cos_sin, positions, kv_index, k_cache, v_cache, n_heads)


def plan_attention(
    cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, block_tables: np.ndarray, block_size: int, device: torch.device
) -> AttentionPlan:
    """Lay out one step for `paged_attention`; built once, read by every layer.

    cu_seqlens_q: [n_seqs + 1] int32. seqlens_k: [n_seqs] int32 >= 1. block_tables: [n_seqs, width] int32.
    All on the host. Raises ValueError on a layout whose rows or keys lie nowhere.
    """
    _check_layout(cu_seqlens_q, seqlens_k, block_tables, block_size)
    if _on_cpu(device):
        return plan_cpu(cu_seqlens_q, seqlens_k, block_tables, block_size)
    return plan_triton(cu_seqlens_q, seqlens_k, block_tables, device)


def _check_layout(cu_seqlens_q: np.ndarray, seqlens_k: np.ndarray, tables: np.ndarray, block_size: int) -> None:
    """ValueError unless every query has its key and every key a block: kernels on the device cannot refuse a layout."""
    n_queries = np.diff(cu_seqlens_q)
    if cu_seqlens_q[0] != 0 or len(n_queries) != len(seqlens_k) or n_queries.min() < 1:
        raise ValueError(f"cu_seqlens_q: expected 0 and {len(seqlens_k)} larger numbers, got {cu_seqlens_q.tolist()}")
    if (short := np.flatnonzero(seqlens_k < n_queries)).size:
        i = int(short[0])
        raise ValueError(f"seqlens_k[{i}]: expected at least its {n_queries[i]} queries, got {seqlens_k[i]}")
    if len(tables) != len(seqlens_k) or tables.shape[1] * block_size < seqlens_k.max():
        expected = f"[{len(seqlens_k)}, >= {-(-int(seqlens_k.max()) // block_size)}]"
        raise ValueError(f"block_tables: expected shape {expected}, got {list(tables.shape)}")
    if tables.min() < 0:
        raise ValueError(f"block_tables: expected blocks from 0 on, got {tables.min()}")


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    """Causal attention of any mix of prefill chunks and single tokens over the paged cache.

    q: [rows, n_heads, head_dim], rotated; the rows of a sequence are its last positions. k_cache, v_cache:
    [num_blocks, block_size, n_kv_heads, head_dim]; n_heads a multiple of n_kv_heads. scale: usually head_dim ** -0.5.
    Returns [rows, n_heads, head_dim] of q's dtype. Cache rows past the end of a sequence never affect a result.
    Raises ValueError if the plan was made for another device.
    """
    return _ops(q.device).paged_attention(q, k_cache, v_cache, plan, scale, batch_invariant=batch_invariant)


def apply_penalties(
    logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, repetition: Tensor, subtract: Tensor
) -> None:
    """Biases and penalties on single logits, in place: x + bias, then / or * repetition by sign, then - subtract.

    logits: [rows, vocab] fp32. The others: [entries], one per touched logit, each (row, token) at most once: rows and
    token_ids int64, bias (-inf bans), repetition (CTRL, arXiv 1909.05858; 1 = none) and subtract fp32.
    """
    _ops(logits.device).apply_penalties(logits, rows, token_ids, bias, repetition, subtract)


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of the given tokens and of the n_top best ones (by logprob, then id).

    logits: [rows, vocab] fp32. token_ids: [rows] int64. Returns [rows] fp32, [rows, n_top] int64, [rows, n_top] fp32.
    """
    return _ops(logits.device).token_logprobs(logits, token_ids, n_top)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Random numbers in [0, 1) as a function of (seed, position) alone: Philox4x32-10 (Salmon et al., SC 2011).

    The 64-bit seed is the key, the position the counter. seeds, positions: [rows] int64. Returns [rows] fp32.
    """
    return _ops(seeds.device).uniform(seeds, positions)


def sample(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    """One token per row by inverse transform over the filtered distribution, tokens taken in order of their ids.

    logits: [rows, vocab] fp32. uniforms: [rows] fp32 in [0, 1). Returns [rows] int64; -1 for a row whose best logit is
    not finite.
    """
    return _ops(logits.device).sample(logits, filters, uniforms)


def pack_weight(weight: Tensor, keep_rows: bool = False) -> LinearWeight:
    """Lay out weight [n, k] (fp32, bf16 or fp16) for `linear` on its own device. The caller drops its reference.

    keep_rows: on the CPU, hold `LinearWeight.rows` as well, at twice the memory.
    """
    return pack_for_cpu(weight, keep_rows) if _on_cpu(weight.device) else pack_for_cuda(weight)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a model's K/V cache: on the CPU fp32, as torch would widen 16-bit keys anew in every step."""
    return torch.float32 if _on_cpu(device) else dtype


def make_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A K/V cache, zero-filled; on the CPU on huge pages, where the system has them."""
    return zeros_on_huge_pages(shape, dtype) if _on_cpu(device) else torch.zeros(shape, dtype=dtype, device=device)


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Contiguous arrays as tensors on the device, in one copy. On the CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return transfer.to_device(device, *arrays)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, which may be read after an event that is recorded behind it; a CPU tensor is its own copy."""
    return tensor if tensor.device.type == "cpu" else transfer.to_host(tensor)
