"""All slots busy, and the card between steps: the counting, with times made up."""

from __future__ import annotations

import argparse
import asyncio
import random

import pytest

from benchmarks import idle as bench_idle
from benchmarks import model as bench_model
from benchmarks import slots as bench_slots
from benchmarks.model import BenchModel, greedy, make_engine, random_prompt
from benchmarks.slots import Seen
from llama.config import ModelConfig
from llama.request import Request

TINY = ModelConfig(64, 2, 4, 4, 16, 128, 320, max_seq_len=256)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_slots.add_arguments(parser)
    args = parser.parse_args(words)
    args.threads = 1
    return args


def test_every_token_of_every_request_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_model.SHAPES, "110M", TINY)
    dice = random.Random(1)
    lengths = [3, 7, 2, 5, 4]
    work = [Request([random_prompt(TINY, 6, dice)], greedy(n)) for n in lengths]
    with make_engine(BenchModel.of(arguments()), 2, 32) as engine:
        seen = asyncio.run(bench_slots.closed_loop(engine, work, 2))
    assert seen.tokens == sum(lengths)
    assert (len(seen.burst), len(seen.first)) == (2, 3)
    assert len(seen.gaps) == sum(lengths) - len(lengths)
    assert seen.taken >= max(seen.gaps)


def test_the_middle_of_the_rounds_and_what_varied_too_much() -> None:
    rounds = [Seen([0.1, 0.2], [first], [0.004, 0.004, 0.02], 2.0, 100) for first in (0.01, 0.02, 0.09)]
    found = bench_slots.summary(rounds, 0.3)
    assert (found["inter_token_ms_p50"], found["inter_token_ms_p99"]) == (4.0, 20.0)
    assert (found["output_tok_s"], found["burst_last_first_token_ms"]) == (50.0, 200.0)
    assert set(found["refused"]) == {"first_token_ms_p50", "first_token_ms_p99"}
    assert not set(found["refused"]) & set(found)


def test_a_run_without_later_requests_has_no_first_token_of_theirs() -> None:
    found = bench_slots.summary([Seen([0.1], [], [0.004], 2.0, 100)] * 3, 0.3)
    assert "first_token_ms_p50" not in found and "inter_token_ms_p50" in found


def test_gaps_between_steps() -> None:
    """Two kernels a step, 1 us between them; 5, 7 and 9 us between steps; one kernel runs beside another."""
    spans = [(0, 10), (11, 20), (25, 35), (26, 30), (36, 45), (52, 60), (61, 70), (79, 90)]
    found = bench_idle.between_steps(spans[::-1], 3)
    assert found == {"idle_us": 7, "idle_share": round((1 + 5 + 1 + 7 + 1 + 9) / 90, 4)}
    with pytest.raises(ValueError, match="nothing run"):
        bench_idle.between_steps([], 3)
    with pytest.raises(ValueError, match="no gap"):
        bench_idle.between_steps([(0, 5), (4, 9)], 3)


def test_idle_needs_a_card() -> None:
    parser = argparse.ArgumentParser()
    bench_idle.add_arguments(parser)
    with pytest.raises(SystemExit, match="needs --device cuda"):
        bench_idle.run(parser.parse_args([]))
