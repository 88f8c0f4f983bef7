"""Where weights come from: a folder of Hugging Face or Meta, a GGUF file, or a seed. All of them give a `Source`."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import hf_shapes, open_checkpoint, read_config, tokenizer_file
from llama.config import NAMED, ModelConfig
from llama.errors import ConfigError, LoadError
from llama.setup import find_model
from llama.tensor_file import CHUNK, NAMES, StoredTensor
from llama_slots.weights.gguf_file import open_gguf

# Small files of a Hugging Face folder that describe the tokenizer and the end of texts; they travel with the weights.
COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
HF, META, GGUF, RANDOM = "Hugging Face", "Meta", "GGUF", "random"


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read tensor by tensor. problems: why it is not a whole model.

    companions: the small files beside the weights, by name.
    """

    path: Path
    kind: str
    config: ModelConfig
    files: list[Path]
    tensors: dict[str, StoredTensor]
    problems: list[str]
    companions: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_source(name: str, tokenizer: Path | None = None) -> Source:
    """A folder, 'demo', or a .gguf file. tokenizer: a tokenizer.model to use instead of its own.

    Raises LoadError, ConfigError.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        source = _from_gguf(path)
    elif path.is_file():
        raise LoadError(path, "is a file; name the folder that it is in (only .gguf files are named themselves)")
    else:
        source = _from_folder(find_model(name))
    if tokenizer is not None:
        source.companions["tokenizer.model"] = read_companion(tokenizer)
    return source


def _from_folder(folder: Path) -> Source:
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, config)
    companions = {file: read_companion(folder / file) for file in COMPANIONS if (folder / file).is_file()}
    tokenizer = tokenizer_file(folder)
    if tokenizer is not None:
        companions["tokenizer.model"] = read_companion(tokenizer)
    kind = META if checkpoint.files[0].suffix == ".pth" else HF
    return Source(folder, kind, config, checkpoint.files, checkpoint.tensors, checkpoint.problems, companions)


def _from_gguf(path: Path) -> Source:
    config, tensors, problems, tokenizer = open_gguf(path)
    companions = {}
    if (path.parent / "tokenizer.model").is_file():
        tokenizer = read_companion(path.parent / "tokenizer.model")
    if tokenizer is not None:
        companions["tokenizer.model"] = tokenizer
    return Source(path, GGUF, config, [path], tensors, problems, companions)


def read_companion(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadError(path, f"cannot be read: {error.strerror}") from error


def random_source(config: ModelConfig, seed: int, tokenizer: Path | None) -> Source:
    """Weights of an exact shape: normal with deviation 0.02, norms 1; the same for the same seed and output form."""
    dtype = NAMES[getattr(torch, config.dtype)]
    tensors = {
        name: StoredTensor(shape, dtype, (), partial(_fill, name, seed)) for name, shape in hf_shapes(config).items()
    }
    companions = {} if tokenizer is None else {"tokenizer.model": read_companion(tokenizer)}
    return Source(Path(f"random-{seed}"), RANDOM, config, [], tensors, [], companions)


def _fill(name: str, seed: int, first: int, out: Tensor) -> None:
    if "norm" in name:
        out.fill_(1)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{first}".encode()))
    out.normal_(0, 0.02, generator=generator)


def shape_of(text: str) -> ModelConfig:
    """A ModelConfig from '7B', '13B', '70B', a folder, or 'dim=64,n_layers=2,n_heads=8,...'. Raises ConfigError."""
    if text in NAMED:
        return NAMED[text]
    if "=" not in text:
        if Path(text).is_dir() or text == "demo":
            return read_config(find_model(text))
        raise ConfigError(
            "model", text, f"is none of {', '.join(NAMED)}, no folder, and no shape like dim=64,n_layers=2"
        )
    given: dict[str, float | int] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        try:
            given[key.strip()] = float(value) if key.strip() in ("norm_eps", "rope_theta", "rope_scale") else int(value)
        except ValueError as error:
            raise ConfigError("model", item, "must be name=number") from error
    given.setdefault("n_kv_heads", given.get("n_heads", 0))
    if given.get("n_heads") and "dim" in given:
        given.setdefault("head_dim", int(given["dim"] // given["n_heads"]))
    given["tie_embeddings"] = bool(given.get("tie_embeddings", 0))
    known = {field.name for field in fields(ModelConfig)}
    if strange := given.keys() - known:
        raise ConfigError("model", text, f"a shape has no {min(strange)}; it may have {', '.join(sorted(known))}")
    needed = ("dim", "n_layers", "n_heads", "ffn_dim", "vocab_size")
    if missing := [name for name in needed if name not in given]:
        raise ConfigError("model", text, f"a shape needs {', '.join(needed)}; left out: {', '.join(missing)}")
    return ModelConfig(**given)  # type: ignore[arg-type]


def named_model(config: ModelConfig) -> str | None:
    """'7B', '13B' or '70B' if the shape is that of one of Meta's Llama-2 models."""
    for name, known in NAMED.items():
        like = replace(known, dtype=config.dtype, eos_ids=config.eos_ids, max_seq_len=config.max_seq_len)
        if replace(config, norm_eps=known.norm_eps) == like:
            return name
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
