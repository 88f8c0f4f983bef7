"""`bench.py kernels`, as far as it goes without a card: its arguments, what it counts, and the table it writes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.launch import HAS_TRITON
from kernels.tiles import TABLE, AttentionTile, MatmulTile, read_cards, write_cards
from llama.config import ModelConfig

if not HAS_TRITON:
    pytest.skip("needs triton", allow_module_level=True)


from benchmarks import gpu_timer, tune_tiles
from benchmarks import kernels as bench_kernels

SEVEN, SEVENTY = ModelConfig.named("7B"), ModelConfig.named("70B")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_kernels.add_arguments(parser)
    return parser.parse_args(words)


def test_arguments() -> None:
    assert (parse().model, parse().tune, parse().table) == ("7B", False, TABLE)
    assert parse("--model", "70B", "--tune", "--table", "t.json").table == Path("t.json")
    with pytest.raises(SystemExit):
        parse("--model", "8B")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs triton and a CUDA device"):
        bench_kernels.run(parse())


def test_bytes_and_operations_by_hand() -> None:
    # one row of 7B's qkv: 12288 x 4096 weights of two bytes, 4096 numbers in and 12288 out
    assert bench_kernels.linear_bytes(1, 12288, 4096) == 100_663_296 + 2 * 16384
    assert bench_kernels.linear_flop(2048, 12288, 4096) == 2 * 2048 * 50_331_648
    # K and V of a token in one layer: 7B 2 x 4096, 70B 2 x 1024 numbers of two bytes
    assert bench_kernels.decode_bytes(SEVEN, 1, 1) == 16_384
    assert bench_kernels.decode_bytes(SEVENTY, 16, 4096) == 16 * 4096 * 4096
    # 4 x 4096 x 4096 x 128 per head, halved by causality
    assert bench_kernels.prefill_flop(SEVEN, 4096) == 32 * 4_294_967_296
    # 7B has 6.74e9 weights: 32 layers, an embedding and an lm_head of 32000 x 4096, and some norms
    layers = 32 * bench_kernels.layer_bytes(SEVEN) // 2
    assert layers + 2 * 32000 * 4096 == pytest.approx(6.738e9, rel=1e-3)


def test_a_card_that_changed_meanwhile_gives_no_figures() -> None:
    before = gpu_timer.Ceilings(4000.0, 4200.0, 800.0)
    assert bench_kernels.moved(before, gpu_timer.Ceilings(4100.0, 4200.0, 790.0), 0.1) is None
    reason = bench_kernels.moved(before, gpu_timer.Ceilings(4100.0, 4200.0, 600.0), 0.1)
    assert reason == "too noisy: the ceiling of matmul moved by -25% meanwhile, more than 10%"


@pytest.mark.parametrize("n_bytes, expected", [(1, 64), (16 << 20, 16), (100 << 20, 3), (1 << 30, 1)])
def test_copies_walk_past_the_cache(n_bytes: int, expected: int) -> None:
    assert len(gpu_timer.copies(n_bytes)) == expected


def test_candidates_fit_and_no_two_are_alike() -> None:
    for rows in (4, 16, 32, 64):
        found = tune_tiles.few_rows_candidates(rows, 227 << 10)
        assert len(set(found)) == len(found) > 20
        assert {t.block_m for t in found} == {max(16, rows)}
        assert all(2 * t.stages * t.block_k * (t.block_m + t.block_n) <= 227 << 10 for t in found)
        assert all(t.block_n // t.warps >= 8 for t in found)
    assert MatmulTile(128, 256, 64, 4, 8, True) in tune_tiles.many_rows_candidates(90, 227 << 10)
    assert not any(t.tma for t in tune_tiles.many_rows_candidates(80, 163 << 10))
    assert all(128 % t.block_m == 0 for t in tune_tiles.attention_candidates(True))
    assert {t.block_m for t in tune_tiles.attention_candidates(False)} == {16}


def test_the_fastest_wins_and_what_does_not_fit_loses() -> None:
    tiles = [AttentionTile(16, stages, 4) for stages in (2, 3, 4, 5)]
    times = {2: 3.0, 3: 1.0, 4: 2.0}

    def timer(sides: list[list[AttentionTile]]) -> list[float]:
        stages = sides[0][0].stages
        if stages not in times:
            raise tune_tiles.triton.runtime.errors.OutOfResources(1 << 20, 1 << 10, "shared memory")
        return [times[stages]]

    assert tune_tiles.fastest("test", tiles, lambda tile: [tile], timer) == tiles[1]


def test_the_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    cards, copy = read_cards(TABLE), tmp_path / "tiles.json"
    write_cards(cards, copy)
    assert copy.read_text() == TABLE.read_text()
    changed = replace(cards[90], source="measured", many_rows=MatmulTile(64, 128, 64, 4, 4, tma=True))
    write_cards({**cards, 90: changed}, copy)
    assert read_cards(copy) == {**cards, 90: changed}
    different = zip(copy.read_text().splitlines(), TABLE.read_text().splitlines(), strict=True)
    assert sum(a != b for a, b in different) == 2
