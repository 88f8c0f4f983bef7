"""Model descriptions and engine options: what Hugging Face and Meta write, the named shapes, and bad values by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.config import EngineConfig, ModelConfig, from_hf, from_meta
from llama.errors import ConfigError, EngineError, LoadError

SharedFile = Callable[[str], Path]

# Llama-2-70b-hf's config.json, from memory of its published form.
HF_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
META_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
META_13B = {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1}
META_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
    "norm_eps": 1e-05, "vocab_size": -1,
}  # fmt: skip

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, params", [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192)]
)  # fmt: skip
def test_named_shapes(name: str, params: int) -> None:
    assert ModelConfig.named(name).n_params == params


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="7B, 13B, 70B") as caught:
        ModelConfig.named("34B")
    assert (caught.value.field, caught.value.value) == ("model", "34B")


@pytest.mark.parametrize("name, raw", [("7B", META_7B), ("13B", META_13B), ("70B", META_70B)])
def test_meta_params_are_the_named_shapes(name: str, raw: dict[str, Any]) -> None:
    assert from_meta(raw) == ModelConfig.named(name)


def test_hf_config() -> None:
    config = from_hf(HF_70B)
    assert config == ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, dtype="float16")
    assert (config.q_dim, config.kv_dim) == (8192, 1024)


def test_hf_defaults() -> None:
    """What an old or sparse config.json leaves out: no groups, tied embeddings off, theta 1e4, context 2048."""
    config = from_hf(SMALL)
    assert (config.n_kv_heads, config.head_dim, config.max_seq_len) == (4, 16, 2048)
    assert (config.norm_eps, config.rope_theta, config.rope_scale) == (1e-6, 1e4, 1.0)
    assert (config.tie_embeddings, config.bos_id, config.eos_ids, config.dtype) == (False, 1, (2,), "float32")


@pytest.mark.parametrize(
    "extra, theta, scale",
    [
        ({"rope_theta": 5e5}, 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e6}, 1e6, 2.0),
        ({"rope_scaling": {"rope_type": "default"}}, 1e4, 1.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0, 1.0),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8}}, 500.0, 8),
    ],
)
def test_rope(extra: dict[str, Any], theta: float, scale: float) -> None:
    config = from_hf(SMALL | extra)
    assert (config.rope_theta, config.rope_scale) == (theta, scale)


@pytest.mark.parametrize(
    "extra, field",
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"model_type": "qwen2"}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scale"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rms_norm_eps": math.inf}, "norm_eps"),
        ({"rms_norm_eps": None}, "norm_eps"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 62}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"num_key_value_heads": 0}, "n_kv_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"head_dim": 100_000}, "head_dim"),
        ({"num_hidden_layers": 10**9}, "n_layers"),
        ({"num_hidden_layers": 2.0}, "n_layers"),
        ({"intermediate_size": -1}, "ffn_dim"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"max_position_embeddings": None}, "max_seq_len"),
        ({"eos_token_id": 50}, "bos/eos id"),
        ({"eos_token_id": [2, "3"]}, "bos/eos id"),
        ({"bos_token_id": -1}, "bos/eos id"),
        ({"torch_dtype": "float64"}, "dtype"),
        ({"torch_dtype": 16}, "dtype"),
    ],
)
def test_a_bad_hf_config_names_the_field(extra: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf(SMALL | extra)
    assert caught.value.field == field


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="missing") as caught:
        from_hf({key: value for key, value in SMALL.items() if key != name})
    assert caught.value.field == name


@pytest.mark.parametrize(
    "extra, field",
    [
        ({"dim": None}, "dim"),
        ({"dim": True}, "dim"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 3}, "n_heads"),
        ({"n_layers": "32"}, "n_layers"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": math.nan}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": math.inf}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier"),
        ({"vocab_size": -2}, "vocab_size"),
        ({"norm_eps": "small"}, "norm_eps"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
    ],
)
def test_bad_meta_params_name_the_field(extra: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_meta(META_7B | extra)
    assert caught.value.field == field


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)

# On a busy machine, making up the values may take longer than hypothesis likes.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(st.dictionaries(st.sampled_from([*HF_70B, "head_dim", "rope_theta", "rope_parameters"]), json_values))
def test_any_hf_values_are_taken_or_refused(extra: dict[str, Any]) -> None:
    try:
        config = from_hf(SMALL | extra)
    except EngineError:
        return
    assert config.n_params > 0


@unhurried
@given(st.dictionaries(st.sampled_from([*META_70B, "rope_theta", "max_seq_len"]), json_values))
def test_any_meta_values_are_taken_or_refused(extra: dict[str, Any]) -> None:
    try:
        config = from_meta(META_7B | extra)
    except EngineError:
        return
    assert config.n_params > 0


# --- files ----------------------------------------------------------------------------------------------------------


def test_from_dir(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(META_7B))
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.named("7B")
    (tmp_path / "config.json").write_text(json.dumps(HF_70B))
    assert ModelConfig.from_dir(tmp_path).n_layers == 80, "config.json goes first"


def test_generation_config_may_name_more_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert ModelConfig.from_dir(tmp_path).eos_ids == (1, 2)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ModelConfig.from_dir(tmp_path).eos_ids == (2,)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError) as caught:
        ModelConfig.from_dir(tmp_path)
    assert caught.value.path == tmp_path / "config.json"


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"neither config\.json .* nor params\.json") as caught:
        ModelConfig.from_dir(tmp_path)
    assert caught.value.path == tmp_path


def test_remote_code_is_reported_and_never_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = SMALL | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    assert from_hf(raw) == from_hf(SMALL)
    assert "auto_map is ignored" in caplog.text


@pytest.mark.parametrize("folder, heads", [("stories260K-hf", 8), ("babyllama361-hf", 8)])
def test_shared_models(shared_file: SharedFile, folder: str, heads: int) -> None:
    config = ModelConfig.from_dir(shared_file(f"models/{folder}"))
    assert (config.n_heads, config.n_kv_heads, config.tie_embeddings) == (heads, 4, True)
    assert config.eos_ids == (1, 2)
    assert config.n_params == {"stories260K-hf": 260_032, "babyllama361-hf": 969_216}[folder]


# --- engine options ---------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, list[Any]] = {
    "device": ["tpu", "cuda:", "cuda:x", "0", "cuda:\u00b2", "cuda:-1", "", None, 5],
    "dtype": ["float64", "fp8", "", None, 16],
    "slots": [0, -1, True, 1.0, "30", None, 2**20],
    "block_size": [0, -16, 1.5, 2048],
    "max_batch_tokens": [0, -1, 2**21, None],
    "max_batch_seqs": [0, -1, 2**17, None],
    "kv_memory": [0, -1, 1e9, True, "1G"],
    "max_seq_len": [0, -1, 1.5, True],
    "prefix_cache": [1, None, "on"],
    "batch_invariant": [1, 0, "auto"],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD_OPTIONS.items() for v in values], ids=repr)
def test_a_bad_option_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})
    assert (caught.value.field, caught.value.value) == (field, value)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="slot"):
        EngineConfig(slot=3)  # type: ignore[call-arg]


def test_the_defaults() -> None:
    config = EngineConfig()
    assert (config.slots, config.prefix_cache, config.device, config.dtype) == (30, True, "auto", "auto")
