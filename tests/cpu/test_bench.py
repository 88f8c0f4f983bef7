"""The meter's own arithmetic and its refusals; nothing here looks at the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import serve as bench_serve
from benchmarks.figures import Figure, alternate, beside, best_peers
from benchmarks.machine import Ceilings
from benchmarks.model import SHAPES
from benchmarks.remote import RemoteSides
from llama_slots.roofline import (
    Card,
    decode_rate,
    decode_work,
    plain_format,
    prefill_seconds,
    prefill_work,
    serving_rate,
    serving_work,
)

SCRIPTS = Path(__file__).parents[2] / "scripts"

H200 = Card(139 * 2**30, 4.3e12, 790e12, None, "measured")
BF16 = plain_format(2)


def test_sides_are_measured_in_turns_after_a_warm_up_each() -> None:
    """There and back, so that neither is always the one that comes after the other."""
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures = alternate({"ours": lambda: side("a"), "peer": lambda: side("b")}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert (figures["ours"].values, figures["peer"].values) == ([3.0, 6.0, 7.0], [4.0, 5.0, 8.0])


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine halved its speed in one round for both sides: the ratio does not know."""
    found = beside("", {"ours": Figure([20, 10, 20]), "peer": Figure([10, 5, 10])}, "tok/s", 0.1)
    assert found["ratios"] == {"peer": {"ratio": 2.0, "spread": 0.0}}
    assert found["refused"] == {}


@pytest.mark.parametrize(
    "ours, reason",
    [([10, 20, 30], "too noisy to compare: the ratio's spread of 100% is above 30%"), ([10, 10], "2 rounds")],
)
def test_no_ratio_without_a_steady_machine(ours: list[float], reason: str) -> None:
    found = beside("", {"ours": Figure(ours), "peer": Figure([10.0] * len(ours))}, "tok/s", 0.3)
    assert found["ratios"] == {}
    assert found["refused"]["peer"].startswith(reason)


def test_no_median_of_a_side_that_varied_but_its_ratio_where_both_did(capsys: pytest.CaptureFixture[str]) -> None:
    found = beside("", {"ours": Figure([20, 10, 20]), "peer": Figure([10, 5, 10])}, "tok/s", 0.3)
    assert found["medians"] == {} and found["spreads"] == {"ours": 0.5, "peer": 0.5}
    assert found["ratios"]["peer"]["ratio"] == 2.0
    assert "20.0 tok/s" not in capsys.readouterr().out


def test_a_share_is_told_of_ceilings_that_did_not_move() -> None:
    before, after = Ceilings(40.0, 200.0, "float32"), Ceilings(36.0, 210.0, "float32")
    assert before.best(after) == Ceilings(40.0, 210.0, "float32")
    assert before.moved(after, 0.3) is None
    assert after.moved(before, 0.1) == "no share: the read ceiling moved by 11% during the run, more than 10%"
    assert before.moved(Ceilings(40.0, 100.0, "float32"), 0.3).startswith("no share: the matmul ceiling moved by 100%")


def test_few_rounds_tell_no_spread() -> None:
    assert Figure([1, 1]).steadiness == "2 rounds, spread unknown"
    assert Figure([1, 1, 2]).steadiness == "spread 100%"


def test_http_beside_in_process_is_refused_like_any_ratio() -> None:
    steady = {"ours": Figure([9, 9, 9]), "in process": Figure([10, 10, 10])}
    assert bench_serve.http_line(0, steady, 0.3) == {"in_process": 10, "http": 9, "ratio": 0.9, "spread": 0.0}
    found = bench_serve.http_line(0, {"ours": Figure([1, 9, 5]), "in process": Figure([10, 10, 10])}, 0.3)
    assert found["refused"].startswith("too noisy to compare") and "ratio" not in found


def test_a_missing_peer_is_named() -> None:
    found = beside("", {"ours": Figure([1, 1, 1])}, "tok/s", 0.3, {"llama.cpp": "is not installed"})
    assert (found["ratios"], found["refused"]) == ({}, {"llama.cpp": "is not installed"})


def test_of_a_peer_the_best_way_counts(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"ours": Figure([9]), "peer eager": Figure([1]), "peer sdpa": Figure([2]), "other": Figure([1])}
    assert best_peers(figures) == ["peer sdpa", "other"]
    assert beside("", figures, "tok/s", 0.3)["best"] == {"peer": "peer sdpa"}
    assert "peer                 its best way was sdpa" in capsys.readouterr().out


@pytest.mark.parametrize("name, batch, limit", [("7B", 1, 319), ("7B", 64, 9054), ("13B", 8, 1184), ("70B", 1, 31.3)])
def test_decode_limits_are_those_worked_out_by_hand(name: str, batch: int, limit: float) -> None:
    """At 512 tokens of context, 4.3 TB/s and 790 TFLOP/s."""
    assert decode_rate(SHAPES[name], H200, BF16, batch, 512) == pytest.approx(limit, rel=0.01)


def test_prefill_and_serving_limits() -> None:
    assert prefill_seconds(SHAPES["7B"], H200, BF16, 2048) == pytest.approx(35.4e-3, rel=0.01)
    assert serving_rate(SHAPES["7B"], H200, BF16, 249_000 / 1500, 1000, 1000) == pytest.approx(4583, rel=0.02)


def test_the_work_of_serving_is_that_of_its_prompts_and_steps() -> None:
    """One sequence: 100 steps at a context of 250 in the mean, and a prompt, whose reading costs nothing."""
    model = SHAPES["7B"]
    whole, step, prompt = (
        serving_work(model, BF16, 1, 200, 100),
        decode_work(model, BF16, 1, 250),
        prefill_work(model, BF16, 200),
    )
    assert whole.nbytes == 100 * step.nbytes
    head = 2 * model.vocab_size * model.dim
    assert whole.flops == pytest.approx(100 * step.flops + prompt.flops - head)


@pytest.mark.slow
def test_the_last_line_is_json() -> None:
    command = [sys.executable, str(SCRIPTS / "bench.py"), "overhead", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["what"] == "overhead"
    assert found["us_per_token_256"] > 0


def test_an_unknown_subject_is_refused_with_the_known_ones() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "bench.py"), "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "compare" in done.stderr


class Doubling:
    """A side that computes nothing, for the process it is made in."""

    name = "doubling"

    def prefill(self, prompt: list[int]) -> float:
        raise ValueError(f"no prefill of {len(prompt)}")

    def decode(self, prompt: list[int], n: int) -> float:
        return 2.0 * n

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        return float(sum(lengths))

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return prompt * n


def make_two() -> list[Doubling]:
    return [Doubling(), Doubling()]


def make_none() -> list[Doubling]:
    raise RuntimeError("no such engine")


@pytest.mark.slow
def test_a_side_in_another_process() -> None:
    with RemoteSides(make_two) as (first, second):
        assert (first.name, second.decode([1], 21), first.tokens([5], 2)) == ("doubling", 42.0, [5, 5])
        with pytest.raises(ValueError, match="no prefill of 3"):
            first.prefill([1, 2, 3])
        assert second.batch([[1]], [4], 1) == 4.0, "an error ends nothing"
    with pytest.raises(RuntimeError, match="no such engine"):
        RemoteSides(make_none)
