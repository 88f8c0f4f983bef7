"""`packed_linear`: oneDNN's multiply with a matrix of its own layout, as an operator that torch.compile calls as it is.

Inductor has a form of its own for oneDNN's operator, which takes constants for weights only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OPERATORS = torch.library.Library("paged_llama_kernels", "FRAGMENT")
_OPERATORS.define("packed_linear(Tensor x, Tensor weight) -> Tensor")


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


_OPERATORS.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("paged_llama_kernels::packed_linear")
def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. x: [rows, k]. weight: `data` of a `blocked` LinearWeight. Returns [rows, n] of x's dtype."""
    return torch.ops.paged_llama_kernels.packed_linear(x, weight)
