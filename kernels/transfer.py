"""Small arrays to the device and results back, without waiting for what the device still has to do.

A plain copy between the device and ordinary host memory waits until everything launched before it is done. Copies from
and to pinned memory only take their turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16  # bytes; what Triton's launches distinguish, so that a tensor's place in the buffer makes no new variant


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Contiguous arrays as tensors on the device, in one copy. On the CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # torch keeps the pinned buffer from being used again before the copy out of it has been made.
    return unpack(pack(arrays, pin_memory=device.type == "cuda").to(device, non_blocking=True), arrays)


def fetch(tensor: Tensor) -> Tensor:
    """A copy on the host that may still be on its way: to be read after an event that is recorded behind it.

    A tensor on the CPU is returned as it is.
    """
    if tensor.device.type == "cpu":
        return tensor
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=True)


class Mirror:
    """Arrays on the host, and the same on the device as they were when `send` was last called.

    arrays: to be written. tensors: their copies on the device, which keep their places.
    """

    def __init__(self, device: torch.device, *arrays: np.ndarray) -> None:
        """arrays: contiguous; what the mirror holds first."""
        on_cuda = device.type == "cuda"
        self._host = pack(arrays, pin_memory=on_cuda)
        self._there = self._host.to(device, copy=True)
        self.arrays = [tensor.numpy() for tensor in unpack(self._host, arrays)]
        self.tensors = unpack(self._there, arrays)
        self._sent = torch.cuda.Event() if on_cuda else None

    def wait(self) -> None:
        """Until the arrays may be written again: until the last copy of them has been made."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Copy the arrays to the device, in one go and in its turn."""
        self._there.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def pack(arrays: Sequence[np.ndarray], pin_memory: bool) -> Tensor:
    """The bytes of the arrays, one behind the other, each at a multiple of _ALIGN. Returns [bytes] uint8."""
    packed = torch.empty(sum(_room(array) for array in arrays), dtype=torch.uint8, pin_memory=pin_memory)
    host, at = packed.numpy(), 0
    for array in arrays:
        host[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += _room(array)
    return packed


def unpack(packed: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The tensors that lie in `packed`, on whatever device, as `pack` of such arrays laid them out."""
    tensors, at = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array).dtype
        tensors.append(packed[at : at + array.nbytes].view(dtype).view(array.shape))
        at += _room(array)
    return tensors


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGN) * _ALIGN
