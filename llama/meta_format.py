"""Meta's checkpoints, `consolidated.NN.pth`, as tensors under Hugging Face's names and in their layout.

A matrix is cut into as many parts as there are files, along its outputs or its inputs. Rotary embedding (arXiv
2104.09864) turns pairs of rows of q and k: (0, 1), (2, 3), ... of each head here, (0, half), (1, half + 1), ... in
Hugging Face's files. A .pth is a zip file with one pickle, which is never run: it may name only what weights need, and
torch opens it with weights_only=True.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama.config import ModelConfig
from llama.errors import LoadError
from llama.tensor_file import FLOATS, NAMES, Region, StoredTensor, TensorFile
from llama.weight_names import weight_names

_PART = re.compile(r"consolidated\.(\d\d)\.pth")
# What the pickle of a state dict names. Anything else may be a program.
_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Za-z0-9]+Storage")
_MAX_PICKLE = 4 << 20  # many times what Llama-2 70B's needs
_LEGACY = (
    "Meta's files come from torch.save as zip files; open it where it was made and save it again, or use safetensors"
)
# Number formats that no weight of ours has, for the message that says so.
_OTHERS = {torch.float64: "F64", torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64"}


def to_half_split(rows: Tensor, head_dim: int) -> Tensor:
    """rows [heads * head_dim, dim], interleaved as Meta's q and k, in Hugging Face's order."""
    return rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def to_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return rows.view(-1, 2, head_dim // 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def part_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, 01, ... of a folder; empty if there is none. Raises LoadError for a gap."""
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _PART.fullmatch(path.name)))
    parts = [folder / f"consolidated.{i:02}.pth" for i in range(len(numbers))]
    for i, number in enumerate(numbers):
        if i != number:
            raise LoadError(parts[i], "is missing, but later parts are there; download it")
    return parts


def read_meta(parts: list[Path], config: ModelConfig) -> tuple[list[tuple[str, StoredTensor]], list[str]]:
    """(name, tensor) for all tensors, unknown ones under Meta's name, and the faults that show between the parts."""
    table = {weight.meta: (hf, weight.split, weight.head_dim) for hf, weight in weight_names(config).items()}
    opened = [read_pth(path) for path in parts]
    tensors, problems = [], []
    for name in dict.fromkeys(name for part in opened for name in part if name != "rope.freqs"):
        regions = [part[name] for part in opened if name in part]
        hf_name, split, head_dim = table.get(name, (name, None, 0))
        lacking = [path.name for path, part in zip(parts, opened, strict=True) if name not in part]
        fault = f"missing in {', '.join(lacking)}" if lacking else _disagreement(regions, split)
        if fault:
            problems.append(f"{name}: {fault}; are all parts of one checkpoint?")
        else:
            tensors.append((hf_name, _joined(regions, split, head_dim)))
    return tensors, problems


def parts_expected(parts: int, name: str, tensor: StoredTensor, wanted: tuple[int, ...], config: ModelConfig) -> int:
    """How many parts would make this tensor whole, if only parts are missing; else `parts`."""
    split = weight_names(config)[name].split
    if split is None or len(tensor.shape) != len(wanted):
        return parts
    have, want = tensor.shape[split], wanted[split]
    whole = have and not parts * want % have and _without(tensor.shape, split) == _without(wanted, split)
    return parts * want // have if whole else parts


def _without(shape: tuple[int, ...], split: int | None) -> list[int]:
    """The sizes that all parts share."""
    return [n for i, n in enumerate(shape) if i != split]


def spans(
    regions: list[Region], split: int | None, first: int, rows: Tensor
) -> Iterator[tuple[Region, int, slice, slice]]:
    """Where rows first, first + 1, ... of the whole lie: (part, its first row, rows and columns of `rows`)."""
    n, at = len(rows), 0
    for region in regions:
        size = region.shape[split or 0]
        if split == 0:
            begin, end = max(first, at), min(first + n, at + size)
            if begin < end:
                yield region, begin - at, slice(begin - first, end - first), slice(None)
        else:
            yield region, first, slice(0, n), slice(at, at + size) if split == 1 else slice(None)
        at += size


def _disagreement(regions: list[Region], split: int | None) -> str | None:
    """What keeps the parts of a tensor from being one, in words."""
    first = regions[0]
    for other in regions[1:]:
        names = first.file.path.name, other.file.path.name
        if other.dtype != first.dtype:
            return f"{first.dtype} in {names[0]}, {other.dtype} in {names[1]}"
        if len(first.shape) != len(other.shape) or _without(first.shape, split) != _without(other.shape, split):
            shapes = f"shape {list(first.shape)} in {names[0]}, {list(other.shape)} in {names[1]}"
            return f"{shapes}, which do not fit together"
        is_copy = split is None and first.dtype in FLOATS and len(first.shape) == 1
        if is_copy and first.read_bytes() != other.read_bytes():
            return f"differs between {names[0]} and {names[1]}"
    return None


def _joined(regions: list[Region], split: int | None, head_dim: int) -> StoredTensor:
    """The whole of the parts, with the rows of q and k in Hugging Face's order."""
    shape = list(regions[0].shape)
    if split is None or split >= len(shape):
        regions, split = regions[:1], None
    else:
        shape[split] = sum(region.shape[split] for region in regions)
    if len(shape) != 2 or (head_dim and shape[0] % head_dim):
        head_dim = 0  # not whole heads: the shape is refused later
    files, read = tuple(region.file for region in regions), partial(_read, regions, split, head_dim)
    return StoredTensor(tuple(shape), regions[0].dtype, files, read, step=head_dim or 1)


def _read(regions: list[Region], split: int | None, head_dim: int, first: int, out: Tensor) -> None:
    target = torch.empty_like(out) if head_dim else out
    for region, row, rows, columns in spans(regions, split, first, out):
        if split == 1 and len(regions) > 1:
            piece = torch.empty((len(out), *region.shape[1:]), dtype=out.dtype)
            region.read_rows(row, piece)
            target[rows, columns] = piece
        else:
            region.read_rows(row, target[rows])
    if head_dim:
        out.copy_(to_half_split(target, head_dim))


# The container. torch says which tensor lies in which storage, the zip file where the storages lie.


def read_pth(path: Path) -> dict[str, Region]:
    """Every tensor of a .pth that torch.save wrote, still in the file. Raises LoadError; never runs what is in it."""
    file = TensorFile(path)
    records = _data_records(file)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # an unpickler meets anything in a file made to harm
        raise LoadError(path, f"is not a file of weights that torch can read: {_first_line(error)}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise LoadError(path, "must hold a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LoadError(path, f"holds {str(name)[:80]!r}, which is no tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            raise LoadError(path, "is not a plain tensor of numbers", name)
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise LoadError(path, "is a view of other numbers; save it as a tensor of its own", name)
    addresses = sorted({tensor.untyped_storage().data_ptr() for tensor in loaded.values()})
    if [a - addresses[0] for a in addresses] != [r - records[0] for r in records]:
        raise LoadError(path, "holds storages that none of its tensors uses; save the tensors alone")
    begin = records[0] - addresses[0]
    names = NAMES | _OTHERS
    return {
        name: Region(file, begin + tensor.data_ptr(), tuple(tensor.shape), names.get(tensor.dtype, "BOOL"))
        for name, tensor in loaded.items()
    }


def _data_records(file: TensorFile) -> list[int]:
    """Where the storages begin, in order, after the zip and the pickle in it were found harmless. Raises LoadError."""
    path = file.path
    if file.size < 4 or file.read(0, 4) != b"PK\x03\x04":
        raise LoadError(path, f"is not a zip file, so it is half a download or of torch's old format. {_LEGACY}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or len({entry.filename for entry in entries}) != len(entries):
                raise LoadError(path, f"holds {len(pickles)} pickles or a name twice; it must hold one of each")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise LoadError(path, "is compressed; torch.save writes plain zip files")
            if (size := pickles[0].file_size) > _MAX_PICKLE:
                raise LoadError(path, f"has a pickle of {size} bytes; weights need less than {_MAX_PICKLE}")
            _check_pickle(path, archive.read(pickles[0]))
        folder = pickles[0].filename.removesuffix("data.pkl") + "data/"
        records = []
        for entry in entries:
            if entry.filename.startswith(folder) and entry.file_size:
                head = file.read(entry.header_offset, 30)  # of the local header; name and extra field follow
                at = entry.header_offset + 30 + int.from_bytes(head[26:28], "little")
                records.append(at + int.from_bytes(head[28:30], "little"))
    except LoadError:
        raise
    except Exception as error:  # zipfile meets anything, too
        wrong = f"is not a whole zip file, perhaps half a download; fetch it again: {_first_line(error)}"
        raise LoadError(path, wrong) from error
    if not records:
        raise LoadError(path, "holds no tensors")
    return sorted(records)


def _check_pickle(path: Path, data: bytes) -> None:
    """Read the pickle's instructions without following them. Raises LoadError if it names what weights do not need."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise LoadError(path, f"its pickle uses {opcode.name}, which no file of weights does; do not trust it")
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
                shown = str(argument)[:80].replace(" ", ".", 1)
                raise LoadError(path, f"its pickle names {shown}, which no weights need; do not trust this file")
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise LoadError(path, f"its pickle is broken: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
