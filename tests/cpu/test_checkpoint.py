"""Checkpoint folders: whole, sharded and tied ones load to the same parameters; every fault names file and tensor."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama import Engine, EngineConfig, ModelConfig, SamplingParams
from llama.checkpoint import load_parameters
from llama.errors import CheckpointError, ConfigError, LoadError, TokenizerError
from llama.model import parameter_shapes, random_parameters
from llama.tensor_file import read_safetensors
from llama.weight_names import weight_names

CONFIG = ModelConfig(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=20, vocab_size=37, max_seq_len=64, dtype="float32"
)
INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


def hf_tensors(config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    """A random checkpoint under Hugging Face's names, written out here and not through the loader's own table."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    c = config
    made = {"model.embed_tokens.weight": normal(c.vocab_size, c.dim), "model.norm.weight": normal(c.dim)}
    if not c.tie_embeddings:
        made["lm_head.weight"] = normal(c.vocab_size, c.dim)
    for i in range(c.n_layers):
        made |= {
            f"model.layers.{i}.input_layernorm.weight": normal(c.dim),
            f"model.layers.{i}.post_attention_layernorm.weight": normal(c.dim),
            f"model.layers.{i}.self_attn.q_proj.weight": normal(c.q_dim, c.dim),
            f"model.layers.{i}.self_attn.k_proj.weight": normal(c.kv_dim, c.dim),
            f"model.layers.{i}.self_attn.v_proj.weight": normal(c.kv_dim, c.dim),
            f"model.layers.{i}.self_attn.o_proj.weight": normal(c.dim, c.q_dim),
            f"model.layers.{i}.mlp.gate_proj.weight": normal(c.ffn_dim, c.dim),
            f"model.layers.{i}.mlp.up_proj.weight": normal(c.ffn_dim, c.dim),
            f"model.layers.{i}.mlp.down_proj.weight": normal(c.dim, c.ffn_dim),
        }
    return made


def write_config(folder: Path, config: ModelConfig = CONFIG) -> None:
    raw = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim, "vocab_size": config.vocab_size, "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))


def write_shards(folder: Path, tensors: dict[str, Tensor], n: int = 3) -> list[Path]:
    """The tensors dealt out to n files, and the index. Returns the files."""
    names = sorted(tensors)
    weight_map, files = {}, []
    for i in range(n):
        file = folder / f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = {name: tensors[name] for name in names[i::n]}
        save_file(part, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return files


def load(folder: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_parameters(folder, config, dtype, CPU, progress=False)


def problems_of(folder: Path, config: ModelConfig = CONFIG) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load(folder, config)
    assert caught.value.path == folder
    assert all(problem in str(caught.value) for problem in caught.value.problems[:20])
    return caught.value.problems


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_lands_in_its_place(tmp_path: Path, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    tensors = hf_tensors(config)
    save_file(tensors, tmp_path / "model.safetensors")
    made = load(tmp_path, config)
    assert {name: tuple(t.shape) for name, t in made.items()} == parameter_shapes(config)
    assert ("lm_head" in made) is not tied
    assert torch.equal(made["embedding"], tensors["model.embed_tokens.weight"])
    qkv = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(made["layers.1.qkv_proj"], torch.cat(qkv))
    gate_up = [tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(made["layers.0.gate_up_proj"], torch.cat(gate_up))
    assert torch.equal(made["layers.0.mlp_norm"], tensors["model.layers.0.post_attention_layernorm.weight"])
    assert sum(t.numel() for t in made.values()) == config.n_params


@pytest.mark.parametrize("n", [1, 2, 5])
def test_sharded_is_unsharded(tmp_path: Path, n: int) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    whole.mkdir()
    sharded.mkdir()
    save_file(hf_tensors(), whole / "model.safetensors")
    write_shards(sharded, hf_tensors(), n)
    assert equal(load(whole), load(sharded))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {name: t.to(stored) for name, t in hf_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    made = load(tmp_path, dtype=wanted)
    assert {t.dtype for t in made.values()} == {wanted}
    assert torch.equal(made["norm"], tensors["model.norm.weight"].to(wanted))


def test_extra_tensors_that_old_checkpoints_carry(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_embeddings=True)
    tensors = hf_tensors(config)
    expected = dict(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # written out although it is tied
    save_file(tensors, tmp_path / "model.safetensors")
    made = load(tmp_path, config)
    assert "lm_head" not in made
    assert torch.equal(made["embedding"], expected["model.embed_tokens.weight"])


def test_random_weights_have_the_same_shapes_and_repeat() -> None:
    first, second = (random_parameters(CONFIG, torch.bfloat16, CPU) for _ in range(2))
    assert {name: tuple(t.shape) for name, t in first.items()} == parameter_shapes(CONFIG)
    assert equal(first, second)
    assert not equal(first, random_parameters(CONFIG, torch.bfloat16, CPU, seed=1))


# --- tensors at fault -------------------------------------------------------------------------------------------


def test_missing_unknown_and_doubled_tensors_are_all_listed(tmp_path: Path) -> None:
    tensors = hf_tensors()
    write_shards(tmp_path, tensors)
    first = tmp_path / "model-00001-of-00003.safetensors"
    third = tmp_path / "model-00003-of-00003.safetensors"
    names = sorted(tensors)
    missing, moved = names[0], names[1]
    part = {name: tensors[name] for name in names[0::3] if name != missing}
    save_file(part | {moved: tensors[moved], "model.layers.0.mlp.extra": torch.ones(2)}, first)
    problems = problems_of(tmp_path)
    assert problems == [
        f"model.layers.0.mlp.extra: unknown tensor in {first.name}",
        f"{moved}: in {first.name} and again in model-00002-of-00003.safetensors",
        f"{missing}: missing",
    ]
    assert third.name not in str(problems)


def test_a_layer_too_many_and_a_layer_too_few(tmp_path: Path) -> None:
    save_file(hf_tensors(), tmp_path / "model.safetensors")
    too_many = problems_of(tmp_path, replace(CONFIG, n_layers=1))
    assert len(too_many) == 9
    assert all("unknown tensor in model.safetensors" in p and "layers.1." in p for p in too_many)
    too_few = problems_of(tmp_path, replace(CONFIG, n_layers=4))
    assert len(too_few) == 18
    assert all(p.endswith(": missing") for p in too_few)


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    save_file(hf_tensors(replace(CONFIG, tie_embeddings=True)), tmp_path / "model.safetensors")
    assert problems_of(tmp_path) == ["lm_head.weight: missing"]


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.k_proj.weight", (24, 24)),
        ("model.layers.1.mlp.down_proj.weight", (20, 24)),
        ("model.embed_tokens.weight", (38, 24)),
        ("model.norm.weight", (24, 1)),
    ],
)
def test_a_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    save_file(hf_tensors() | {name: torch.ones(shape)}, tmp_path / "model.safetensors")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{name}: shape {list(shape)} in model.safetensors, the config asks for [")


@pytest.mark.parametrize("dtype, name", [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_wrong_dtype(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensors = hf_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert problems_of(tmp_path) == [f"model.norm.weight: dtype {name} in model.safetensors, must be F32, BF16 or F16"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = hf_tensors()
    tensors["model.layers.1.self_attn.v_proj.weight"][11, 23] = value
    tensors["model.norm.weight"][0] = value
    files = write_shards(tmp_path, tensors)
    assert len(files) == 3
    problems = problems_of(tmp_path)
    assert sorted(p.split(":")[0] for p in problems) == [
        "model.layers.1.self_attn.v_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    assert all("not finite" in p for p in problems)


def test_weights_that_overflow_the_dtype_asked_for(tmp_path: Path) -> None:
    tensors = hf_tensors()
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds numbers that are not finite in float16"):
        load(tmp_path, dtype=torch.float16)


# --- files at fault ---------------------------------------------------------------------------------------------


def refused(folder: Path, culprit: Path, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(folder)
    assert caught.value.path == culprit
    assert str(culprit) in str(caught.value)


def test_a_missing_shard(tmp_path: Path) -> None:
    files = write_shards(tmp_path, hf_tensors())
    files[1].unlink()
    refused(tmp_path, files[1], "is missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_a_truncated_shard(tmp_path: Path, keep: int) -> None:
    files = write_shards(tmp_path, hf_tensors())
    files[2].write_bytes(files[2].read_bytes()[:keep])
    refused(tmp_path, files[2], "not a whole safetensors file")


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(header: str, data: bytes) -> bytes:
    encoded = header.encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    "fault",
    ["no json", "huge header", "overlap", "hole", "past the end", "negative", "unknown dtype", "twice", "trailing"],
)
def test_a_bad_header(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(hf_tensors(), path)
    header, data = header_of(path)
    name = "model.norm.weight"
    entry = header[name]
    start, end = entry["data_offsets"]
    if fault == "overlap":
        entry["data_offsets"] = [start - 4, end - 4]
    elif fault == "hole":
        del header[name]
    elif fault == "past the end":
        entry["data_offsets"] = [start, 2**62]
    elif fault == "negative":
        entry["shape"] = [-24]
    elif fault == "unknown dtype":
        entry["dtype"] = "PICKLE"
    text = json.dumps(header)
    if fault == "no json":
        text = "x" * len(text)
    elif fault == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(entry | {"data_offsets": [start, end - 4]})}' + "}"
    path.write_bytes(with_header(text, data + (b"\0" * 8 if fault == "trailing" else b"")))
    if fault == "huge header":
        path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    refused(tmp_path, path, "not a whole safetensors file")


def test_a_bad_header_is_told_in_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(hf_tensors(), path)
    whole = path.read_bytes()
    header, data = header_of(path)
    path.write_bytes(whole[:-8])
    refused(tmp_path, path, f"its tensors need {len(whole)} bytes, the file has {len(whole) - 8}")
    header["model.norm.weight"]["shape"] = [25]
    path.write_bytes(with_header(json.dumps(header), data))
    with pytest.raises(LoadError, match=r"shape \[25\] of F32 does not fill bytes \d+ to \d+") as caught:
        load(tmp_path)
    assert caught.value.tensor == "model.norm.weight"


@pytest.mark.parametrize("dtype, shape", [("F4", [8]), ("F8_E4M3FNUZ", [4]), ("F32", [1] * 9)])
def test_formats_that_the_package_knows_and_this_engine_does_not(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        with_header(json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}), b"\0" * 4)
    )
    with pytest.raises(LoadError, match=f"{dtype}.* is unknown") as caught:
        read_safetensors(path)
    assert caught.value.tensor == "x"


def test_a_file_is_opened_without_reading_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a tebibyte, of which the disk holds the header."""
    path, numbers = tmp_path / "model.safetensors", 1 << 39
    entry = {"dtype": "BF16", "shape": [numbers // 256, 256], "data_offsets": [0, 2 * numbers]}
    header = with_header(json.dumps({"x": entry}), b"")
    path.write_bytes(header)
    os.truncate(path, len(header) + 2 * numbers)
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: read.append(preadv(fd, out, at)) or read[-1])
    tensor = read_safetensors(path)["x"]
    assert (tensor.nbytes, tensor.shape, tensor.dtype) == (2 * numbers, (numbers // 256, 256), "BF16")
    assert sum(read) <= 8 + len(header)


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors", "", "x\\..\\y"])
def test_an_index_that_points_out_of_the_folder(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(hf_tensors(), tmp_path / "evil.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(LoadError, match=r"inside the folder|is missing") as caught:
        load(folder)
    assert caught.value.path.parent == folder


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    assert caught.value.path == tmp_path / INDEX


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, tmp_path, "convert them to safetensors")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, "no safetensors file")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, hf_tensors())
    (tmp_path / INDEX).unlink()
    refused(tmp_path, tmp_path, "3 safetensors files but no model.safetensors.index.json")


def test_a_file_may_change_once_it_is_loaded(tmp_path: Path) -> None:
    """Weights are copied out of the map; cutting the file later is no bus error."""
    path = tmp_path / "model.safetensors"
    save_file(hf_tensors(), path)
    made = load(tmp_path)
    path.write_bytes(b"")
    assert torch.equal(made["norm"], hf_tensors()["model.norm.weight"])


# --- through the engine -----------------------------------------------------------------------------------------


def model_folder(folder: Path, config: ModelConfig = CONFIG) -> Path:
    folder.mkdir()
    write_config(folder, config)
    save_file(hf_tensors(config), folder / "model.safetensors")
    return folder


def engine_of(folder: Path) -> Engine:
    return Engine(folder, EngineConfig(kv_memory=1 << 20, block_size=16), progress=False)


def test_an_engine_without_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    with engine_of(model_folder(tmp_path / "model")) as engine:
        done = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0]
        assert (len(done.token_ids), done.text) == (4, "")
        with pytest.raises(Exception, match="no tokenizer") as caught:
            engine.generate(["text"])
        assert caught.value.field == "prompt"  # type: ignore[attr-defined]


def test_sharded_answers_as_unsharded(tmp_path: Path) -> None:
    whole = model_folder(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_config(sharded)
    write_shards(sharded, hf_tensors())
    answers = []
    for folder in (whole, sharded):
        with engine_of(folder) as engine:
            params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, logprobs=5)
            answers.append(engine.generate([[1, 2, 3]], params))
    assert answers[0] == answers[1]


def test_a_vocabulary_that_does_not_match(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    folder = model_folder(tmp_path / "model")
    shutil.copy(tiny_tokenizer_file, folder / "tokenizer.model")
    with pytest.raises(TokenizerError, match="has 400 pieces, the model's vocabulary 37") as caught:
        engine_of(folder)
    assert caught.value.path == folder / "tokenizer.model"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 100])
def test_a_tokenizer_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        engine_of(folder)
    assert caught.value.path == folder / "tokenizer.model"


def test_a_matching_vocabulary_serves_text(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    folder = model_folder(tmp_path / "model", replace(CONFIG, vocab_size=400))
    shutil.copy(tiny_tokenizer_file, folder / "tokenizer.model")
    with engine_of(folder) as engine:
        done = engine.generate(["Once upon"], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0]
        assert engine.tokenizer is not None
        assert done.prompt_ids == engine.tokenizer.encode_prompt("Once upon")


def test_a_checkpoint_error_leaves_no_thread_behind(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        engine_of(folder)
    assert "llama-engine" not in {thread.name for thread in threading.enumerate()}


def test_unsupported_architecture(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="only LlamaForCausalLM"):
        engine_of(folder)


@pytest.mark.parametrize("model", ["no/such/folder", "demoo"])
def test_a_folder_that_is_not_there(model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(model)
    assert (caught.value.field, caught.value.value) == ("model", model)


def test_the_loaders_table_covers_every_row_once() -> None:
    for config in (CONFIG, replace(CONFIG, tie_embeddings=True), ModelConfig.named("70B")):
        shapes = parameter_shapes(config)
        rows: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
        for place in weight_names(config).values():
            if place.parameter in shapes:  # a tied model has no lm_head
                rows[place.parameter].append((place.start, place.start + place.rows))
        for name, spans in rows.items():
            spans.sort()
            assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), shapes[name][0]], name


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama361-hf"])
def test_shared_models_load(shared_file: Callable[[str], Path], name: str) -> None:
    folder = shared_file(f"models/{name}")
    config = ModelConfig.from_dir(folder)
    assert sum(t.numel() for t in load(folder, config).values()) == config.n_params
