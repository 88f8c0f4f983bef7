"""The kernel bench and the tuner, run to the end without a card: every launch compiles, the clock is made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import kernels as bench_kernels
from benchmarks import tune_tiles
from benchmarks.gpu_timer import Call, Ceilings
from benchmarks.inspect_sass import capture
from kernels import tiles
from kernels.tiles import TABLE, AttentionTile, MatmulTile, read_cards
from llama.config import ModelConfig

pytestmark = pytest.mark.aot

META = torch.device("meta")
SEVEN = ModelConfig.named("7B")


def timer(sides: Sequence[Sequence[Call]]) -> list[float]:
    """Makes a call of each side and says that it took a millisecond."""
    for calls in sides:
        calls[0]()
    return [1e-3] * len(sides)


def test_the_bench_measures_every_kernel() -> None:
    with capture(90) as launches, torch.inference_mode():
        bench = bench_kernels.Bench(SEVEN, Ceilings(4000.0, 4000.0, 800.0), timer, META)
        bench.all()
        step = bench.step(2)
    assert {launch.kernel for launch in launches} == {
        "matmul_kernel", "matmul_tma_kernel", "decode_kernel", "prefill_kernel", "rms_norm_kernel", "swiglu_kernel",
        "rope_write_kernel", "sample_kernel", "token_logprobs_kernel",
    }  # fmt: skip
    names = [line.name for line in bench.lines]
    assert len(set(names)) == len(names)
    assert {f"linear qkv {m} {how}" for m in (1, 4, 8, 16, 32, 64, 512, 2048) for how in ("exact", "fast")} < set(names)
    assert {f"prefill attention {n}" for n in (1024, 2048, 4096)} < set(names)
    assert {"decode attention 1 x 512", "decode attention 16 x 32768", "decode attention 64 x 4096"} < set(names)
    line = next(line for line in bench.lines if line.name == "linear qkv 1 exact")
    assert line.rate == pytest.approx(100.696) and line.share == pytest.approx(100.696 / 4000) and line.torch == 1.0
    # nine kernels of a millisecond in each of two layers, and the lm_head
    assert step == {"layers": 2, "microseconds": 1000.0, "kernels": pytest.approx(19_000.0), "ratio": 1 / 19}


def test_the_tuner_writes_what_was_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = MatmulTile(16, 32, 64, 3, 4), MatmulTile(128, 128, 64, 4, 8, tma=True)
    prefill, decode = AttentionTile(64, 3, 4), AttentionTile(16, 4, 4)
    monkeypatch.setattr(tune_tiles, "few_rows_candidates", lambda rows, shared: [few])
    monkeypatch.setattr(tune_tiles, "many_rows_candidates", lambda arch, shared: [many])
    monkeypatch.setattr(tune_tiles, "attention_candidates", lambda long: [prefill if long else decode])
    winners = {few, many, prefill, decode}

    def fastest(what: str, candidates: list[object], calls: object, clock: object) -> object:
        for tile in candidates:
            calls(tile)[0]()
        return next((tile for tile in candidates if tile in winners), candidates[0])

    monkeypatch.setattr(tune_tiles, "fastest", fastest)
    with capture(90):
        tune_tiles.tune(SEVEN, timer, META, tmp_path / "tiles.json")
    before, after = read_cards(TABLE), read_cards(tmp_path / "tiles.json")
    assert (after[80], after[100]) == (before[80], before[100])
    assert {(f.narrow, f.wide) for f in after[90].few_rows} == {(few, few)}
    assert (after[90].many_rows_wide, after[90].many_rows) == (many, before[90].many_rows)
    assert (after[90].prefill, after[90].decode) == (prefill, decode)
    assert after[90].source.startswith("measured ") and replace(after[90], source="") != replace(before[90], source="")
    # and the table serves
    monkeypatch.setitem(tiles._CARDS, 90, after[90])
    with capture(90) as launches:
        weight = kernels.pack_weight(torch.empty(4096, 4096, dtype=torch.bfloat16, device=META))
        kernels.linear(torch.empty(2048, 4096, dtype=torch.bfloat16, device=META), weight, batch_invariant=True)
    assert launches[0].kernel == "matmul_tma_kernel" and launches[0].constants["BLOCK_N"] == 128
