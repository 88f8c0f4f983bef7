"""RMSNorm with the residual addition folded in. One row per program: no other row can reach its arithmetic."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FLOATS, expect, next_power_of_2


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr
):
    """grid (rows,). The norm reads the sum after it was rounded, so a fused addition elsewhere would change no bit."""
    at = tl.program_id(0).to(tl.int64) * D
    offs = tl.arange(0, BLOCK_D)
    inside = offs < D
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at + offs, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + at + offs, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at + offs, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / D + eps)
    tl.store(out_ptr + at + offs, (wide * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    expect("x", x, (None, None), FLOATS, x.device)
    rows, dim = x.shape
    expect("weight", weight, (dim,), x.dtype, x.device)
    if residual is not None:
        expect("residual", residual, (rows, dim), x.dtype, x.device)
    out = torch.empty_like(x)
    summed = x if residual is None else torch.empty_like(x)
    if rows:
        block = next_power_of_2(dim)
        # 8 elements a thread and load; a row of 8192 in 8 warps spills on sm_100.
        warps = 4 if block <= 2048 else 8 if block <= 4096 else 16
        rms_norm_kernel[(rows,)](
            x, residual, weight, out, summed, eps, D=dim, BLOCK_D=block, ADD=residual is not None, num_warps=warps
        )
    return out, summed
