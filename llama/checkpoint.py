"""A checkpoint on disk -> parameters on the device, each covered exactly once, or one error lists every fault.

Every name, shape and dtype is checked before a byte of weights is read or allocated. Host memory peaks at the weights
and a buffer. Nothing in a checkpoint is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llama.config import ModelConfig, read_json
from llama.errors import CheckpointError, LoadError
from llama.meta_format import part_files, parts_expected, read_meta, read_pth
from llama.model import parameter_shapes
from llama.tensor_file import FLOATS, StoredTensor, chunks, is_finite, read_safetensors
from llama.weight_names import weight_names

INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a folder, named, checked and not yet read."""

    folder: Path
    files: list[Path]
    tensors: dict[str, StoredTensor]  # by Hugging Face's names, in the order of the bytes
    problems: list[str]  # empty: `tensors` holds all that the model needs


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, for every tensor that the model needs."""
    shapes = parameter_shapes(config)
    names = weight_names(config).items()
    return {hf: (name.rows, *shapes[name.parameter][1:]) for hf, name in names if name.parameter in shapes}


def load_parameters(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: bool = True
) -> dict[str, Tensor]:
    """Read a checkpoint folder, Hugging Face's or Meta's, sharded or not, as the tensors of `parameter_shapes`.

    Raises LoadError for a file that cannot be read, CheckpointError listing every tensor that is missing, left over,
    doubled, of the wrong shape or dtype, or not finite.
    """
    checkpoint = open_checkpoint(folder, config)
    if checkpoint.problems:
        raise CheckpointError(checkpoint.folder, checkpoint.problems)
    problems = []
    names, shapes = weight_names(config), parameter_shapes(config)
    parameters = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    total = sum(parameter.nbytes for parameter in parameters.values())
    with bytes_bar(total, checkpoint.folder.name, progress) as bar:
        for name, tensor in checkpoint.tensors.items():
            place = names[name]
            target = parameters[place.parameter][place.start : place.start + place.rows]
            finite = True
            for first, chunk in _chunks_into(tensor, target):
                finite &= is_finite(chunk)
                if chunk.data_ptr() != target[first].data_ptr():
                    target[first : first + len(chunk)].copy_(chunk)
                bar.update(chunk.nbytes)
            if not finite:
                problems.append(f"{name}: holds numbers that are not finite in {str(dtype).removeprefix('torch.')}")
    for file in {file for tensor in checkpoint.tensors.values() for file in tensor.files}:
        file.check_unchanged()
    if problems:
        raise CheckpointError(checkpoint.folder, problems)
    return parameters


def _chunks_into(tensor: StoredTensor, target: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in the target's dtype, on the CPU), read straight into the target where that can be."""
    dtype, buffer = FLOATS[tensor.dtype], None
    in_place = target.device.type == "cpu" and target.dtype == dtype
    for first, n in chunks(tensor):
        if buffer is None and not in_place:  # the first chunk is the longest
            buffer = torch.empty((n, *tensor.shape[1:]), dtype=dtype, pin_memory=target.device.type == "cuda")
        rows = target[first : first + n] if buffer is None else buffer[:n]
        tensor.read(first, rows)
        yield first, rows.to(target.dtype)


def bytes_bar(total: int, name: str, shown: bool) -> tqdm:
    """A progress bar in bytes and bytes per second."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not shown, leave=False, mininterval=0.2)


def open_checkpoint(folder: Path | str, config: ModelConfig) -> Checkpoint:
    """Find the files of a folder and every fault that their headers show. Raises LoadError for files that make none."""
    folder = Path(folder)
    parts = part_files(folder) if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file() else []
    files = parts or shard_files(folder)
    if parts:
        contents, problems = read_meta(parts, config)
    else:
        contents, problems = [item for path in files for item in read_safetensors(path).items()], []
    shapes = hf_shapes(config)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in contents:
        if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight"):
            continue  # no parameter needs it
        if name in tensors:
            problems.append(f"{name}: in {tensors[name].where} and again in {tensor.where}")
        elif name not in shapes:
            problems.append(f"{name}: unknown tensor in {tensor.where}")
        else:
            tensors[name] = tensor
            problems += _faults(name, tensor, shapes[name])
    problems += [f"{name}: missing" for name in shapes if name not in tensors]
    if parts and problems:
        _check_part_count(folder, len(parts), tensors, config)
    return Checkpoint(folder, files, tensors, problems)


def _faults(name: str, tensor: StoredTensor, wanted: tuple[int, ...]) -> list[str]:
    problems = []
    if tensor.shape != wanted:
        problems.append(f"{name}: shape {list(tensor.shape)} in {tensor.where}, the config asks for {list(wanted)}")
    if tensor.dtype not in FLOATS:
        problems.append(f"{name}: dtype {tensor.dtype} in {tensor.where}, must be F32, BF16 or F16")
    return problems


def _check_part_count(folder: Path, parts: int, tensors: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Raises LoadError, one sentence instead of a list, if the faults come from parts that were not downloaded."""
    shapes = hf_shapes(config)
    expected = {parts_expected(parts, name, tensor, shapes[name], config) for name, tensor in tensors.items()} - {parts}
    if len(expected) == 1:
        (n,) = expected
        raise LoadError(folder, f"has {parts} of {n} parts; download the others, up to consolidated.{n - 1:02}.pth")


def read_config(folder: Path | str) -> ModelConfig:
    """`ModelConfig.from_dir`; the dtype, which params.json does not say, comes from Meta's first part.

    Raises LoadError, with what to do next where the folder holds something else than a model, and ConfigError.
    """
    folder = Path(folder)
    hf, meta = ((folder / name).is_file() for name in ("config.json", "params.json"))
    if not hf and not meta:
        _refuse_other_kinds(folder)
    config, parts = ModelConfig.from_dir(folder), [] if hf else part_files(folder)
    dtypes = {region.dtype for region in read_pth(parts[0]).values() if len(region.shape) == 2} if parts else set()
    dtype = str(FLOATS.get(min(dtypes, default=""), config.dtype))
    return replace(config, dtype=dtype.removeprefix("torch."))


def _refuse_other_kinds(folder: Path) -> None:
    """Raises LoadError for a folder of a known kind that is no model."""
    if (folder / "adapter_config.json").is_file():
        raise LoadError(
            folder, "is a LoRA adapter, not a model; merge it into its base model and use the merged folder"
        )
    if any(folder.glob("*.gguf")):
        raise LoadError(
            folder, "holds GGUF files; make a folder of them first: scripts/weights.py convert FILE.gguf OUT"
        )


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the only one. Raises LoadError."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadError(index, "has no weight_map")
        files = []
        for file in sorted({str(file) for file in weight_map.values()}):
            if file in ("", ".", "..") or "\0" in file or Path(file).name != file:
                raise LoadError(index, f"names {file!r}, which is not a plain file name inside the folder")
            if not (folder / file).is_file():
                raise LoadError(folder / file, f"is missing, but {INDEX} names it; is this half a download?")
            files.append(folder / file)
        return files
    files = sorted(folder.glob("*.safetensors"))
    if files == [folder / "adapter_model.safetensors"]:
        _refuse_other_kinds(folder)
    if len(files) > 1:
        raise LoadError(folder, f"has {len(files)} safetensors files but no {INDEX}")
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        wrong = "has pickled weights (.bin, .pt) only, which are not opened here; convert them to safetensors first, in"
        raise LoadError(folder, f"{wrong} the program they come from")
    raise LoadError(folder, "has no safetensors file and no consolidated.00.pth")


def tokenizer_file(folder: Path) -> Path | None:
    """tokenizer.model of a folder; Meta's downloads keep it one folder up. None where there is none."""
    places = [folder / TOKENIZER]
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        places.append(folder.absolute().parent / TOKENIZER)
    return next((path for path in places if path.is_file()), None)
