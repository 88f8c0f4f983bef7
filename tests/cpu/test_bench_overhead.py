"""The overhead meter: what it runs and counts, not how long it takes."""

from __future__ import annotations

import argparse
import gc

import pytest

from benchmarks import overhead as bench_overhead
from benchmarks.overhead import CONTEXT, collections, decode_plan, time_layout


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_overhead.add_arguments(parser)
    return parser.parse_args(words)


def test_every_line_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_overhead, "BATCHES", ((1, 20), (3, 20)))
    monkeypatch.setattr(bench_overhead, "COLLECTED_ROUNDS", 1)
    monkeypatch.setattr(bench_overhead, "LAYOUTS", 2)
    found = bench_overhead.run(arguments("--rounds", "3", "--max-spread", "1e9"))
    for n in (1, 3):
        # within rounding, a step's time is that of its tokens
        assert found[f"us_per_step_{n}"] == pytest.approx(n * found[f"us_per_token_{n}"], rel=0.2)
        assert found[f"us_layout_{n}"] > 0 and found[f"us_plan_attention_{n}"] > 0
    assert found["gc"]["objects"] > found["gc_frozen"]["objects"]
    assert gc.get_freeze_count() == 0, "the process is left as it was"


def test_what_varied_too_much_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_overhead, "BATCHES", ((2, 20),))
    monkeypatch.setattr(bench_overhead, "COLLECTED_ROUNDS", 0)
    monkeypatch.setattr(bench_overhead, "LAYOUTS", 2)
    found = bench_overhead.run(arguments("--rounds", "3", "--max-spread", "-1"))
    assert not [name for name in found if name.startswith(("us_", "tokens_"))]
    assert capsys.readouterr().out.count("too noisy") == 2


def test_full_collections_are_seen_and_others_are_not() -> None:
    with collections() as full:
        gc.collect(0)
        gc.collect(1)
        assert full.seconds == []
        gc.collect()
        assert len(full.seconds) == 1
    gc.collect()
    assert len(full.seconds) == 1


def test_the_step_that_is_laid_out() -> None:
    plan = decode_plan(3)
    assert (plan.firsts, plan.yields) == ([CONTEXT] * 3, [True] * 3)
    whole, attention = time_layout(plan, 2)
    assert len(whole.values) == len(attention.values) == 2
