"""silu(gate) * up over the fused output of the gate and up projections."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FLOATS, cdiv, expect

_BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, FFN: tl.constexpr, BLOCK: tl.constexpr):
    """grid (rows, ceil(FFN / BLOCK)). In fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < FFN
    gate_at = gate_up_ptr + row * (2 * FFN) + offs
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + FFN, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * FFN + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, *, batch_invariant: bool = False) -> Tensor:
    expect("gate_up", gate_up, (None, None), FLOATS, gate_up.device)
    rows, double = gate_up.shape
    if double % 2:
        raise ValueError(f"gate_up: expected an even number of columns, gate and up side by side, got {double}")
    out = torch.empty((rows, double // 2), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        swiglu_kernel[(rows, cdiv(double // 2, _BLOCK))](gate_up, out, FFN=double // 2, BLOCK=_BLOCK, num_warps=4)
    return out
