"""Small arrays to a card and results back, without waiting for the card.

A plain copy between a card and ordinary host memory waits for everything launched before it. Copies from and to pinned
memory are queued.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16  # bytes; Triton compiles anew for pointers of another alignment


def to_device(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """As `kernels.to_device`; CPU tensors are for Triton's interpreter."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # torch does not use the pinned buffer again before the copy out of it has been made.
    return unpack(pack(arrays, pin_memory=device.type == "cuda").to(device, non_blocking=True), arrays)


def to_host(tensor: Tensor) -> Tensor:
    """As `kernels.to_host`."""
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=True)


class PinnedBuffer:
    """Arrays on the host, and the same on the device as they were when `send` was last called.

    arrays: to be written; given contiguous, as the first contents. tensors: their copies, which keep their places.
    """

    def __init__(self, device: torch.device, *arrays: np.ndarray) -> None:
        on_cuda = device.type == "cuda"
        self._on_host = pack(arrays, pin_memory=on_cuda)
        self._on_device = self._on_host.to(device, copy=True)
        self.arrays = [tensor.numpy() for tensor in unpack(self._on_host, arrays)]
        self.tensors = unpack(self._on_device, arrays)
        self._sent = torch.cuda.Event() if on_cuda else None

    def wait(self) -> None:
        """Wait until the last copy of the arrays has been made, so that they may be written again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Queue one copy of all arrays to the device."""
        self._on_device.copy_(self._on_host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def pack(arrays: Sequence[np.ndarray], pin_memory: bool) -> Tensor:
    """The bytes of the arrays one after the other, each at a multiple of _ALIGN. Returns [bytes] uint8."""
    packed = torch.empty(sum(map(_padded, arrays)), dtype=torch.uint8, pin_memory=pin_memory)
    buffer, at = packed.numpy(), 0
    for array in arrays:
        buffer[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += _padded(array)
    return packed


def unpack(packed: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The tensors that lie in `packed`, on whatever device, as `pack` of such arrays laid them out."""
    tensors, at = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array).dtype
        tensors.append(packed[at : at + array.nbytes].view(dtype).view(array.shape))
        at += _padded(array)
    return tensors


def _padded(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGN) * _ALIGN
