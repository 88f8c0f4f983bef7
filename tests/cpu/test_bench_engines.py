"""gpt-fast and vLLM, as far as it goes without a card: when they are refused, and gpt-fast's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import card_peers as bench_engines
from benchmarks import compare as bench_compare
from benchmarks import continuous as bench_continuous
from benchmarks import model as bench_model
from benchmarks import peers as bench_peers
from benchmarks.card_peers import NEEDED, CardPeers, asked_for, gpt_fast_weights, tensors_of
from benchmarks.model import BenchModel, weights_folder
from llama.config import ModelConfig

TINY = ModelConfig(64, 2, 4, 2, 16, 128, 320, max_seq_len=128)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_model.SHAPES, "110M", TINY)
    for peers in (bench_peers, bench_continuous):
        monkeypatch.setattr(peers, "transformers_missing", lambda: "is not installed")
    monkeypatch.setattr(bench_peers, "llama_cpp_missing", lambda: "is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt-fast"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).touch()
    return folder


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_compare.add_arguments(parser)
    args = parser.parse_args(words)
    args.threads = 1
    return args


def test_only_those_asked_for_are_sides(tmp_path: Path, checkout: Path) -> None:
    assert asked_for(CardPeers.of(arguments()), "cpu", tmp_path, tmp_path) == []
    named = CardPeers.of(arguments("--vllm", "--gpt-fast", str(checkout)))
    peers = asked_for(named, "cpu", tmp_path, tmp_path)
    assert [peer.name for peer in peers] == ["gpt-fast", "vllm"] and peers[0].only == ["decode"]
    assert peers[1].only == [name for name in bench_compare.SUBJECTS if name != "mixed8"]


def test_a_folder_that_is_no_checkout(tmp_path: Path, checkout: Path) -> None:
    (checkout / "model.py").unlink()
    reason = "the folder given is no checkout of it: there is no model.py"
    assert bench_engines.gpt_fast_missing(checkout, "cuda") == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_both_need_a_card(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    assert bench_engines.gpt_fast_missing(checkout, "cpu") == "is measured on CUDA only"
    assert bench_engines.gpt_fast_missing(checkout, "cuda") == "needs a CUDA device, and there is none"
    monkeypatch.setattr(bench_engines, "find_spec", lambda _: None)
    assert bench_engines.vllm_missing("cuda") == "is not installed"
    monkeypatch.setattr(bench_engines, "find_spec", lambda _: object())
    assert bench_engines.vllm_missing("cpu") == "is measured on CUDA only"


@pytest.mark.slow
def test_compare_prints_no_number_for_what_did_not_run(
    monkeypatch: pytest.MonkeyPatch, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_engines, "find_spec", lambda _: None)
    words = ["--subjects", "decode", "prefill", "--tokens", "3", "--prefill-tokens", "8", "--rounds", "3"]
    found = bench_compare.run(arguments(*words, "--vllm", "--gpt-fast", str(checkout)))
    assert found["decode"]["refused"]["vllm"] == "is not installed"
    for subject in ("decode", "prefill"):
        assert found[subject]["refused"]["gpt-fast"] == "is measured on CUDA only"
        assert set(found[subject]["medians"]) <= {"ours"} and found[subject]["ratios"] == {}
    assert "gpt-fast             no ratio: is measured on CUDA only" in capsys.readouterr().out


def test_gpt_fast_gets_its_own_names_in_one_file(tmp_path: Path) -> None:
    """Those of its `Transformer.state_dict`, but wq, wk and wv, which it joins itself."""
    layer = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    layer += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm")
    names = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    with weights_folder(BenchModel.of(arguments())) as folder:
        file = gpt_fast_weights(folder, tmp_path, "bfloat16")
    weights = tensors_of(file, "bfloat16")
    expected = torch.load(file, weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert set(weights) == names | {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["layers.0.attention.wk.weight"].shape == (32, 64)
