"""`LinearWeight`: one matrix of the model, laid out the way its device multiplies fastest.

On CUDA it is the row-major [n, k] tensor itself. On x86 CPUs, oneDNN keeps its own blocked copy and the row-major one
is dropped, so a weight is held in memory once. Measured on two cores with AVX-512 (768 to 32,000 columns): blocked
bf16 is 1.4-1.8x faster than `F.linear` at 1 to 256 rows; blocked fp32 1.2-2.6x at 8 to 64 rows, but up to a quarter
slower at one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import runs_triton
from kernels.pages import on_large_pages

# Below this many bytes the call overhead of the blocked form (12 us) costs more than its layout saves.
_PACK_BYTES = 1 << 20
# The row count that oneDNN lays the weight out for; the layout for 16 rows also serves 1 and 256 within a few per cent.
_PACK_ROWS = 16
# A sum is split only where there are fewer tiles than this: with more, the card is full without it.
SPLIT_TILES = 512


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight for `linear`.

    data: [n, k] row-major, or an opaque oneDNN tensor when `blocked`.
    arrivals: [SPLIT_TILES] int32 zeros, where the programs that share a sum on CUDA count themselves; None on the CPU.
    rows: a second copy that is read row by row, for who asked for it: [n, k] row-major, or of bf16 `pair_columns`.
    """

    data: Tensor
    n: int
    k: int
    blocked: bool
    arrivals: Tensor | None = None
    rows: Tensor | None = None

    @property
    def one_row(self) -> Tensor:
        """`rows`. Raises ValueError where it was not kept."""
        if self.rows is None:
            raise ValueError("weight: its rows were not kept; pack with keep_rows=True")
        return self.rows


def pack_weight(weight: Tensor, keep_rows: bool = False) -> LinearWeight:
    """Lay out weight [n, k] (fp32, bf16 or fp16) for `linear` on its own device. The caller drops its own reference.

    keep_rows: on the CPU, hold `rows` as well, at twice the memory.
    """
    n, k = weight.shape
    if runs_triton(weight.device):
        arrivals = torch.zeros(SPLIT_TILES, dtype=torch.int32, device=weight.device)
        return LinearWeight(weight.contiguous(), n, k, False, arrivals)
    rows = None
    if keep_rows:
        rows = on_large_pages(pair_columns(weight) if weight.dtype == torch.bfloat16 and k % 2 == 0 else weight)
    blocked = (
        weight.numel() * weight.dtype.itemsize >= _PACK_BYTES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
    if blocked:
        data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
    else:
        data = weight.contiguous()
    return LinearWeight(data, n, k, blocked, rows=rows)


def pair_columns(weight: Tensor) -> Tensor:
    """bf16 [n, k], k even, as int32 [n, k / 2]: column j is the low half of an element, column j + k / 2 the high half.

    A bf16 number is the upper half of an fp32 one, so that a shift or a mask widens it.
    """
    n, k = weight.shape
    return weight.reshape(n, 2, k // 2).transpose(1, 2).contiguous().view(torch.int32).view(n, k // 2)
