"""Write a checkpoint: tensor by tensor into a hidden folder beside the target, then one rename.

The description of the model (config.json, params.json) is written last, so a folder that was cut short never loads.
Memory holds one chunk of one tensor, whatever the size of the model.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama.checkpoint import bytes_bar
from llama.config import ModelConfig
from llama.errors import LoadError
from llama.tensor_file import FLOATS, NAMES, chunks, is_finite
from llama.weight_names import weight_names
from llama_slots.weights.forms import (
    HfWriter,
    MetaWriter,
    Writer,
    check_parts,
    hf_config,
    meta_params,
    nbytes_as,
    shard_count,
)
from llama_slots.weights.source import COMPANIONS, HF, META, Source
from llama_slots.weights.target import replacing


@dataclass(frozen=True)
class Written:
    """What a conversion did."""

    target: Path
    form: str
    files: list[str]
    nbytes: int
    seconds: float


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
    # Refuse what the form cannot say before anything is written.
    if form == META:
        check_parts(config, shards or 1)
    description = hf_config(source, config) if form == HF else meta_params(config)
    parts = (shards or 1) if form == META else shard_count(source, dtypes, shards)
    total = sum(nbytes_as(tensor, dtypes[name]) for name, tensor in source.tensors.items())
    if form == META and config.tie_embeddings:
        total += nbytes_as(source.tensors["model.embed_tokens.weight"], dtypes["model.embed_tokens.weight"])
    with replacing(source.path, target, force, total) as folder:
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
    head_dims = {name: weight.head_dim for name, weight in weight_names(config).items()} if form == META else {}
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with bytes_bar(total, source.path.name, progress) as bar:
        for name, tensor in source.tensors.items():
            if head_dims.get(name):
                tensor = replace(tensor, step=head_dims[name])
            dtype, finite = FLOATS[dtypes[name]], True
            for first, n in chunks(tensor):
                rows = torch.empty((n, *tensor.shape[1:]), dtype=FLOATS[tensor.dtype])
                tensor.read(first, rows)
                converted = rows.to(dtype)
                finite &= is_finite(converted)
                writer.put(name, first, converted)
                bar.update(rows.nbytes)
            if not finite:
                raise LoadError(source.path, f"holds numbers that are not finite in {dtypes[name]}", name)
    for file in {file for tensor in source.tensors.values() for file in tensor.files}:
        file.check_unchanged()


def _companions(source: Source, form: str, config: ModelConfig) -> dict[str, bytes]:
    """The small files beside the weights. Hugging Face's programs read the end ids from generation_config.json."""
    files = dict(source.companions)
    if form == HF and "generation_config.json" not in files:
        ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)}
        files["generation_config.json"] = json.dumps(ids, indent=2).encode()
    assert files.keys() <= {*COMPANIONS, "tokenizer.model"}
    return files
