"""Rotate q and k to their positions and write k and v into the paged cache, in one launch per step and layer."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FLOATS, cdiv, expect, next_power_of_2

_BLOCK_HEADS = 32  # fewer heads per program lose the 128-bit stores


# Positions and cache rows are slices of one buffer, whose alignment depends on the row count: one program serves all.
@triton.jit(do_not_specialize_on_alignment=["position_ptr", "kv_index_ptr"])
def rope_write_kernel(
    qkv_ptr, cos_sin_ptr, position_ptr, kv_index_ptr, q_ptr, k_ptr, v_ptr,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """grid (rows, ceil((H + 2 * KVH) / BLOCK_H)). Half-split layout: dimension i rotates with i + D / 2."""
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    inside = dim < HALF
    kv_index = tl.load(kv_index_ptr + row)
    angle_at = cos_sin_ptr + tl.load(position_ptr + row) * D + dim
    cos = tl.load(angle_at, mask=inside, other=0.0)
    sin = tl.load(angle_at + HALF, mask=inside, other=0.0)

    at = qkv_ptr + row * ((H + 2 * KVH) * D) + head * D + dim
    live = (head < H + 2 * KVH) & inside
    first = tl.load(at, mask=live, other=0.0)
    second = tl.load(at + HALF, mask=live, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    rotated = head < H + KVH
    first = tl.where(rotated, (a * cos - b * sin).to(first.dtype), first)
    second = tl.where(rotated, (b * cos + a * sin).to(second.dtype), second)

    is_q = live & (head < H)
    is_k = live & rotated & (head >= H) & (kv_index >= 0)
    is_v = live & (head >= H + KVH) & (kv_index >= 0)
    q_at = q_ptr + row * (H * D) + head * D + dim
    k_at = k_ptr + kv_index * (KVH * D) + (head - H) * D + dim
    v_at = v_ptr + kv_index * (KVH * D) + (head - H - KVH) * D + dim
    tl.store(q_at, first, mask=is_q)
    tl.store(q_at + HALF, second, mask=is_q)
    tl.store(k_at, first, mask=is_k)
    tl.store(k_at + HALF, second, mask=is_k)
    tl.store(v_at, first, mask=is_v)
    tl.store(v_at + HALF, second, mask=is_v)


def rope_write(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, kv_index: Tensor, k_cache: Tensor, v_cache: Tensor, n_heads: int
) -> Tensor:
    device = qkv.device
    expect("k_cache", k_cache, (None, None, None, None), FLOATS, device)
    expect("v_cache", v_cache, tuple(k_cache.shape), k_cache.dtype, device)
    n_kv_heads, head_dim = k_cache.shape[2:]
    if head_dim % 2:
        raise ValueError(f"k_cache: expected an even head_dim, got {head_dim}")
    expect("qkv", qkv, (None, (n_heads + 2 * n_kv_heads) * head_dim), k_cache.dtype, device)
    rows = qkv.shape[0]
    expect("cos_sin", cos_sin, (None, head_dim), torch.float32, device)
    expect("positions", positions, (rows,), torch.int64, device)
    expect("kv_index", kv_index, (rows,), torch.int64, device)
    q = torch.empty((rows, n_heads, head_dim), dtype=qkv.dtype, device=device)
    if rows:
        rope_write_kernel[(rows, cdiv(n_heads + 2 * n_kv_heads, _BLOCK_HEADS))](
            qkv, cos_sin, positions, kv_index, q, k_cache, v_cache,
            H=n_heads, KVH=n_kv_heads, D=head_dim,
            BLOCK_H=_BLOCK_HEADS, BLOCK_HALF=next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
    return q
