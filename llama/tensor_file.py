"""Tensors as bytes in files: where they lie, how rows of them are read, and the safetensors header.

A file is read with pread, never mapped: one that is cut meanwhile is a `LoadError`, not a bus error.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.errors import LoadError

# The number formats a weight may have, by the names that safetensors gives them.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
# Bytes of one number in every format that is read or named in an error.
_ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_HEADER = 2 << 20  # enough for 9 tensors in each of 1,024 layers
_MAX_DIMENSIONS = 8
CHUNK = 1 << 20  # bytes read at a time: still in the processor's cache when the numbers are checked


class TensorFile:
    """A file of weights, open for reading as long as this object lives. Raises LoadError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
        except OSError as error:
            raise LoadError(path, f"cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self.fd)
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError(path, "is not a regular file")
        self.size, self._mtime = status.st_size, status.st_mtime_ns

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` on. Raises LoadError where the file ends too early."""
        done = 0
        while done < len(out):
            try:
                n = os.preadv(self.fd, [out[done:]], offset + done)
            except (OSError, OverflowError) as error:
                raise LoadError(self.path, f"cannot be read at byte {offset + done}: {error}") from error
            if not n:
                raise LoadError(self.path, f"ends at byte {offset + done}; it was cut short while being read")
            done += n

    def read(self, offset: int, n: int) -> bytes:
        out = bytearray(n)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def check_unchanged(self) -> None:
        """Raises LoadError if somebody has written to the file since it was opened."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime):
            raise LoadError(self.path, "was changed while it was being read; try again")


@dataclass(frozen=True, slots=True)
class Region:
    """A row-major tensor in a file. dtype: its name in safetensors."""

    file: TensorFile
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def read_rows(self, first: int, out: Tensor) -> None:
        """Fill out [rows, ...], contiguous, on the CPU and of this dtype, with rows first, first + 1, ..."""
        data = out.view(torch.uint8).numpy().reshape(-1).data
        self.file.read_into(self.offset + first * row_bytes(self.shape, self.dtype), data)

    def read_bytes(self) -> bytes:
        return self.file.read(self.offset, math.prod(self.shape) * _ITEMSIZE[self.dtype])


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint in Hugging Face's layout, still in its files."""

    shape: tuple[int, ...]
    dtype: str
    files: tuple[TensorFile, ...]
    read: Callable[[int, Tensor], None]  # (first, out) as `Region.read_rows`, both in multiples of `step` rows
    step: int = 1

    @property
    def where(self) -> str:
        name, more = self.files[0].path.name, len(self.files) - 1
        return f"{name} and {more} more" if more else name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes from one index of the first dimension to the next."""
    return math.prod(shape[1:]) * _ITEMSIZE[dtype]


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """(first row, rows) of reads of about CHUNK bytes that cover the tensor."""
    rows, per = tensor.shape[0], row_bytes(tensor.shape, tensor.dtype) * tensor.step
    many = max(1, CHUNK // per) * tensor.step
    for first in range(0, rows, many):
        yield first, min(many, rows - first)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN. tensor: contiguous, on the CPU, fp32, bf16 or fp16.

    As integers, infinity and NaN are the largest signed numbers, and their negatives the largest unsigned ones.
    """
    if tensor.dtype == torch.float32:
        bits, infinity = tensor.view(torch.int32).numpy(), 0x7F800000
        return bool(bits.max() < infinity and bits.view(np.uint32).max() < infinity + (1 << 31))
    bits, infinity = tensor.view(torch.int16).numpy(), 0x7F80 if tensor.dtype == torch.bfloat16 else 0x7C00
    return bool(bits.max() < infinity and bits.view(np.uint16).max() < infinity + (1 << 15))


# safetensors: eight bytes of length, a JSON object of that length, then the tensors without holes.


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in the order of the bytes, none of which is read. Raises LoadError."""
    file = TensorFile(path)

    def fault(message: str, tensor: str | None = None) -> LoadError:
        return LoadError(path, f"is not a whole safetensors file: {message}", tensor)

    if file.size < 8:
        raise fault(f"it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _MAX_HEADER):
        raise fault(f"its header claims {length} bytes, the file has {file.size} (headers: at most {_MAX_HEADER})")
    header = file.read(0, 8 + length)
    try:
        entries = _entries(file, header)
    except SafetensorError as error:
        message = str(error).removeprefix("Error while deserializing header: ")
        raise fault(*_reason(header, file.size) or (message, None)) from error
    except OSError as error:
        raise LoadError(path, f"has a header that cannot be checked: {error}") from error
    tensors, at = {}, len(header)
    for name, (dtype, shape) in entries.items():
        if dtype not in _ITEMSIZE or len(shape) > _MAX_DIMENSIONS:
            raise fault(f"dtype {dtype!r} with {len(shape)} dimensions is unknown", name)
        tensors[name] = StoredTensor(shape, dtype, (file,), Region(file, at, shape, dtype).read_rows)
        at += tensors[name].nbytes
    return tensors


def _entries(file: TensorFile, header: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape), in the order of the bytes. Raises SafetensorError, OSError.

    The package maps what it opens, and a mapped file that is cut ends the process. So it gets a sparse file in memory
    with the same header, or the file itself where a limit on the size of files (ulimit -f) leaves no other way.
    """
    memory = os.memfd_create("safetensors")
    try:
        fd = file.fd
        with contextlib.suppress(OSError):
            os.truncate(memory, file.size)
            os.pwrite(memory, header, 0)
            fd = memory
        with safe_open(f"/proc/self/fd/{fd}", "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            return {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    finally:
        os.close(memory)


def _reason(header: bytes, size: int) -> tuple[str, str | None] | None:
    """(what is wrong, tensor) where the package's own words lack the numbers: a shape, or a file cut short."""
    end = 0
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if len(shape) <= _MAX_DIMENSIONS and last - first != math.prod(shape) * _ITEMSIZE[dtype]:
                return f"shape {shape} of {dtype} does not fill bytes {first} to {last}", name
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # no such entries: the package has said so
    need = len(header) + end
    return None if need == size else (f"its tensors need {need} bytes, the file has {size}", None)


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file of these tensors (name -> dtype, shape), and where each one begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * _ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        starts[name], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: start + len(first) for name, start in starts.items()}
