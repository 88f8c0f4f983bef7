"""GGUF files as tensors under Hugging Face's names: the gguf package reads the container and the block formats.

The writers of GGUF interleave the rows of q and k as Meta does. The tokenizer inside is made a tokenizer.model again.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint import hf_shapes
from llama.config import ModelConfig, from_hf
from llama.errors import LoadError
from llama.meta_format import to_half_split
from llama.tensor_file import FLOATS, Region, StoredTensor, TensorFile
from llama_slots.extras import needs

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]

# Block formats that are read, beside F32, F16 and BF16. A Q4_0 file keeps its output matrix in Q6_K.
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K")
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_table(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's tensor name -> GGUF's."""
    table = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.tie_embeddings:
        table["lm_head.weight"] = "output.weight"
    for i in range(config.n_layers):
        table |= {f"model.layers.{i}.{hf}.weight": f"blk.{i}.{name}.weight" for hf, name in _NAMES.items()}
    return table


def open_gguf(path: Path) -> tuple[ModelConfig, dict[str, StoredTensor], list[str], bytes | None]:
    """(config, tensors, problems, tokenizer.model). Raises LoadError, ConfigError."""
    if gguf is None:
        raise LoadError(path, needs("gguf"))
    file = TensorFile(path)
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if field.types}
        entries = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader checks little of what it is given
        raise LoadError(path, f"is not a whole GGUF file, perhaps half a download: {error!r:.200}") from error
    config = _config(path, values, "output.weight" not in entries)
    problems, tensors = [], {}
    shapes = hf_shapes(config)
    for hf_name, name in gguf_table(config).items():
        entry = entries.pop(name, None)
        if entry is None:
            problems.append(f"{name}: missing")
            continue
        shape = tuple(int(n) for n in reversed(entry.shape))
        if shape != shapes[hf_name]:
            problems.append(f"{name}: shape {list(shape)}, the header asks for {list(shapes[hf_name])}")
            continue
        kind = entry.tensor_type.name
        if kind not in FLOATS and kind not in BLOCKS:
            problems.append(f"{name}: format {kind}; read are {', '.join((*FLOATS, *BLOCKS))}")
            continue
        heads = config.head_dim if hf_name.endswith(("q_proj.weight", "k_proj.weight")) else 0
        tensors[hf_name] = _stored(file, entry, shape, heads)
    problems += [f"{name}: unknown tensor" for name in entries if name != "rope_freqs.weight"]
    return config, tensors, problems, _tokenizer(values)


def _config(path: Path, values: dict[str, Any], tied: bool) -> ModelConfig:
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise LoadError(path, f"holds a model of architecture {str(architecture)[:40]!r}; only 'llama' is supported")
    if values.get("llama.expert_count"):
        raise LoadError(path, "holds a mixture of experts, which is not supported")
    tokens = values.get("tokenizer.ggml.tokens")
    raw: dict[str, Any] = {
        "hidden_size": values.get("llama.embedding_length"),
        "num_hidden_layers": values.get("llama.block_count"),
        "num_attention_heads": values.get("llama.attention.head_count"),
        "num_key_value_heads": values.get("llama.attention.head_count_kv"),
        "intermediate_size": values.get("llama.feed_forward_length"),
        "head_dim": values.get("llama.attention.key_length"),
        "vocab_size": values.get("llama.vocab_size", None if tokens is None else len(tokens)),
        "rms_norm_eps": values.get("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": values.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": values.get("llama.context_length", 4096),
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": tied,
    }
    # fp32 there, 9.999999747378752e-06 here: the shortest number that is the same in fp32 is the one that was meant.
    for name in ("rms_norm_eps", "rope_theta"):
        raw[name] = float(str(np.float32(raw[name]))) if isinstance(raw[name], float) else raw[name]
    if values.get("llama.rope.scaling.type", "none") != "none":
        factor = values.get("llama.rope.scaling.factor", 1.0)
        raw["rope_scaling"] = {"type": values["llama.rope.scaling.type"], "factor": factor}
    return from_hf(raw)


def _stored(file: TensorFile, entry: Any, shape: tuple[int, ...], head_dim: int) -> StoredTensor:
    kind = entry.tensor_type
    if kind.name in FLOATS:
        region = Region(file, int(entry.data_offset), shape, kind.name)
        read = region.read_rows
    else:
        read = partial(_read_blocks, file, int(entry.data_offset), kind, shape[-1])
    dtype = kind.name if kind.name in FLOATS else "F32"
    if head_dim:
        return StoredTensor(shape, dtype, (file,), partial(_read_heads, read, head_dim), head_dim)
    return StoredTensor(shape, dtype, (file,), read)


def _read_blocks(file: TensorFile, offset: int, kind: Any, width: int, first: int, out: Tensor) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    per_row = width // block * size
    data = np.frombuffer(file.read(offset + first * per_row, len(out) * per_row), dtype=np.uint8)
    out.copy_(torch.from_numpy(gguf.quants.dequantize(data.reshape(len(out), per_row), kind)))


def _read_heads(read: Any, head_dim: int, first: int, out: Tensor) -> None:
    rows = torch.empty_like(out)
    read(first, rows)
    out.copy_(to_half_split(rows, head_dim))


# tokenizer.model is a protobuf message; these are the few fields that SentencePiece needs (sentencepiece_model.proto).


def _tokenizer(values: dict[str, Any]) -> bytes | None:
    """A tokenizer.model with the pieces of a GGUF's 'llama' tokenizer; None for another kind."""
    tokens, scores = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.scores")
    types = values.get("tokenizer.ggml.token_type")
    if values.get("tokenizer.ggml.model") != "llama" or tokens is None or scores is None or types is None:
        return None
    pieces = b"".join(
        _field(1, _field(1, text.encode()) + _float(2, score) + _number(3, kind))
        for text, score, kind in zip(tokens, scores, types, strict=False)
    )
    ids = [values.get(f"tokenizer.ggml.{name}_token_id", default) for name, default in _SPECIAL]
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, 1)  # BPE, vocab_size, byte_fallback
    trainer += b"".join(_number(40 + i, value) for i, value in enumerate((*ids, -1)))  # unk, bos, eos; no pad
    prefix = int(values.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = _field(1, b"identity") + _number(3, prefix) + _number(4, 0) + _number(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


_SPECIAL = (("unknown", 0), ("bos", 1), ("eos", 2))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data
