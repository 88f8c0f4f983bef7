"""`LinearWeight`: one matrix of the model, laid out the way its device multiplies fastest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_TILES = 512  # a sum is split only where there are fewer tiles than this: more of them fill a card anyway


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """A weight for `linear`.

    data: [n, k] row-major, or an opaque oneDNN tensor when `blocked`, as on the CPU.
    semaphores: [SPLIT_TILES] int32 zeros on CUDA, where the programs that share a sum count themselves.
    rows: on the CPU, a second copy to be read row by row, if asked for: [n, k] row-major, or of bf16 `pair_columns`.
    """

    data: Tensor
    n: int
    k: int
    blocked: bool
    semaphores: Tensor | None = None
    rows: Tensor | None = None

    @property
    def one_row(self) -> Tensor:
        """`rows`. Raises ValueError where it was not kept."""
        if self.rows is None:
            raise ValueError("weight: its rows were not kept; pack with keep_rows=True")
        return self.rows


def pack_weight(weight: Tensor) -> LinearWeight:
    """As `kernels.pack_weight`, for the Triton kernels: the row-major tensor itself."""
    n, k = weight.shape
    semaphores = torch.zeros(SPLIT_TILES, dtype=torch.int32, device=weight.device)
    return LinearWeight(weight.contiguous(), n, k, False, semaphores)
