"""Safetensors on disk -> parameters on the device, each covered exactly once, or one error lists every fault.

A shard is mapped into memory and each tensor copied straight to its place, so host memory peaks at one tensor over the
weights. Nothing in a checkpoint is ever run: no pickle is opened and no code is followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from llama.config import ModelConfig, read_json
from llama.errors import CheckpointError, LoadError
from llama.model import parameter_shapes

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the file goes: rows [start, start + rows) of a parameter."""

    parameter: str
    start: int
    rows: int


def hf_places(config: ModelConfig) -> dict[str, Place]:
    """The whole name translation: Hugging Face tensor name -> place in our parameters."""
    q, kv, ffn, dim, vocab = config.q_dim, config.kv_dim, config.ffn_dim, config.dim, config.vocab_size
    places = {"model.embed_tokens.weight": Place("embedding", 0, vocab), "model.norm.weight": Place("norm", 0, dim)}
    if not config.tie_embeddings:
        places["lm_head.weight"] = Place("lm_head", 0, vocab)
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        places |= {
            f"{theirs}.input_layernorm.weight": Place(f"{ours}.attn_norm", 0, dim),
            f"{theirs}.self_attn.q_proj.weight": Place(f"{ours}.qkv_proj", 0, q),
            f"{theirs}.self_attn.k_proj.weight": Place(f"{ours}.qkv_proj", q, kv),
            f"{theirs}.self_attn.v_proj.weight": Place(f"{ours}.qkv_proj", q + kv, kv),
            f"{theirs}.self_attn.o_proj.weight": Place(f"{ours}.o_proj", 0, dim),
            f"{theirs}.post_attention_layernorm.weight": Place(f"{ours}.mlp_norm", 0, dim),
            f"{theirs}.mlp.gate_proj.weight": Place(f"{ours}.gate_up_proj", 0, ffn),
            f"{theirs}.mlp.up_proj.weight": Place(f"{ours}.gate_up_proj", ffn, ffn),
            f"{theirs}.mlp.down_proj.weight": Place(f"{ours}.down_proj", 0, dim),
        }
    return places


def load_parameters(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: bool = True
) -> dict[str, Tensor]:
    """Read a Hugging Face checkpoint folder, sharded or not, as the tensors of `parameter_shapes`.

    Raises LoadError for a file that cannot be read, CheckpointError listing every tensor that is missing, left over,
    doubled, of the wrong shape or dtype, or not finite.
    """
    folder = Path(folder)
    shapes = parameter_shapes(config)
    places = hf_places(config)
    files = shard_files(folder)
    problems = _check_names(files, places, config, shapes)
    if problems:
        raise CheckpointError(folder, problems)
    made = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in made.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name, disable=not progress, leave=False) as bar:
        for _, name, tensor in _tensors(files, places):
            place = places[name]
            target = made[place.parameter][place.start : place.start + place.rows]
            target.copy_(tensor)
            # A sum is finite exactly when every number is, short of sums that no weights reach.
            if not torch.isfinite(target.sum(dtype=torch.float32)):
                problems.append(f"{name}: holds numbers that are not finite in {str(dtype).removeprefix('torch.')}")
            bar.update(target.nbytes)
    if problems:
        raise CheckpointError(folder, problems)
    return made


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the only one. Raises LoadError."""
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadError(index, "has no weight_map")
        files = []
        for file in sorted({str(file) for file in weight_map.values()}):
            if file in ("", ".", "..") or Path(file).name != file:
                raise LoadError(index, f"names {file!r}, which is not a plain file name inside the folder")
            if not (folder / file).is_file():
                raise LoadError(folder / file, f"is missing, but {_INDEX} names it")
            files.append(folder / file)
        return files
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise LoadError(folder, f"has {len(files)} safetensors files but no {_INDEX}")
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise LoadError(folder, "has pickled weights (.bin, .pt) only; convert them to safetensors first")
    raise LoadError(folder, "has no safetensors file")


def _known_extra(name: str, config: ModelConfig) -> bool:
    """Tensors that checkpoints may carry and no parameter needs."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")


def _check_names(
    files: list[Path], places: dict[str, Place], config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """Every fault that the files' headers show, before a byte of weights is read or allocated."""
    problems = []
    seen: dict[str, str] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if _known_extra(name, config):
                    continue
                if name in seen:
                    problems.append(f"{name}: in {seen[name]} and again in {path.name}")
                    continue
                seen[name] = path.name
                place = places.get(name)
                if place is None:
                    problems.append(f"{name}: unknown tensor in {path.name}")
                    continue
                piece = file.get_slice(name)
                shape, wanted = tuple(piece.get_shape()), (place.rows, *shapes[place.parameter][1:])
                if shape != wanted:
                    problems.append(f"{name}: shape {list(shape)} in {path.name}, the config asks for {list(wanted)}")
                if piece.get_dtype() not in ("F32", "BF16", "F16"):
                    problems.append(f"{name}: dtype {piece.get_dtype()} in {path.name}, must be F32, BF16 or F16")
    problems += [f"{name}: missing" for name in places if name not in seen]
    return problems


def _tensors(files: list[Path], places: dict[str, Place]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in places:
                    yield path, name, file.get_tensor(name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(path, f"is not a whole safetensors file: {error}") from error
