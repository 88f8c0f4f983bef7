"""scripts/weights.py: round trips are exact, bad input gets a sentence and an exit code, plans are right."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import Engine, EngineConfig, ModelConfig, SamplingParams, Tokenizer
from llama.cache import plan_memory
from llama.checkpoint import load_parameters, read_config, tokenizer_file
from llama.config import from_meta
from llama.errors import EngineError
from llama.meta_format import to_interleaved
from llama.tensor_file import read_safetensors
from llama_slots.roofline import decode_rate, prefill_seconds
from llama_slots.weights import command as weights
from llama_slots.weights import load as weights_load
from llama_slots.weights import plan as weights_plan
from llama_slots.weights import target as weights_target
from llama_slots.weights.forms import HfWriter, meta_params
from llama_slots.weights.gguf_file import gguf_table

ROOT = Path(__file__).parents[2]

MHA = "dim=64,n_layers=2,n_heads=8,ffn_dim=176,vocab_size=400,max_seq_len=128"
GQA = "dim=128,n_layers=2,n_heads=16,n_kv_heads=8,ffn_dim=344,vocab_size=400,max_seq_len=128,rope_theta=20000"
# How long the fuzz runs: 1 is a few seconds; LLAMA_FUZZ=100 is the long form: 200,000 headers and JSON files, 2,000
# tokenizers, 400 directories.
ROUNDS = int(os.environ.get("LLAMA_FUZZ", "1"))


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    capsys.readouterr()
    code = weights.main([str(arg) for arg in args])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def report(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code, text = run(capsys, *args, "--json")
    found = json.loads(text)
    assert code == found.get("exit_code", 0), text
    return found


def quiet(*args: object) -> None:
    assert weights.main([str(arg) for arg in args]) == 0


def tensors_of(folder: Path) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        made |= load_file(path)
    return made


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def same(a: Path, b: Path) -> bool:
    """Two Hugging Face folders hold the same names, dtypes and bits."""
    first, second = tensors_of(a), tensors_of(b)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
        for name in first
    )


def answers(folder: Path) -> Any:
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=5, prompt_logprobs=5)
    with Engine(folder, EngineConfig(block_size=16), progress=False) as engine:
        return engine.generate([[1, 5, 9, 300, 17, 2, 60]], params)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    quiet("random", GQA, tmp_path / "hf", "--dtype", "float32")
    return tmp_path / "hf"


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [MHA, GQA], ids=["MHA", "GQA"])
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_hugging_face_to_meta_and_back(tmp_path: Path, shape: str, shards: int, dtype: str) -> None:
    first, meta, back = (tmp_path / name for name in ("first", "meta", "back"))
    quiet("random", shape, first, "--dtype", dtype, "--shards", shards)
    quiet("convert", first, meta, "--to", "meta", "--shards", shards)
    quiet("convert", meta, back, "--shards", shards)
    assert same(first, back)
    assert len(list(first.glob("*.safetensors"))) == len(list(meta.glob("*.pth"))) == shards
    assert read_config(first) == read_config(meta) == read_config(back)
    assert answers(first) == answers(meta) == answers(back)


def test_meta_to_meta_with_other_parts(tmp_path: Path) -> None:
    quiet("random", GQA, tmp_path / "8", "--to", "meta", "--shards", 8)
    quiet("convert", tmp_path / "8", tmp_path / "2", "--to", "meta", "--shards", 2)
    quiet("convert", tmp_path / "2", tmp_path / "8again", "--to", "meta", "--shards", 8)
    for i in range(8):
        one, two = (torch.load(tmp_path / f / f"consolidated.0{i}.pth", weights_only=True) for f in ("8", "8again"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_wider_dtype_and_back_is_exact(tmp_path: Path) -> None:
    quiet("random", GQA, tmp_path / "first", "--dtype", "bfloat16")
    quiet("convert", tmp_path / "first", tmp_path / "wide", "--dtype", "float32")
    quiet("convert", tmp_path / "wide", tmp_path / "back", "--dtype", "bfloat16")
    assert read_config(tmp_path / "wide").dtype == "float32"
    assert same(tmp_path / "first", tmp_path / "back")


def test_a_narrower_dtype_rounds_as_torch_does(hf: Path, tmp_path: Path) -> None:
    quiet("convert", hf, tmp_path / "half", "--dtype", "float16")
    made = tensors_of(tmp_path / "half")
    assert all(torch.equal(made[name], tensor.half()) for name, tensor in tensors_of(hf).items())


def test_tied_embeddings_become_a_matrix_of_their_own_in_meta_form(tmp_path: Path) -> None:
    quiet("random", GQA + ",tie_embeddings=1", tmp_path / "hf", "--dtype", "float32")
    quiet("convert", tmp_path / "hf", tmp_path / "meta", "--to", "meta", "--shards", 2)
    assert answers(tmp_path / "hf") == answers(tmp_path / "meta")


def test_a_pth_that_was_written_is_a_zip_that_was_not_damaged(hf: Path, tmp_path: Path) -> None:
    quiet("convert", hf, tmp_path / "meta", "--to", "meta", "--shards", 2)
    for path in (tmp_path / "meta").glob("*.pth"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert torch.load(path, weights_only=True).keys() == torch.load(path, weights_only=True, mmap=True).keys()


def test_the_librarys_reader_takes_what_was_written(hf: Path, tmp_path: Path) -> None:
    quiet("convert", hf, tmp_path / "out", "--shards", 3)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(hf).values())


def test_a_hugging_face_folder_keeps_its_own_descriptions(hf: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    raw = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**raw, "initializer_range": 0.5}))
    (hf / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    shutil.copy(tiny_tokenizer_file, hf)
    quiet("convert", hf, tmp_path / "out", "--dtype", "bfloat16")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made == {**raw, "initializer_range": 0.5, "torch_dtype": "bfloat16"}
    assert read_config(tmp_path / "out").eos_ids == (1, 2)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tiny_tokenizer_file.read_bytes()


def test_params_json_for_the_named_models() -> None:
    for name, wanted in {
        "7B": {"multiple_of": 256},
        "13B": {"multiple_of": 256},
        "70B": {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    }.items():
        config = ModelConfig.named(name)
        params = meta_params(config)
        assert from_meta(params) == config
        assert {key: params[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in params} == wanted


@pytest.mark.parametrize("ffn_dim", [8, 100, 344, 341, 342, 1000, 4097])
def test_params_json_for_any_width(ffn_dim: int) -> None:
    config = ModelConfig(128, 2, 4, 2, 32, ffn_dim, 400)
    assert from_meta(meta_params(config)) == config


@pytest.mark.parametrize(
    "field, shape", [("head_dim", "head_dim=16"), ("rope_scale", "rope_scale=2"), ("bos_id", "bos_id=3")]
)
def test_what_params_json_cannot_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str, shape: str
) -> None:
    quiet("random", f"{MHA},{shape}", tmp_path / "hf")
    code, text = run(capsys, "convert", tmp_path / "hf", tmp_path / "meta", "--to", "meta")
    assert code == 1 and field in text and "keep Hugging Face's form" in text
    assert not (tmp_path / "meta").exists()


# --- GGUF -------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path, folder: Path, quant: gguf.GGMLQuantizationType | None = None, tokenizer: Path | None = None
) -> None:
    """A Hugging Face folder as a GGUF, as the writers of that format do it.

    Rows of q and k interleaved, vectors in fp32, matrices that the blocks do not divide in fp16.
    """
    config, tensors = read_config(folder), tensors_of(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_context_length(config.max_seq_len)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for hf_name, name in gguf_table(config).items():
        tensor = tensors[hf_name]
        if hf_name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_interleaved(tensor, config.head_dim)
        kind = kind_of(tensor, quant)
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kind_of(tensor: Tensor, quant: gguf.GGMLQuantizationType | None) -> gguf.GGMLQuantizationType:
    if quant is None or tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    return quant if tensor.shape[1] % gguf.GGML_QUANT_SIZES[quant][0] == 0 else gguf.GGMLQuantizationType.F16


def add_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    processor = Tokenizer(path)._processor
    ids = range(processor.vocab_size())

    def kind(i: int) -> int:
        kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6))
        return next((number for test, number in kinds if test(i)), 1)

    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama361-hf"])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_shared_models_through_gguf_and_back(
    tmp_path: Path, shared_file: Callable[[str], Path], name: str, quant: str
) -> None:
    folder = shared_file(f"models/{name}")
    write_gguf(tmp_path / "model.gguf", folder, gguf.GGMLQuantizationType[quant])
    shutil.copy(folder / "tokenizer.model", tmp_path)
    quiet("convert", tmp_path / "model.gguf", tmp_path / "back")
    found, expected = tensors_of(tmp_path / "back"), tensors_of(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        kind = kind_of(tensor, gguf.GGMLQuantizationType[quant])
        if kind.name == "F32":
            assert torch.equal(found[key], tensor), key
        elif kind.name in ("F16", "BF16"):
            assert torch.equal(found[key], tensor.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind.name])), key
        else:  # the package's own numbers; rows of q and k were turned before, and every row stands alone
            data = gguf.quants.quantize(tensor.numpy(), kind)
            assert np.array_equal(found[key].numpy(), gguf.quants.dequantize(data, kind)), key
    mine, theirs = read_config(tmp_path / "back"), read_config(folder)
    assert replace(mine, eos_ids=theirs.eos_ids, dtype=theirs.dtype) == theirs
    if quant == "F32":
        (tmp_path / "back" / "generation_config.json").unlink()
        assert answers(tmp_path / "back") == answers(folder)


def test_quantized_gguf_of_every_block_format_that_real_files_have(tmp_path: Path, hf: Path) -> None:
    quiet("random", "dim=128,n_layers=1,n_heads=4,n_kv_heads=2,ffn_dim=256,vocab_size=400", tmp_path / "small")
    for quant in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        kind = gguf.GGMLQuantizationType[quant]
        write_gguf(tmp_path / f"{quant}.gguf", tmp_path / "small", kind)
        quiet("convert", tmp_path / f"{quant}.gguf", tmp_path / quant, "--dtype", "bfloat16")
        weight = tensors_of(tmp_path / quant)["model.layers.0.mlp.down_proj.weight"].float()
        true = tensors_of(tmp_path / "small")["model.layers.0.mlp.down_proj.weight"].float()
        assert (weight - true).abs().max() < 0.012


def test_the_tokenizer_inside_a_gguf_becomes_a_tokenizer_model(
    tmp_path: Path, hf: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_gguf(tmp_path / "model.gguf", hf, tokenizer=tiny_tokenizer.path)
    quiet("convert", tmp_path / "model.gguf", tmp_path / "back")
    made = Tokenizer(tmp_path / "back" / "tokenizer.model")
    assert made.vocabulary == tiny_tokenizer.vocabulary
    for text in ("Once upon a time", "  two  spaces ", "Der Motor schläft.\n\t日本 123", "", "</s> <unk>"):
        assert made.encode(text) == tiny_tokenizer.encode(text)
        assert made.decode(made.encode(text)) == tiny_tokenizer.decode(tiny_tokenizer.encode(text))


def test_llama_2s_own_tokenizer_through_gguf(tmp_path: Path, llama2_tokenizer: Tokenizer) -> None:
    quiet("random", "dim=32,n_layers=1,n_heads=2,ffn_dim=32,vocab_size=32000", tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", tokenizer=llama2_tokenizer.path)
    quiet("convert", tmp_path / "model.gguf", tmp_path / "back")
    made = Tokenizer(tmp_path / "back" / "tokenizer.model")
    assert made.vocabulary == llama2_tokenizer.vocabulary
    text = (ROOT / "README.md").read_text()
    assert made.encode(text) == llama2_tokenizer.encode(text)


def test_gguf_at_fault(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, hf)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    assert run(capsys, "convert", path, tmp_path / "out")[0] == 1
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    code, text = run(capsys, "inspect", path)
    assert code == 1 and "perhaps half a download" in text
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    code, text = run(capsys, "convert", path, tmp_path / "out")
    assert code == 1 and "blk.1.ffn_up.weight: missing" in text and "blk.1.ffn_xx.weight: unknown" in text
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code, text = run(capsys, "inspect", path)
    assert code == 1 and "architecture 'gpt2'" in text
    assert not (tmp_path / "out").exists()


# --- inspect, verify, plan, random, load ------------------------------------------------------------------------


def test_inspect(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    found = report(capsys, "inspect", hf)
    assert found["parameters"] == read_config(hf).n_params == found["bytes"] // 4
    assert found["files"][0]["sha256"] == digests(hf)["model.safetensors"]
    assert (found["form"], found["named"], found["problems"]) == ("Hugging Face", None, [])
    assert found["dtypes"] == {"F32": found["bytes"]}
    assert found["tensors"]["model.norm.weight"] == {"shape": [128], "dtype": "F32"}
    code, text = run(capsys, "inspect", "demo")
    assert code == 0 and "a tokenizer" in text


def test_inspect_names_metas_models() -> None:
    config = replace(ModelConfig.named("13B"), dtype="float16", norm_eps=1e-6)
    assert weights.named_model(config) == "13B"
    assert weights.named_model(replace(config, n_layers=39)) is None


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_verify_a_good_one(
    capsys: pytest.CaptureFixture[str], hf: Path, tmp_path: Path, form: str, tiny_tokenizer_file: Path
) -> None:
    quiet("convert", hf, tmp_path / "out", "--to", form, "--tokenizer", tiny_tokenizer_file)
    if form == "meta":
        md5 = hashlib.md5((tmp_path / "out" / "consolidated.00.pth").read_bytes()).hexdigest()
        (tmp_path / "out" / "checklist.chk").write_text(f"{md5}  consolidated.00.pth\n")
    found = report(capsys, "verify", tmp_path / "out")
    assert found["good"]
    assert {name: check["passed"] for name, check in found["checks"].items()} == {
        **dict.fromkeys(("coverage", "numbers", "tokenizer", "forward"), True),
        **({"checklist": True} if form == "meta" else {}),
    }


def test_verify_finds_faults(capsys: pytest.CaptureFixture[str], hf: Path, tiny_tokenizer_file: Path) -> None:
    tensors = tensors_of(hf)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors")
    (hf / "tokenizer.model").write_bytes(tiny_tokenizer_file.read_bytes()[:-500])
    code, text = run(capsys, "verify", hf)
    assert code == 1
    assert "model.norm.weight: missing" in text
    assert "infinite or NaN in model.layers.1.mlp.up_proj.weight" in text
    assert text.count("FAULT") == 3
    assert "forward: not run, because of the faults above" in text


def test_verify_metas_checklist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quiet("random", MHA, tmp_path / "meta", "--to", "meta")
    (tmp_path / "meta" / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n{'0' * 32}  params.txt\n")
    code, text = run(capsys, "verify", tmp_path / "meta")
    assert code == 1 and "consolidated.00.pth differs; params.txt is missing; download these again" in text


def test_plan_gives_the_rooflines_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens per second of one H200, computed apart from this code: model, format -> context 512 at 1, 8, 32, 64."""
    table = {
        ("7B", "bf16"): (319, 2239, 6311, 9054),
        ("7B", "fp8"): (626, 4403, 12471, 17953),
        ("7B", "int8"): (626, 4403, 12471, 17953),
        ("7B", "int4"): (1151, 7357, 17425, 20859),
        ("13B", "bf16"): (165, 1184, 3517, 5237),
        ("13B", "fp8"): (325, 2341, 6975, 10409),
        ("70B", "bf16"): (31.3, 248, 964, 1857),
        ("70B", "fp8"): (62.3, 494, 1920, 3702),
        ("70B", "int4"): (120, 943, 3573, 5169),
    }
    card = weights_plan.CARDS["H200"]
    for (name, kept), rates in table.items():
        for batch, rate in zip((1, 8, 32, 64), rates, strict=True):
            found = decode_rate(ModelConfig.named(name), card, weights_plan.FORMATS[kept], batch, 512)
            assert found == pytest.approx(rate, rel=0.005), (name, kept, batch)
    seconds = prefill_seconds(ModelConfig.named("70B"), card, weights_plan.FORMATS["fp8"], 2048)
    assert seconds == pytest.approx(0.187, rel=0.01)


def test_plan_of_70b_on_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "plan", "70B")
    assert found["parameters"] == 68_976_648_192 and found["card"] == "H200" and found["slots"] == 30
    plans = {plan["format"]: plan for plan in found["plans"]}
    assert list(plans) == ["bf16", "fp8", "int8", "int4"]
    assert [round(plan["weights"] / 1e9, 1) for plan in plans.values()] == [138.0, 69.5, 69.5, 36.3]
    assert plans["bf16"]["kv_per_token"] == 327_680
    assert 3 <= plans["bf16"]["slots_that_fit"] < 10 < 30 < plans["fp8"]["slots_that_fit"]
    assert plans["int4"]["tokens_per_second_all"] > plans["fp8"]["tokens_per_second_all"]
    code, text = run(capsys, "plan", "70B")
    assert code == 0 and all(name in text for name in ("bf16", "fp8", "int8", "int4", "137.95 GB", "139 GiB"))
    flat = " ".join(text.split())
    assert found["assumptions"] and all(assumed in flat for assumed in found["assumptions"])


def test_plan_divides_memory_as_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.named("13B")
    card = weights_plan.CARDS["H200"]
    monkeypatch.setattr("llama.cache.available_memory", lambda device: int(card.memory - 1e9))
    engines = plan_memory(model, EngineConfig(), 4096, torch.bfloat16, torch.device("cuda"))
    found = weights_plan.plan_one(model, card, "bf16", 30, 4096)
    assert (found.activations, found.weights) == (engines.activations, engines.weights)
    assert found.kv_tokens == engines.kv_tokens


def test_plan_refuses(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    for args, part in (
        (("70B", "--card", "TPU"), "card='TPU': must be one of H200"),
        (("70B", "--context", 5000), "context=5000: must be 1 to 4096"),
        (("70B", "--slots", 0), "slots=0"),
        (("6B",), "is none of 7B, 13B, 70B"),
        (("dim=64,n_layers=x",), "must be name=number"),
        (("dim=64,n_layers=2",), "left out: n_heads, ffn_dim, vocab_size"),
        (("dim=64,n_layers=2,n_heads=3,wings=2,ffn_dim=2,vocab_size=9",), "has no wings; it may have"),
    ):
        code, text = run(capsys, "plan", *args)
        assert code == 2 and part in text, text
    text = run(capsys, "plan", "70B", "--card", "RTX-4090")[1]
    assert text.count("does not fit") == 4 and "Nothing fits: without any KV cache it takes 37.0 GB" in text
    assert "does not multiply it" in run(capsys, "plan", "7B", "--card", "A100-80GB")[1]
    assert run(capsys, "plan", hf)[0] == 0


def test_random_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quiet("random", GQA, tmp_path / name, "--seed", seed)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    weight = tensors_of(tmp_path / "a")["lm_head.weight"].float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 0.001
    assert read_config(tmp_path / "a").rope_theta == 20000


@pytest.mark.slow
def test_load_measures(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    found = report(capsys, "load", hf, "--rounds", 2)
    assert found["bytes"] == (hf / "model.safetensors").stat().st_size
    assert found["share_of_copy"] > 0 and len(found["rounds"]) == 2
    assert found["most_disk_bytes_in_a_turn"] < found["bytes"]  # it was written a moment ago


def test_load_says_when_the_disk_was_measured(
    capsys: pytest.CaptureFixture[str], hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = itertools.count(0, 3 * 10**9)
    monkeypatch.setattr(weights_load, "_io", lambda name: next(reads))
    code, text = run(capsys, "load", hf, "--rounds", 1)
    assert code == 0 and "3.00 GB of one turn came from disk: the page cache and the weights do not both fit" in text


def test_load_refuses(capsys: pytest.CaptureFixture[str], hf: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", hf)
    refused(capsys, 1, "is GGUF, which the engine does not load; convert it first", "load", tmp_path / "model.gguf")
    refused(capsys, 1, "device='cuda:77': this machine has", "load", hf, "--device", "cuda:77")
    refused(capsys, 1, "device='tpu': must be 'auto'", "load", hf, "--device", "tpu")
    refused(capsys, 1, "rounds=0: must be at least 1", "load", hf, "--rounds", 0)


def cached(path: Path) -> bool:
    """Whether the first bytes of a file are in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_what_was_read_leaves_the_page_cache_where_memory_is_short(
    capsys: pytest.CaptureFixture[str], hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are read from first to last; a file whose end was read is no longer held when the next one is."""
    files = [tmp_path / "first", tmp_path / "second"]
    for path in files:
        with path.open("wb") as file:
            file.write(bytes(4 << 20))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(files[0]):
        pytest.skip("needs a file system on a disk; this one keeps its pages")
    monkeypatch.setattr(weights_load, "_DISTANCE", 1 << 20)
    with weights_load._dropping_behind(files):
        for path in files:
            path.read_bytes()
            assert cached(path)
        until = time.monotonic() + 20
        while cached(files[0]) and time.monotonic() < until:
            time.sleep(0.01)
        assert not cached(files[0])
    monkeypatch.setattr(weights_load, "available_memory", lambda device: 0)
    assert report(capsys, "load", hf, "--rounds", 1)["share_of_copy"] > 0


# --- bad input: a sentence with the next step, an exit code, the source untouched ---------------------------------


def refused(capsys: pytest.CaptureFixture[str], code: int, part: str, *args: object) -> None:
    found, text = run(capsys, *args)
    assert found == code, text
    assert part in text


def test_a_wrong_place(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    out = tmp_path / "out"
    refused(capsys, 2, "is not a folder, nor the name 'demo'", "convert", tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    refused(capsys, 1, "name the folder that has it", "inspect", tmp_path / "empty")
    refused(capsys, 1, "is a file; name the folder", "inspect", hf / "config.json")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused(capsys, 1, "is a LoRA adapter, not a model; merge it", "convert", tmp_path / "lora", out)
    (tmp_path / "lora" / "adapter_config.json").rename(tmp_path / "lora" / "x.gguf")
    refused(capsys, 1, "scripts/weights.py convert FILE.gguf OUT", "convert", tmp_path / "lora", out)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "architectures": ["MistralForCausalLM"]}))
    refused(capsys, 1, "only LlamaForCausalLM is supported", "convert", hf, out)
    assert not out.exists()


def test_half_a_download(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    out = tmp_path / "out"
    quiet("convert", hf, tmp_path / "three", "--shards", 3)
    second = tmp_path / "three" / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-9])
    refused(capsys, 1, "is not a whole safetensors file", "convert", tmp_path / "three", out)
    second.unlink()
    refused(capsys, 1, "is this half a download?", "convert", tmp_path / "three", out)
    (tmp_path / "three" / "model.safetensors.index.json").unlink()
    refused(capsys, 1, "2 safetensors files but no model.safetensors.index.json", "verify", tmp_path / "three")
    quiet("convert", hf, tmp_path / "meta", "--to", "meta", "--shards", 2)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    refused(capsys, 1, "has 1 of 2 parts; download the others", "convert", tmp_path / "meta", out)
    assert not out.exists()


def test_mixed_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    quiet("convert", hf, tmp_path / "three", "--shards", 3)
    for i, source in ((1, 2), (2, 1)):
        name = f"model-0000{i}-of-00003.safetensors"
        if i == 1:
            shutil.copy(tmp_path / "three" / f"model-0000{source}-of-00003.safetensors", tmp_path / "three" / name)
    refused(capsys, 1, "and again in model-00002-of-00003", "convert", tmp_path / "three", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_overflow_the_dtype(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    tensors = tensors_of(hf)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, hf / "model.safetensors")
    refused(capsys, 1, "not finite in F16", "convert", hf, tmp_path / "out", "--dtype", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_the_number_of_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    out = tmp_path / "out"
    refused(capsys, 1, "must be 1 to 99 and divide n_heads=16", "convert", hf, out, "--to", "meta", "--shards", 64)
    refused(capsys, 1, "must be 1 to 21, the number of tensors", "convert", hf, out, "--shards", 22)
    refused(capsys, 1, "must be 1 to 21", "convert", hf, out, "--shards", 0)
    quiet("convert", hf, out, "--shards", 21)
    assert same(hf, out)


def test_a_target_that_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    refused(capsys, 3, "is already there; name another folder, or add --force", "convert", hf, out)
    refused(capsys, 3, "holds no checkpoint, so --force does not replace it", "convert", hf, out, "--force")
    assert (out / "diary.txt").read_text() == "dear diary"
    (out / "diary.txt").unlink()
    quiet("convert", hf, out)
    refused(capsys, 3, "add --force", "convert", hf, out, "--to", "meta")
    quiet("convert", hf, out, "--to", "meta", "--force")
    assert sorted(path.name for path in out.iterdir()) == [
        "consolidated.00.pth",
        "generation_config.json",
        "params.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_the_source_is_never_a_target(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    before = digests(hf)
    (tmp_path / "link").symlink_to(hf)
    for target in (hf, hf / "inside", tmp_path, tmp_path / "link", hf / ".." / "hf"):
        refused(capsys, 3, "name another", "convert", hf, target, "--force")
    assert digests(hf) == before


def test_targets_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, 3, "is not a folder", "convert", hf, tmp_path / "file")
    refused(capsys, 3, "cannot be written", "convert", hf, tmp_path / "file" / "below")
    refused(capsys, 3, "cannot be written", "convert", hf, "/proc/checkpoint")


def test_a_full_disk_is_seen_before_a_byte_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    refused(capsys, 3, "are needed; free some space", "convert", hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_disk_that_fills_up_meanwhile(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    written = [0]
    real = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        written[0] += len(data)
        if written[0] > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    quiet("convert", hf, tmp_path / "out")
    before = digests(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(
        capsys, 3, "No space left on device; free some space", "convert", hf, tmp_path / "out", "--to", form, "--force"
    )
    assert digests(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_limit_on_the_size_of_files(tmp_path: Path, hf: Path, form: str) -> None:
    """The system itself says no, in the middle of torch's own writing as well."""
    code = (
        "import resource, sys\nfrom llama_slots.weights import command as weights\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        f"sys.exit(weights.main(['convert', 'hf', 'out', '--to', '{form}']))\n"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert "free some space or name another folder. Nothing was left behind" in done.stderr
    assert "enforce fail" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_interrupt_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (signal.SIGINT, signal.SIGTERM):

        def put(self: object, tensor: str, first: int, rows: Tensor, name: int = name) -> None:
            if "layers.1" in tensor:
                signal.raise_signal(name)

        with monkeypatch.context() as patch:
            patch.setattr(HfWriter, "put", put)
            refused(capsys, 130, "interrupted; nothing was left behind", "convert", hf, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.slow
@pytest.mark.parametrize("form, moments", [("hf", (70, 999)), ("meta", (70,))])
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path, form: str, moments: tuple[int, ...]) -> None:
    """SIGKILL before the 71st write, or between the last one and the rename; the next run cleans up behind it."""
    quiet("random", "dim=256,n_layers=8,n_heads=8,ffn_dim=1024,vocab_size=8000", tmp_path / "hf", "--dtype", "float32")
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom llama_slots.weights import command as weights, target\n"
        "left = int(sys.argv[1]); real = os.pwrite\n"
        "def pwrite(*args):\n    global left\n    left -= 1\n    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "os.pwrite = pwrite\n"
        "def killed(folder): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if left > 900: target._sync = killed\n"
        f"sys.exit(weights.main(['convert', 'hf', 'out', '--to', '{form}']))\n"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    for left in moments:
        done = subprocess.run(
            [sys.executable, "-c", code, str(left)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=60
        )
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        hidden = tmp_path / ".out.partial"
        assert hidden.is_dir()
        if left < 900:
            with pytest.raises(EngineError):
                Engine(hidden)
    quiet("convert", tmp_path / "hf", tmp_path / "out", "--to", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_two_runs_do_not_write_the_same_target(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    with weights_target.replacing(hf, tmp_path / "out", False, 1):
        refused(capsys, 3, "another run is writing it", "convert", hf, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_a_run_that_is_about_to_finish_is_not_disturbed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path
) -> None:
    """A second run while the first one syncs its files is told whose process it waits for."""
    code = (
        "import sys\nfrom llama_slots.weights import command, target\n"
        "sync = target._sync\n"
        "def slow(folder):\n    print('syncing', flush=True)\n    sys.stdin.readline()\n    sync(folder)\n"
        "target._sync = slow\n"
        "sys.exit(command.main(['convert', 'hf', 'out', '--force']))\n"
    )
    quiet("random", MHA, tmp_path / "other")
    quiet("convert", tmp_path / "other", tmp_path / "out")
    with python(code, tmp_path) as first:
        assert first.stdout is not None and first.stdout.readline() == "syncing\n"
        who = f"another run is writing it, process {first.pid}; wait for it"
        refused(capsys, 3, who, "convert", tmp_path / "other", tmp_path / "out", "--force")
        assert same(tmp_path / "out", tmp_path / "other"), "the old target stays until the new one is whole"
        first.communicate("\n", timeout=60)
    assert first.returncode == 0
    assert same(tmp_path / "out", hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "out"]


# Writes a target of two files with equal contents again and again, each time with other ones.
WRITER = """
import os, random, sys, time
from pathlib import Path
from llama_slots.weights.target import WriteError, replacing
written = 0
end = time.monotonic() + 30
while written < int(sys.argv[1]) and time.monotonic() < end:
    text = str(random.random())
    try:
        with replacing(Path("source"), Path("out"), True, 1) as folder:
            for name in ("config.json", "weights"):
                (folder / name).write_text(text)
                time.sleep(random.random() / 1000)
        written += 1
    except WriteError as error:
        assert "another run is writing it" in str(error), error
        time.sleep(random.random() / 500)
"""


def python(code: str, folder: Path, *args: object) -> subprocess.Popen[str]:
    """A process that runs code in a folder, with the project on its path and pipes to it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "scripts")))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def whole(out: Path) -> bool:
    return (out / "config.json").read_text() == (out / "weights").read_text()


def test_many_runs_to_one_target(tmp_path: Path) -> None:
    """Whoever is refused tries again. The target is never gone and never mixed of two runs."""
    with weights_target.replacing(tmp_path / "source", tmp_path / "out", False, 1) as folder:
        for name in ("config.json", "weights"):
            (folder / name).write_text("first")
    writers = [python(WRITER, tmp_path, 25) for _ in range(4)]
    while any(writer.poll() is None for writer in writers):
        assert (tmp_path / "out" / "config.json").exists(), "the target was gone for a moment"
    for writer in writers:
        assert (writer.communicate()[1], writer.returncode) == ("", 0)
    assert whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_that_are_killed_leave_a_whole_target(tmp_path: Path) -> None:
    """SIGKILL at random moments of one run, while another one goes on."""
    rng = random.Random(5)
    with weights_target.replacing(tmp_path / "source", tmp_path / "out", False, 1) as folder:
        for name in ("config.json", "weights"):
            (folder / name).write_text("first")
    with python(WRITER, tmp_path, 40) as steady:
        for _ in range(8 * ROUNDS):
            with python(WRITER, tmp_path, 1000) as killed:
                time.sleep(0.15 + rng.random() / 5)
                killed.kill()
        assert (steady.communicate()[1], steady.returncode) == ("", 0)
    assert whole(tmp_path / "out")
    with python(WRITER, tmp_path, 1) as last:
        assert last.communicate()[1] == ""
    assert whole(tmp_path / "out") and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_a_swap_of_folders_the_old_target_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems cannot swap. A run that dies between its two renames has the next one put the target back."""
    monkeypatch.setattr(weights_target, "_exchange", lambda first, second: False)
    source, out = tmp_path / "source", tmp_path / "out"

    def write(text: str) -> None:
        with weights_target.replacing(source, out, True, 1) as folder:
            (folder / "config.json").write_text(text)

    write("first")
    write("second")
    assert (out / "config.json").read_text() == "second"
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(weights_target.WriteError, match="add --force"), weights_target.replacing(source, out, False, 1):
        pass
    assert (out / "config.json").read_text() == "second" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", [".out.partial", ".out.lock", ".out.replaced"])
def test_links_are_not_followed(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, name: str) -> None:
    """What a planted link leads to is neither emptied nor written."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "diary.txt").write_text("dear diary")
    for behind in (tmp_path / "precious", tmp_path / "precious" / "diary.txt"):
        (tmp_path / name).symlink_to(behind)
        refused(capsys, 3, f"{name}: is a link, which is not followed; remove it", "convert", hf, tmp_path / "out")
        assert (tmp_path / name).is_symlink() and not (tmp_path / "out").exists()
        (tmp_path / name).unlink()
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["diary.txt"]
    assert (tmp_path / "precious" / "diary.txt").read_text() == "dear diary"


def test_links_in_what_a_killed_run_left_are_not_followed(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.partial").mkdir()
    for name, behind in ((".lock", "diary.txt"), ("model.safetensors", "diary.txt"), ("folder", "precious")):
        (tmp_path / ".out.partial" / name).symlink_to(tmp_path / behind)
    quiet("convert", hf, tmp_path / "out")
    assert (tmp_path / "diary.txt").read_text() == "dear diary" and same(tmp_path / "out", hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.txt", "hf", "out", "precious"]


def test_a_loop_of_links_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(capsys, 3, "is not a folder; name another one", "convert", hf, tmp_path / "loop")
    refused(capsys, 3, "Too many levels of symbolic links", "convert", hf, tmp_path / "loop" / "out")
    refused(capsys, 2, "is not a folder, nor the name 'demo'", "convert", tmp_path / "loop", tmp_path / "out")
    refused(capsys, 1, "cannot be read", "convert", hf, tmp_path / "out", "--tokenizer", tmp_path / "loop")


def test_json_errors_are_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text = run(capsys, "convert", tmp_path / "nowhere", tmp_path / "out", "--json")
    assert code == 2 and json.loads(text) == {"error": json.loads(text)["error"], "exit_code": 2}


@pytest.mark.slow
def test_every_command_leaves_the_source_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    before = digests(hf), [path.stat().st_mtime_ns for path in sorted(hf.iterdir())]
    for args in (("inspect", hf), ("verify", hf), ("load", hf), ("plan", hf), ("convert", hf, tmp_path / "out")):
        assert run(capsys, *args)[0] == 0
    assert (digests(hf), [path.stat().st_mtime_ns for path in sorted(hf.iterdir())]) == before


@pytest.mark.slow
def test_memory_is_bounded_by_a_chunk(tmp_path: Path) -> None:
    """Converting 270 MB takes hardly more memory than converting 1 MB."""
    quiet("random", MHA, tmp_path / "small")
    quiet("random", "dim=1024,n_layers=4,n_heads=8,ffn_dim=4096,vocab_size=8000", tmp_path / "large")
    code = (
        "import resource\nfrom llama_slots.weights import command as weights\n"
        "for name in ('small', 'large'):\n"
        "    assert weights.main(['convert', name, f'{name}-meta', '--to', 'meta', '--shards', '2']) == 0\n"
        "    assert weights.main(['convert', f'{name}-meta', f'{name}-hf', '--dtype', 'float32']) == 0\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    small, large = (int(line) * 1024 for line in done.stdout.splitlines() if line.isdigit())
    assert sum(path.stat().st_size for path in (tmp_path / "large-hf").iterdir()) > 250e6
    assert large - small < 40e6


# --- mutations: only typed errors -------------------------------------------------------------------------------


def typed(act: Callable[[], object]) -> bool:
    """True if it went well, False after one of the engine's errors; any other exception is the test's failure."""
    try:
        act()
    except EngineError:
        return False
    return True


def mutate(data: bytes, rng: random.Random, first: int, end: int) -> bytes:
    made = bytearray(data)
    bits = (
        b"0",
        b"-1",
        b"9" * 19,
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"\xff",
        b"1e400",
        b"null",
        b"true",
        b"\\ud800",
    )
    for _ in range(rng.choice((1, 1, 1, 2, 3, 10))):
        at = rng.randrange(first, max(first + 1, min(end, len(made))))
        kind = rng.randrange(6)
        if kind == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            made[at : at + 1] = str(rng.randrange(10)).encode()
        elif kind == 2:
            del made[at : at + rng.randrange(1, 12)]
        elif kind == 3:
            made[at:at] = rng.choice(bits)
        elif kind == 4:
            made[at : at + 1] = rng.choice(bits)
        else:
            other = rng.randrange(first, max(first + 1, min(end, len(made))))
            made[at:at] = made[other : other + rng.randrange(1, 40)]
    return bytes(made)


def test_mutated_safetensors_headers(tmp_path: Path) -> None:
    """A typed error or a good file; and whatever is taken here, the library takes as well."""
    rng = random.Random(11)
    path = tmp_path / "x.safetensors"
    save_file({"model.norm.weight": torch.ones(3), "b": torch.ones(2, 2).bfloat16(), "c": torch.zeros(4)}, path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    taken = 0
    for _ in range(1000 * ROUNDS):
        text = mutate(whole[8 : 8 + length], rng, 0, length)
        size = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) + 1, 2**40, 2**64 - 1))
        data = struct.pack("<Q", size) + text + whole[8 + length :]
        path.write_bytes(data if rng.random() < 0.9 else mutate(data, rng, 0, len(data)))
        if typed(lambda: read_safetensors(path)):
            taken += 1
            with safe_open(path, "pt") as opened:
                assert set(opened.keys()) == set(read_safetensors(path))
    assert taken < 1000 * ROUNDS


def test_mutated_json(tmp_path: Path, hf: Path) -> None:
    """config.json, generation_config.json, params.json and the index: bytes changed, and values of any type put in."""
    rng = random.Random(12)
    quiet("convert", hf, tmp_path / "two", "--shards", 2)
    quiet("convert", hf, tmp_path / "meta", "--to", "meta")
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**64,
        1e400,
        -0.5,
        1e-320,
        "",
        "x",
        "7",
        [],
        [1],
        [[]],
        {},
        {"type": "linear"},
    ]
    values += [{"rope_type": "linear", "factor": "2"}, {"factor": []}, [2, "x"], ["LlamaForCausalLM"], "\ud800", "../x"]
    files = [
        tmp_path / "two" / name for name in ("config.json", "generation_config.json", "model.safetensors.index.json")
    ]
    for path in [*files, tmp_path / "meta" / "params.json"]:
        whole = path.read_bytes()
        raw = json.loads(whole)
        for _ in range(250 * ROUNDS):
            if rng.random() < 0.5:
                path.write_bytes(mutate(whole, rng, 0, len(whole)))
            else:
                changed = dict(raw)
                for key in rng.sample(
                    [*raw, "rope_scaling", "rope_parameters", "head_dim", "dtype", "new"], rng.choice((1, 2))
                ):
                    changed[key] = rng.choice(values)
                path.write_text(json.dumps(changed))
            typed(lambda path=path: weights.open_source(str(path.parent)))  # type: ignore[misc]
        path.write_bytes(whole)
    assert typed(lambda: weights.open_source(str(tmp_path / "two")))


TOKENIZERS = """
import random, resource, sys
from llama.errors import EngineError
from llama.tokenizer import Tokenizer
path, n = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
whole = open(path, "rb").read()
rng = random.Random(13)
good = 0
for i in range(n):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 50))):
        # Anywhere, or near the end, where the settings are.
        at = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(max(0, len(data) - 400), len(data))
        kind = rng.randrange(5)
        if kind == 0: data[at] = rng.randrange(256)
        elif kind == 1: del data[at:at + rng.randrange(1, 20)]
        elif kind == 2: data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3: data[at] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.05: del data[at:]
        data = data or bytearray(1)
    open(path, "wb").write(data)
    try:
        tokenizer = Tokenizer(path)
        tokenizer.decode(tokenizer.encode_prompt("Once upon a time <s> [INST] schläft 128"))
    except EngineError:
        continue
    good += 1
print(good)
"""


def test_mutated_tokenizers(tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    """In a process of its own: a crash of the library would be the end of this one."""
    path, n = tmp_path / "tokenizer.model", 20 * ROUNDS
    shutil.copy(tiny_tokenizer_file, path)
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZERS, path, str(n)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60 * ROUNDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) < n


def break_folder(folder: Path, rng: random.Random) -> None:
    """Do one thing to a folder that no good download has."""
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.randrange(9)
    if not path.is_file() or path.is_symlink():
        return  # broken already
    if kind == 0:
        path.unlink()
    elif kind == 1:
        os.truncate(path, rng.randrange(path.stat().st_size + 1))
    elif kind == 2:
        path.unlink()
        path.mkdir()
    elif kind == 3:
        path.unlink()
        path.symlink_to(rng.choice((path.name, "nowhere", "/dev/zero", "..", "/proc/self/mem")))
    elif kind == 4:
        other = folder / rng.choice(sorted(os.listdir(folder))).replace("config", "x")
        if not other.is_symlink() and other != path and (other.is_file() or not other.exists()):
            other.write_bytes(path.read_bytes())
    elif kind == 5:
        path.unlink()
        os.mkfifo(path)
    elif kind == 6:
        path.rename(
            folder / rng.choice(("x.bin", "x.pt", "consolidated.00.pth", "consolidated.07.pth", "a.safetensors"))
        )
    elif kind == 7:
        data = path.read_bytes()
        path.write_bytes(mutate(data, rng, 0, len(data)) if data else b"\0")
    else:
        path.write_bytes(rng.randbytes(rng.randrange(200)))


def test_broken_directories(tmp_path: Path, hf: Path, tiny_tokenizer_file: Path) -> None:
    rng = random.Random(14)
    shutil.copy(tiny_tokenizer_file, hf / "tokenizer.model")
    quiet("convert", hf, tmp_path / "three", "--shards", 3)
    quiet("convert", hf, tmp_path / "meta", "--to", "meta", "--shards", 2)
    for i in range(40 if ROUNDS == 1 else 4 * ROUNDS):
        folder = tmp_path / f"broken{i}"
        shutil.copytree(tmp_path / rng.choice(("three", "meta", "hf")), folder)
        for _ in range(rng.choice((1, 1, 2, 4))):
            if any(folder.iterdir()):
                break_folder(folder, rng)

        def everything(folder: Path = folder) -> None:
            config = read_config(folder)
            load_parameters(folder, config, torch.float32, torch.device("cpu"), progress=False)
            found = tokenizer_file(folder)
            if found is not None:
                Tokenizer(found)

        started = time.monotonic()
        typed(everything)
        assert time.monotonic() - started < 20
        shutil.rmtree(folder)
