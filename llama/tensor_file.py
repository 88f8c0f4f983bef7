"""Tensors as bytes in files: where they lie, how rows of them are read, and the safetensors header.

A file is opened once and read with pread, never mapped: a file that is cut or replaced meanwhile is a `LoadError`, not
a bus error, and host memory holds what was asked for and nothing else. Knows no tensor by name.
"""

from __future__ import annotations

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
from torch import Tensor

from llama.errors import LoadError

# The number formats a weight may have, by their names in safetensors.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
# Bytes of one number, for all that a header may name.
_ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# A header names at most 9 tensors for each of 1,024 layers; what is longer is no checkpoint of ours.
_MAX_HEADER = 2 << 20
# Bytes read at a time: a chunk is still in the processor's cache when its numbers are checked.
CHUNK = 1 << 20


class TensorFile:
    """A file of weights, open for reading as long as this object lives. Raises LoadError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block
        except OSError as error:
            raise LoadError(path, f"cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._fd)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise LoadError(path, "is not a regular file")
        self.size, self._mtime = found.st_size, found.st_mtime_ns

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` on. Raises LoadError where the file ends too early."""
        done = 0
        while done < len(out):
            try:
                n = os.preadv(self._fd, [out[done:]], offset + done)
            except (OSError, OverflowError) as error:
                raise LoadError(self.path, f"cannot be read at byte {offset + done}: {error}") from error
            if n == 0:
                raise LoadError(self.path, f"ends at byte {offset + done}; it was cut short while being read")
            done += n

    def read(self, offset: int, n: int) -> bytes:
        out = bytearray(n)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def check_unchanged(self) -> None:
        """Raises LoadError if somebody has written to the file since it was opened."""
        found = os.fstat(self._fd)
        if (found.st_size, found.st_mtime_ns) != (self.size, self._mtime):
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint under Hugging Face's name and layout, still in its files.

    files: those it is read from. read(first, out): fill out [rows, ...], contiguous, on the CPU and of this dtype, with
    rows first, first + 1, ...; both in multiples of `step`.
    """

    shape: tuple[int, ...]
    dtype: str
    files: tuple[TensorFile, ...]
    read: Callable[[int, Tensor], None]
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


def stored(region: Region) -> StoredTensor:
    return StoredTensor(region.shape, region.dtype, (region.file,), region.read_rows)


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """(first row, rows) of reads of about CHUNK bytes that cover the tensor."""
    rows, per = tensor.shape[0], row_bytes(tensor.shape, tensor.dtype) * tensor.step
    many = max(1, CHUNK // per) * tensor.step
    for first in range(0, rows, many):
        yield first, min(many, rows - first)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN. tensor: contiguous, on the CPU, fp32, bf16 or fp16.

    As integers, the positive numbers that are not finite lie above all other signed ones, the negative ones above all
    other unsigned ones; so two maxima tell, at the speed of memory.
    """
    if tensor.dtype == torch.float32:
        bits, infinity = tensor.view(torch.int32).numpy(), 0x7F800000
        return bool(bits.max() < infinity and bits.view(np.uint32).max() < infinity + (1 << 31))
    bits, infinity = tensor.view(torch.int16).numpy(), 0x7F80 if tensor.dtype == torch.bfloat16 else 0x7C00
    return bool(bits.max() < infinity and bits.view(np.uint16).max() < infinity + (1 << 15))


# safetensors: eight bytes of length, a JSON object of that length, then the tensors without holes.


def read_safetensors(path: Path) -> dict[str, Region]:
    """Every tensor of a safetensors file, in the order of the bytes. Raises LoadError naming the tensor at fault."""
    file = TensorFile(path)

    def fault(message: str, tensor: str | None = None) -> LoadError:
        return LoadError(path, f"is not a whole safetensors file: {message}", tensor)

    if file.size < 8:
        raise fault(f"it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(file.size - 8, _MAX_HEADER):
        raise fault(f"its header claims {length} bytes, the file has {file.size} (headers: at most {_MAX_HEADER})")
    try:
        header = json.loads(file.read(8, length).decode(), object_pairs_hook=_unique, parse_int=_size)
        json.dumps(header, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise fault(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise fault("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise fault("its metadata is no object of strings")
    begin = 8 + length
    regions = {}
    for name, entry in header.items():
        try:
            dtype, shape, start, end = _entry(entry)
        except ValueError as error:
            raise fault(str(error), name) from error
        regions[name] = (Region(file, begin + start, shape, dtype), begin + end)
    at = begin
    ordered = sorted(regions.items(), key=lambda item: (item[1][0].offset, item[1][1]))
    for name, (region, end) in ordered:
        if region.offset != at:
            raise fault(f"its bytes begin at {region.offset - begin}, those before it end at {at - begin}", name)
        at = end
    if at != file.size:
        raise fault(f"its tensors need {at} bytes, the file has {file.size}")
    return {name: region for name, (region, _) in ordered}


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, end) of a header's entry. Raises ValueError for one that makes no sense."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry needs dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        raise ValueError(f"dtype {str(dtype)[:40]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"shape {str(shape)[:80]} is no list of sizes")
    if not isinstance(span, list) or len(span) != 2 or any(type(n) is not int or not 0 <= n < 1 << 60 for n in span):
        raise ValueError(f"data_offsets {str(span)[:80]} are no pair of positions")
    start, end = span
    if end - start != math.prod(shape) * _ITEMSIZE[dtype]:
        raise ValueError(f"shape {shape} of {dtype} does not fill bytes {start} to {end}")
    return dtype, tuple(shape), start, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _size(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text} is no size")
    return int(text)


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
