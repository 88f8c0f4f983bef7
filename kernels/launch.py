"""Which card a kernel is compiled for, and the checks that every kernel's wrapper makes before it launches.

This file alone asks whether triton is installed; it exists for Linux only. The kernel files simply import it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from triton.runtime.driver import driver

# Triton's interpreter runs kernels on CPU tensors, for tests. Triton reads the variable once, when it is imported.
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def gpu_arch() -> int:
    """The architecture of the current card: 80, 90, 100 ... The interpreter runs what sm_90 would run."""
    return 90 if INTERPRET else int(driver.active.get_current_target().arch)


def expect(
    name: str, tensor: Tensor, shape: tuple[int | None, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...], device: torch.device,
) -> None:  # fmt: skip
    """Raise a ValueError that names the argument unless it is such a tensor, contiguous. None in shape: any size."""
    if tensor.dim() != len(shape) or any(n not in (None, size) for n, size in zip(shape, tensor.shape, strict=True)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if tensor.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
        raise ValueError(f"{name}: expected dtype {dtypes}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n: the only lengths a Triton tile can have."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, by: int) -> int:
    """How many tiles of `by` cover n."""
    return -(-n // by)
