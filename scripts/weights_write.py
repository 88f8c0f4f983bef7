"""Write a checkpoint: tensor by tensor into a hidden folder beside the target, then one rename.

What describes the model (config.json, params.json) is written last, so a folder that was cut short never loads. Memory
holds one chunk of one tensor, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from weights_source import COMPANIONS, HF, META, Source

from llama.checkpoint import INDEX, bytes_bar, hf_shapes
from llama.config import ModelConfig, from_meta, read_json
from llama.errors import ConfigError, LoadError
from llama.meta_format import meta_table, read_pth, spans, to_interleaved
from llama.tensor_file import FLOATS, NAMES, Region, StoredTensor, chunks, is_finite, row_bytes, safetensors_header

# Hugging Face's habit: files of at most about 5 GB.
_SHARD = 5_000_000_000


class WriteError(Exception):
    """The target cannot be written; the message says what to do. The source was not touched."""


@dataclass(frozen=True)
class Written:
    """What a conversion did."""

    target: Path
    form: str
    files: list[str]
    nbytes: int
    seconds: float


class Writer(Protocol):
    """One output format. put: store rows `first`, `first + 1`, ... of a tensor. finish: nothing more will come."""

    def put(self, name: str, first: int, rows: Tensor) -> None: ...

    def finish(self) -> None: ...


def write_checkpoint(
    source: Source, target: Path, form: str, dtype: str | None, shards: int | None, force: bool, progress: bool
) -> Written:
    """form: HF or META. dtype: 'float32' ...; None keeps each tensor's own. shards: files or parts; None chooses.

    Raises WriteError for the target, ConfigError for what the form cannot say, LoadError for the source.
    """
    started = time.perf_counter()
    dtypes = {name: NAMES[getattr(torch, dtype)] if dtype else t.dtype for name, t in source.tensors.items()}
    main = dtype or source.config.dtype
    if not dtype and dtypes:  # what most bytes are
        most = max(set(dtypes.values()), key=lambda d: sum(source.tensors[n].nbytes for n in dtypes if dtypes[n] == d))
        main = str(FLOATS[most]).removeprefix("torch.")
    config = replace(source.config, dtype=main)
    # Refuse what cannot be said before anything is written.
    if form == META:
        check_parts(config, shards or 1)
    description = hf_config(source, config) if form == HF else meta_params(config)
    parts = (shards or 1) if form == META else _shard_count(source, dtypes, shards)
    total = sum(_nbytes(tensor, dtypes[name]) for name, tensor in source.tensors.items())
    if form == META and config.tie_embeddings:
        total += _nbytes(source.tensors["model.embed_tokens.weight"], dtypes["model.embed_tokens.weight"])
    with _replacing(source, target, force, total) as folder:
        if form == HF:
            writer: Writer = HfWriter(folder, source.tensors, dtypes, parts)
        else:
            writer = MetaWriter(folder, config, dtypes, parts)
        _copy(source, dtypes, writer, form, config, progress)
        writer.finish()
        for name, content in _companions(source, form, config).items():
            (folder / name).write_bytes(content)
        name = "config.json" if form == HF else "params.json"
        (folder / name).write_text(json.dumps(description, indent=2) + "\n")
    files = sorted(path.name for path in target.iterdir())
    return Written(target, form, files, total, time.perf_counter() - started)


def _copy(
    source: Source, dtypes: dict[str, str], writer: Writer, form: str, config: ModelConfig, progress: bool
) -> None:
    """Every chunk of every tensor, in the dtype asked for, to the writer. Raises LoadError where a number overflows."""
    head_dims = {name: meta.head_dim for name, meta in meta_table(config).items()} if form == META else {}
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with bytes_bar(total, source.path.name, progress) as bar:
        for name, tensor in source.tensors.items():
            if head_dims.get(name):
                tensor = replace(tensor, step=head_dims[name])
            dtype, finite = FLOATS[dtypes[name]], True
            for first, n in chunks(tensor):
                rows = torch.empty((n, *tensor.shape[1:]), dtype=FLOATS[tensor.dtype])
                tensor.read(first, rows)
                made = rows.to(dtype)
                finite &= is_finite(made)
                writer.put(name, first, made)
                bar.update(rows.nbytes)
            if not finite:
                raise LoadError(source.path, f"holds numbers that are not finite in {dtypes[name]}", name)
    for file in {file for tensor in source.tensors.values() for file in tensor.files}:
        file.check_unchanged()


def _nbytes(tensor: StoredTensor, dtype: str) -> int:
    return tensor.shape[0] * row_bytes(tensor.shape, dtype)


def _companions(source: Source, form: str, config: ModelConfig) -> dict[str, bytes]:
    """The small files that go along. Hugging Face's programs read the end ids from generation_config.json."""
    made = dict(source.companions)
    if form == HF and "generation_config.json" not in made:
        ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)}
        made["generation_config.json"] = json.dumps(ids, indent=2).encode()
    assert made.keys() <= {*COMPANIONS, "tokenizer.model"}
    return made


# The target folder


@contextlib.contextmanager
def _replacing(source: Source, target: Path, force: bool, nbytes: int) -> Iterator[Path]:
    """A hidden folder beside the target, which takes the target's place when all went well. Raises WriteError."""
    target = target.absolute()
    _check_target(source, target, force)
    hidden = target.parent / f".{target.name}.partial"
    old = target.parent / f".{target.name}.replaced"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir(exist_ok=True)
        lock = (hidden / ".lock").open("w")
    except OSError as error:
        raise WriteError(f"{target}: cannot be written: {error.strerror}; name a folder that can be made") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WriteError(f"{target}: another run is writing it; wait for it, or name another folder") from error
        _empty(hidden)  # of a run that was killed
        try:
            _check_space(hidden, nbytes)
            yield hidden
            (hidden / ".lock").unlink()
            _sync(hidden)
            if target.exists() and any(target.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            hidden.rename(target)
            _sync_folder(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            reason = f"writing failed: {error.strerror or error}; free some space or name another folder"
            raise WriteError(f"{target}: {reason}. Nothing was left behind") from error
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(hidden, ignore_errors=True)


def _check_target(source: Source, target: Path, force: bool) -> None:
    here = source.path.absolute()
    if target.resolve() in (here.resolve(), *here.resolve().parents) or here.resolve() in target.resolve().parents:
        raise WriteError(
            f"{target}: is, holds or lies in the source {here}, which is never changed; name another folder"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise WriteError(f"{target}: is not a folder; name another one")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not force:
        raise WriteError(f"{target}: is already there; name another folder, or add --force to replace it")
    if not any((target / name).is_file() for name in ("config.json", "params.json")):
        raise WriteError(f"{target}: holds no checkpoint, so --force does not replace it; name another folder")


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise WriteError(
            f"{folder.parent}: has {free / 1e9:.2f} GB free, {nbytes / 1e9:.2f} GB are needed; free some space, name a "
            "folder on another disk, or ask for a smaller --dtype"
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Hugging Face


class HfWriter:
    def __init__(self, folder: Path, tensors: dict[str, StoredTensor], dtypes: dict[str, str], shards: int) -> None:
        self.folder, self.total = folder, 0
        self.starts: dict[str, tuple[OutFile, int, int]] = {}  # name -> file, first byte, bytes of a row
        self.weight_map: dict[str, str] = {}
        groups = _groups({name: _nbytes(tensor, dtypes[name]) for name, tensor in tensors.items()}, shards)
        for i, names in enumerate(groups):
            title = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
            head, starts = safetensors_header({name: (dtypes[name], tensors[name].shape) for name in names})
            file = OutFile(folder / title)
            file.write(head, 0)
            for name in names:
                self.starts[name] = file, starts[name], row_bytes(tensors[name].shape, dtypes[name])
                self.weight_map[name] = title
                self.total += _nbytes(tensors[name], dtypes[name])

    def put(self, name: str, first: int, rows: Tensor) -> None:
        file, start, per_row = self.starts[name]
        file.write(_bytes(rows), start + first * per_row)

    def finish(self) -> None:
        if len(set(self.weight_map.values())) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard_count(source: Source, dtypes: dict[str, str], shards: int | None) -> int:
    if shards is not None and not 1 <= shards <= len(source.tensors):
        raise ConfigError("shards", shards, f"must be 1 to {len(source.tensors)}, the number of tensors")
    total = sum(_nbytes(tensor, dtypes[name]) for name, tensor in source.tensors.items())
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
    """`torch.save` lays out files of the right size with nothing in them; the numbers are then put in their places."""

    def __init__(self, folder: Path, config: ModelConfig, dtypes: dict[str, str], parts: int) -> None:
        self.table = meta_table(config)
        self.tied = config.tie_embeddings
        self.files: dict[Path, OutFile] = {}
        self.places: dict[str, list[Region]] = {name: [] for name in self.table}
        self.sums: dict[tuple[Path, int], int] = {}  # (file, first byte of a tensor) -> CRC-32 of what was written
        for part in range(parts):
            path = folder / f"consolidated.{part:02}.pth"
            _reserve(path, config, dtypes, parts)
            regions = read_pth(path)
            for name, meta in self.table.items():
                self.places[name].append(regions[meta.name])
                self.sums[path, regions[meta.name].offset] = 0
            self.files[path] = OutFile(path)

    def put(self, name: str, first: int, rows: Tensor) -> None:
        meta = self.table[name]
        if meta.head_dim:
            rows = to_interleaved(rows, meta.head_dim)
        for region, row, here, columns in spans(self.places[name], meta.split, first, rows):
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
    """A .pth with room for one part's tensors."""
    shapes = {name: [*tensor_shape] for name, tensor_shape in _untied_shapes(config).items()}
    tensors = {}
    for name, meta in meta_table(config).items():
        if meta.split is not None:
            shapes[name][meta.split] //= parts
        dtype = FLOATS[dtypes.get(name) or dtypes["model.embed_tokens.weight"]]
        tensors[meta.name] = torch.empty(shapes[name], dtype=dtype)  # never touched, so it takes no memory
    try:
        with torch.serialization.skip_data():
            torch.save(tensors, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error).splitlines()[0]) from error


def _write_sums(out: OutFile, sums: dict[int, int]) -> None:
    """Put the checksums of the data where the zip keeps them: behind each one, and in the central directory."""
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
    # As Meta's own files say it, else in numbers that give this width by the same rule.
    guesses: list[dict[str, float]] = [{"multiple_of": 256}, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}]
    guesses.append({"multiple_of": config.ffn_dim, "ffn_dim_multiplier": min(1.0, config.ffn_dim / base)})
    wanted = replace(config, tie_embeddings=False, eos_ids=(2,), dtype="bfloat16")
    for guess in guesses:
        found = from_meta({**params, **guess})
        if found == wanted:
            return {**params, **guess}
    for field in ("head_dim", "ffn_dim", "rope_scale", "bos_id"):
        if getattr(found, field) != getattr(wanted, field):
            limit = f"Meta's params.json cannot say this ({getattr(found, field)} is meant); keep Hugging Face's form"
            raise ConfigError(field, getattr(wanted, field), limit)
    raise AssertionError("params.json says every other field")


# Bytes


def _bytes(rows: Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).numpy().reshape(-1).data


class OutFile:
    """A file to write into at any place, closed when this object is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self.fd)

    def write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self.fd, view, at)
            view, at = view[n:], at + n
