"""Memory on huge pages, for what is read from end to end in every step."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 1 << 21  # bytes of a huge page on x86 and on most arm64 systems


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A CPU tensor, contiguous, on huge pages where the system has them."""
    memory = _huge_pages(tensor.shape, tensor.dtype)
    return tensor.contiguous() if memory is None else memory.copy_(tensor)


def zeros_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, on huge pages where the system has them."""
    memory = _huge_pages(shape, dtype)
    return torch.zeros(shape, dtype=dtype) if memory is None else memory


def _huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Zeros in memory that the system may back by huge pages, for fewer address lookups.

    None where the system offers none (Linux: transparent huge pages), and for less than a page.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        # Private: shared memory, which Python's default is, has a switch of its own that is mostly off.
        memory = mmap.mmap(-1, -(-n_bytes // _PAGE) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return None
    # The mapping lives as long as the tensor.
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
