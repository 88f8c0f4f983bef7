"""Weights on the CPU, in the layout of oneDNN and row by row, and oneDNN's multiply for compiled functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.huge_pages import on_huge_pages
from kernels.linear_weight import LinearWeight

_PACK_BYTES = 1 << 20  # below this size the call overhead of the blocked form costs more than its layout saves
_PACK_ROWS = 16  # the row count that oneDNN lays a weight out for; the layout serves 1 and 256 about as well

# Inductor refuses oneDNN's operator for weights that are not constants. It calls one of our own as it is.
_OPERATORS = torch.library.Library("llama_slots", "FRAGMENT")
_OPERATORS.define("packed_linear(Tensor x, Tensor weight) -> Tensor")


def pack_weight(weight: Tensor, keep_rows: bool = False) -> LinearWeight:
    """As `kernels.pack_weight`. Small weights, and all where torch lacks oneDNN, stay row-major."""
    n, k = weight.shape
    rows = None
    if keep_rows:
        rows = on_huge_pages(pair_columns(weight) if weight.dtype == torch.bfloat16 and k % 2 == 0 else weight)
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    data, blocked = weight.contiguous(), has_onednn and weight.nbytes >= _PACK_BYTES
    if blocked:
        data = torch.ops.mkldnn._reorder_linear_weight(data, _PACK_ROWS)
    return LinearWeight(data, n, k, blocked, rows=rows)


def pair_columns(weight: Tensor) -> Tensor:
    """bf16 [n, k], k even, as int32 [n, k / 2]: column j is the low half of an element, column j + k / 2 the high half.

    A shift or a mask widens them, as a bf16 number is the upper half of an fp32 one.
    """
    n, k = weight.shape
    return weight.reshape(n, 2, k // 2).transpose(1, 2).contiguous().view(torch.int32).view(n, k // 2)


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. x: [rows, k]. weight: `data` of a `blocked` LinearWeight. Returns [rows, n] of x's dtype."""
    return torch.ops.llama_slots.packed_linear(x, weight)


@torch.library.impl(_OPERATORS, "packed_linear", "CompositeExplicitAutograd")
def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


@torch.library.register_fake("llama_slots::packed_linear")
def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
