"""The two forms in which a checkpoint is written: Hugging Face's safetensors and Meta's consolidated.NN.pth.

A writer takes the rows of each tensor in order, in pieces of any size, and puts them in place.
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llama.checkpoint import INDEX, hf_shapes
from llama.config import ModelConfig, from_meta, read_json
from llama.errors import ConfigError
from llama.meta_format import read_pth, spans, to_interleaved
from llama.tensor_file import FLOATS, Region, StoredTensor, row_bytes, safetensors_header
from llama.weight_names import weight_names
from llama_slots.weights.source import HF, Source
from llama_slots.weights.target import OutFile

# Hugging Face's habit: files of at most about 5 GB.
_SHARD = 5_000_000_000


class Writer(Protocol):
    """One output format. put: store rows `first`, `first + 1`, ... of a tensor. finish: nothing more will come."""

    def put(self, name: str, first: int, rows: Tensor) -> None: ...

    def finish(self) -> None: ...


def nbytes_as(tensor: StoredTensor, dtype: str) -> int:
    """Bytes of the tensor in another dtype."""
    return tensor.shape[0] * row_bytes(tensor.shape, dtype)


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).numpy().reshape(-1).data


# Hugging Face


class HfWriter:
    def __init__(self, folder: Path, tensors: dict[str, StoredTensor], dtypes: dict[str, str], shards: int) -> None:
        self.folder, self.total = folder, 0
        self.starts: dict[str, tuple[OutFile, int, int]] = {}  # name -> file, first byte, bytes of a row
        self.weight_map: dict[str, str] = {}
        groups = _groups({name: nbytes_as(tensor, dtypes[name]) for name, tensor in tensors.items()}, shards)
        for i, names in enumerate(groups):
            title = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
            head, starts = safetensors_header({name: (dtypes[name], tensors[name].shape) for name in names})
            file = OutFile(folder / title)
            file.write(head, 0)
            for name in names:
                self.starts[name] = file, starts[name], row_bytes(tensors[name].shape, dtypes[name])
                self.weight_map[name] = title
                self.total += nbytes_as(tensors[name], dtypes[name])

    def put(self, name: str, first: int, rows: Tensor) -> None:
        file, start, per_row = self.starts[name]
        file.write(_bytes(rows), start + first * per_row)

    def finish(self) -> None:
        if len(set(self.weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shard_count(source: Source, dtypes: dict[str, str], shards: int | None) -> int:
    if shards is not None and not 1 <= shards <= len(source.tensors):
        raise ConfigError("shards", shards, f"must be 1 to {len(source.tensors)}, the number of tensors")
    total = sum(nbytes_as(tensor, dtypes[name]) for name, tensor in source.tensors.items())
    return shards or min(len(source.tensors), -(-total // _SHARD))


def _groups(sizes: dict[str, int], n: int) -> list[list[str]]:
    """The names in n runs of about equal bytes, none of them empty."""
    names, total = list(sizes), sum(sizes.values())
    groups: list[list[str]] = [[]]
    done = 0
    for i, name in enumerate(names):
        left = n - len(groups)
        if groups[-1] and left and (done >= total * len(groups) / n or len(names) - i == left):
            groups.append([])
        groups[-1].append(name)
        done += sizes[name]
    return groups


def hf_config(source: Source, config: ModelConfig) -> dict[str, Any]:
    """config.json. A Hugging Face source keeps its own, but for the dtype."""
    if source.kind == HF:
        raw = read_json(source.path / "config.json")
        raw.pop("quantization_config", None)
        raw |= {key: config.dtype for key in ("dtype", "torch_dtype") if key in raw} or {"torch_dtype": config.dtype}
        return raw
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scale == 1 else {"type": "linear", "factor": config.rope_scale},
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "torch_dtype": config.dtype,
    }


# Meta


class MetaWriter:
    """`torch.save` lays out files of the right size without data; then the numbers are put in their places."""

    def __init__(self, folder: Path, config: ModelConfig, dtypes: dict[str, str], parts: int) -> None:
        self.table = weight_names(config)
        self.tied = config.tie_embeddings
        self.files: dict[Path, OutFile] = {}
        self.places: dict[str, list[Region]] = {name: [] for name in self.table}
        self.sums: dict[tuple[Path, int], int] = {}  # (file, first byte of a tensor) -> CRC-32 of what was written
        for part in range(parts):
            path = folder / f"consolidated.{part:02}.pth"
            _reserve(path, config, dtypes, parts)
            regions = read_pth(path)
            for name, weight in self.table.items():
                self.places[name].append(regions[weight.meta])
                self.sums[path, regions[weight.meta].offset] = 0
            self.files[path] = OutFile(path)

    def put(self, name: str, first: int, rows: Tensor) -> None:
        weight = self.table[name]
        if weight.head_dim:
            rows = to_interleaved(rows, weight.head_dim)
        for region, row, here, columns in spans(self.places[name], weight.split, first, rows):
            data = _bytes(rows[here, columns] if rows.dim() == 2 else rows[here])
            path = region.file.path
            self.files[path].write(data, region.offset + row * row_bytes(region.shape, region.dtype))
            self.sums[path, region.offset] = zlib.crc32(data, self.sums[path, region.offset])
        if self.tied and name == "model.embed_tokens.weight":  # Meta's models have an output matrix of their own
            self.put("lm_head.weight", first, rows)

    def finish(self) -> None:
        for path, out in self.files.items():
            _write_sums(out, {offset: crc for (file, offset), crc in self.sums.items() if file == path})


def check_parts(config: ModelConfig, parts: int) -> None:
    """Raises ConfigError unless every matrix can be cut into so many parts."""
    for name in ("dim", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        if not 1 <= parts <= 99 or getattr(config, name) % parts:
            raise ConfigError("shards", parts, f"must be 1 to 99 and divide {name}={getattr(config, name)}")


def _reserve(path: Path, config: ModelConfig, dtypes: dict[str, str], parts: int) -> None:
    """Write a .pth with room for the tensors of one part."""
    shapes = {name: [*tensor_shape] for name, tensor_shape in _untied_shapes(config).items()}
    tensors = {}
    for name, weight in weight_names(config).items():
        if weight.split is not None:
            shapes[name][weight.split] //= parts
        dtype = FLOATS[dtypes.get(name) or dtypes["model.embed_tokens.weight"]]
        tensors[weight.meta] = torch.empty(shapes[name], dtype=dtype)  # never touched, so it takes no memory
    try:
        with torch.serialization.skip_data():
            torch.save(tensors, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(
            errno.EIO, f"{path.name} could not be written whole; the disk, or a limit on it, is full"
        ) from error


def _write_sums(out: OutFile, sums: dict[int, int]) -> None:
    """Put the checksums where the zip keeps them: behind the data of each tensor, and in the central directory."""
    with zipfile.ZipFile(out.path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    for entry in entries:
        begin = entry.header_offset + 30 + sum(_shorts(out, entry.header_offset + 26, 2))
        if begin in sums and entry.file_size:
            crc = sums[begin].to_bytes(4, "little")
            out.write(crc, at + 16)
            # A data descriptor is a signature, then the checksum; without one it stands in the local header.
            out.write(crc, begin + entry.file_size + 4 if entry.flag_bits & 8 else entry.header_offset + 14)
        at += 46 + sum(_shorts(out, at + 28, 3))


def _shorts(out: OutFile, at: int, n: int) -> list[int]:
    data = os.pread(out.fd, 2 * n, at)
    return [int.from_bytes(data[i : i + 2], "little") for i in range(0, 2 * n, 2)]


def _untied_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return hf_shapes(replace(config, tie_embeddings=False))


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """params.json. Raises ConfigError for a model that it cannot describe."""
    params: dict[str, Any] = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    params |= {"norm_eps": config.norm_eps, "vocab_size": config.vocab_size}
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    if config.max_seq_len != 4096:
        params["max_seq_len"] = config.max_seq_len
    base = 8 * config.dim // 3
    # The numbers of Meta's own files, else numbers that give this width by the same rule.
    guesses: list[dict[str, float]] = [{"multiple_of": 256}, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}]
    guesses.append({"multiple_of": config.ffn_dim, "ffn_dim_multiplier": min(1.0, config.ffn_dim / base)})
    wanted = replace(config, tie_embeddings=False, eos_ids=(2,), dtype="bfloat16")
    for guess in guesses:
        read = from_meta({**params, **guess})
        if read == wanted:
            return {**params, **guess}
    for field in ("head_dim", "ffn_dim", "rope_scale", "bos_id"):
        if getattr(read, field) != getattr(wanted, field):
            limit = f"Meta's params.json cannot say this ({getattr(read, field)} is meant); keep Hugging Face's form"
            raise ConfigError(field, getattr(wanted, field), limit)
    raise AssertionError("params.json says every other field")
