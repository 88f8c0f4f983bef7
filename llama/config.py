"""`ModelConfig` (the shape of a Llama), `EngineConfig` (how it is run) and `Limits` (what one request may ask).

Names inside are Meta's (dim, n_layers, ...); Hugging Face's config.json and Meta's params.json are translated here.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama.errors import ConfigError, LoadError

log = logging.getLogger("llama")

DTYPES = ("float32", "bfloat16", "float16")


def _check_count(name: str, value: object, ceiling: int | None = None, needs: str = "must be") -> None:
    if type(value) is not int or value < 1 or (ceiling is not None and value > ceiling):
        limit = "of at least 1" if ceiling is None else f"from 1 to {ceiling}"
        raise ConfigError(name, value, f"{needs} a whole number {limit}")


def _check_positive(name: str, value: object, ceiling: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float(ceiling):
        raise ConfigError(name, value, f"must be a number above 0 and below {ceiling}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-2 model. Raises ConfigError for anything this engine cannot run."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scale: float = 1.0  # linear RoPE scaling: positions are divided by this
    max_seq_len: int = 4096
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"  # of the checkpoint

    def __post_init__(self) -> None:
        ceilings = {
            "dim": 1 << 17,
            "n_layers": 1024,
            "n_heads": 1024,
            "n_kv_heads": 1024,
            "head_dim": 256,
            "ffn_dim": 1 << 19,
            "vocab_size": 1 << 20,
            "max_seq_len": 1 << 20,
        }
        for name, ceiling in ceilings.items():
            _check_count(name, getattr(self, name), ceiling)
        for name in ("norm_eps", "rope_theta", "rope_scale"):
            _check_positive(name, getattr(self, name), "1e18")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError("n_kv_heads", self.n_kv_heads, f"must divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even: rotary embedding turns pairs")
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        for token_id in (self.bos_id, *self.eos_ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ConfigError("bos/eos id", token_id, f"must be a token id below vocab_size={self.vocab_size}")

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        per_layer = 2 * self.q_dim + 2 * self.kv_dim + 3 * self.ffn_dim + 2  # rows of dim: q, k, v, o, MLP, norms
        embeddings = self.vocab_size * (1 if self.tie_embeddings else 2)
        return self.dim * (self.n_layers * per_layer + embeddings + 1)

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """One of Meta's shapes: '7B', '13B' or '70B'."""
        if name not in NAMED:
            raise ConfigError("model", name, f"must be one of {', '.join(NAMED)}")
        return NAMED[name]

    @classmethod
    def from_dir(cls, folder: Path | str) -> ModelConfig:
        """From a folder's config.json (Hugging Face) or params.json (Meta). Raises LoadError, ConfigError."""
        folder = Path(folder)
        if (folder / "config.json").is_file():
            config = from_hf(read_json(folder / "config.json"))
            generation = folder / "generation_config.json"
            return _with_eos(config, read_json(generation).get("eos_token_id")) if generation.is_file() else config
        if (folder / "params.json").is_file():
            return from_meta(read_json(folder / "params.json"))
        raise LoadError(
            folder, "holds neither config.json (Hugging Face) nor params.json (Meta); name the folder that has it"
        )


# Meta's shapes: Llama 2 paper, arXiv 2307.09288.
NAMED = {
    "7B": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000),
    "13B": ModelConfig(5120, 40, 40, 40, 128, 13824, 32000),
    "70B": ModelConfig(8192, 80, 64, 8, 128, 28672, 32000),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises LoadError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoadError(path, f"must hold a JSON object, holds {type(value).__name__}")
    return value


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """Hugging Face's config.json of a LlamaForCausalLM."""
    architectures, kind = raw.get("architectures") or ["LlamaForCausalLM"], raw.get("model_type", "llama")
    if kind != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ConfigError("architectures", architectures or kind, "only LlamaForCausalLM is supported")
    for name, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if raw.get(name, wanted) != wanted:
            raise ConfigError(name, raw[name], f"only {wanted!r} is supported")
    for name in ("auto_map", "quantization_config"):
        if raw.get(name):
            log.warning("config.json: %s is ignored; no code of a checkpoint is ever run", name)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if name not in raw:
            raise ConfigError(name, None, "is missing from config.json")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError("rope_scaling", rope, "must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError("rope_scaling", kind, "only linear scaling is supported")
    n_heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim")
    if head_dim is None:
        for name in ("hidden_size", "num_attention_heads"):
            _check_count(name, raw[name])
        if raw["hidden_size"] % n_heads:
            raise ConfigError("num_attention_heads", n_heads, f"must divide hidden_size={raw['hidden_size']}")
        head_dim = raw["hidden_size"] // n_heads
    n_kv_heads = raw.get("num_key_value_heads")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    bos_id = raw.get("bos_token_id")
    config = ModelConfig(
        dim=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        head_dim=head_dim,
        ffn_dim=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        rope_scale=rope.get("factor", 1.0) if kind == "linear" else 1.0,
        max_seq_len=raw.get("max_position_embeddings", 2048),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        bos_id=1 if bos_id is None else bos_id,
        dtype=str(dtype).removeprefix("torch."),
    )
    return _with_eos(config, raw.get("eos_token_id"))


def from_meta(raw: dict[str, Any]) -> ModelConfig:
    """Meta's params.json. Llama 2's files leave out the context (4096) and write the vocabulary as -1 (32,000)."""
    for name in ("dim", "n_layers", "n_heads"):
        _check_count(name, raw.get(name), needs="params.json needs")
    dim, n_heads, n_kv_heads = raw["dim"], raw["n_heads"], raw.get("n_kv_heads")
    multiple = raw.get("multiple_of", 256)
    _check_count("multiple_of", multiple)
    if dim % n_heads:
        raise ConfigError("n_heads", n_heads, f"must divide dim={dim}")
    factor = 1.0 if raw.get("ffn_dim_multiplier") is None else raw["ffn_dim_multiplier"]
    _check_positive("ffn_dim_multiplier", factor, "1e6")
    # The feed-forward width as in Meta's own model code: 2/3 of 4 * dim, times the multiplier, rounded up.
    ffn_dim = int(factor * (2 * 4 * dim // 3))
    return ModelConfig(
        dim=dim,
        n_layers=raw["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads,
        head_dim=dim // n_heads,
        ffn_dim=-(-ffn_dim // multiple) * multiple,
        vocab_size=32000 if raw.get("vocab_size", -1) == -1 else raw["vocab_size"],
        norm_eps=raw.get("norm_eps", 1e-5),
        rope_theta=raw.get("rope_theta", 10000.0),
        max_seq_len=raw.get("max_seq_len", 4096),
    )


def _with_eos(config: ModelConfig, eos: Any) -> ModelConfig:
    """config with the end-of-sequence ids that a file names: an int, a list, or nothing."""
    if eos is None:
        return config
    return replace(config, eos_ids=tuple(eos) if isinstance(eos, list) else (eos,))


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run.

    device: 'auto' (CUDA when there is one), 'cpu', 'cuda' or 'cuda:N'.
    dtype: of the weights: 'auto' (the checkpoint's; fp32 for fp16 on the CPU), or one of DTYPES.
    slots: requests in flight; further ones are refused or wait. Default 30.
    block_size: token positions per cache block; None: 64 on CUDA, 16 on the CPU.
    max_batch_tokens: tokens computed in one step, of prompts and decodes together. Default 2048.
    max_batch_seqs: sequences in one step. Default 256.
    kv_memory: bytes of KV cache; None: what the device has left; on the CPU what the slots can use, at most a quarter.
    max_seq_len: context in tokens; None: the model's own, which it cannot exceed.
    prefix_cache: keep and find the blocks of equal prompt starts. Default on.
    batch_invariant: same bits alone and in any batch; None: on for CUDA, off for the CPU, where it costs most speed.
    cuda_graphs: replay decodes and short prompts as CUDA graphs; nothing on the CPU. Default on.
    compile: on the CPU, decodes and short prompts by layers that torch.compile made; not with batch_invariant or
        async_scheduling. Takes twice the memory of the weights, a C++ compiler, and time at the start. Default off.
    async_scheduling: launch a step before the last one is read; None: on for CUDA, off for the CPU, which gains none.
    threads: CPU threads of one operation; None: torch's own number, and one in very small steps.
    """

    device: str = "auto"
    dtype: str = "auto"
    slots: int = 30
    block_size: int | None = None
    max_batch_tokens: int = 2048
    max_batch_seqs: int = 256
    kv_memory: int | None = None
    max_seq_len: int | None = None
    prefix_cache: bool = True
    batch_invariant: bool | None = None
    cuda_graphs: bool = True
    compile: bool = False
    async_scheduling: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        ceilings = {"slots": 1 << 16, "block_size": 1024, "max_batch_tokens": 1 << 20, "max_batch_seqs": 1 << 16}
        for name, ceiling in ceilings.items():
            if name != "block_size" or self.block_size is not None:
                _check_count(name, getattr(self, name), ceiling)
        for name in ("kv_memory", "max_seq_len", "threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(name, value, "must be a whole number of at least 1, or None")
        if self.dtype not in ("auto", *DTYPES):
            raise ConfigError("dtype", self.dtype, f"must be 'auto' or one of {', '.join(DTYPES)}")
        for name in ("prefix_cache", "batch_invariant", "cuda_graphs", "compile", "async_scheduling"):
            value = getattr(self, name)
            if type(value) is not bool and not (value is None and name in ("batch_invariant", "async_scheduling")):
                raise ConfigError(name, value, "must be True or False")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            raise ConfigError("device", self.device, "must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.compile and self.batch_invariant:
            raise ConfigError("compile", True, "cannot keep batch_invariant=True: a sequence alone has other bits then")
        if self.compile and self.async_scheduling:
            raise ConfigError("compile", True, "needs each token before the next step: not with async_scheduling=True")


@dataclass(frozen=True)
class Limits:
    """What one request may ask at most; shared by the library and HTTP."""

    n: int = 8
    sequences: int = 64  # prompts x max(n, best_of)
    messages: int = 1024
    fields: int = 128
    reported_names: int = 32  # of ignored fields
    logprobs: int = 20
    completion_logprobs: int = 5
    stop: int = 4
    stop_chars: int = 256
    stop_token_ids: int = 128
    logit_bias: int = 1024
