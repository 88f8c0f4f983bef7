"""Peers beside ours: what is refused, and why. Peers here are made up and compute nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as bench_compare
from benchmarks import continuous as bench_continuous
from benchmarks import latency as bench_latency
from benchmarks import model as bench_model
from benchmarks import offline as bench_offline
from benchmarks import peers as bench_peers
from benchmarks import throughput as bench_throughput
from benchmarks.figures import Figure
from benchmarks.llama_cpp import llama_cpp_missing, llama_cpp_sides
from benchmarks.machine import Ceilings
from benchmarks.model import BenchModel, weights_folder
from benchmarks.peers import CHECKED_PROMPTS, Peer, peer_sides
from benchmarks.sides import Ours, transformers_missing, transformers_sides
from llama.config import EngineConfig, ModelConfig
from llama.engine import Engine
from llama.stream import Stream

SCRIPTS = Path(__file__).parents[2] / "scripts"

TINY = ModelConfig(64, 2, 4, 4, 16, 128, 320, max_seq_len=256)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_model.SHAPES, "tiny", TINY)
    for peers in (bench_peers, bench_continuous):
        monkeypatch.setattr(peers, "transformers_missing", lambda: "is not installed")
    for subject in (bench_compare, bench_latency, bench_offline):
        monkeypatch.setattr(subject, "RemoteSides", in_this_process)


@contextmanager
def in_this_process(make: Any, *args: Any) -> Iterator[list[Ours]]:
    """Another process would not know the tiny shape."""
    (ours,) = make(*args)
    with ours.engine:
        yield [ours]


def arguments(subject: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    args = parser.parse_args(["--max-spread", "1e9", "--rounds", "3", *words])
    args.threads, args.shape = 1, "tiny"
    return args


def model(*words: str) -> BenchModel:
    return BenchModel.of(arguments(bench_compare, *words))


class Copy:
    """A side that answers with our own tokens, except the last one after a prompt of `wrong` tokens."""

    name = "copy plain"

    def __init__(self, folder: Path, wrong: int | None) -> None:
        self.folder, self.wrong = folder, wrong

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        config = EngineConfig(device="cpu", dtype="float32", slots=1)
        with Engine(self.folder, config, progress=False) as engine:
            found = Ours(engine).tokens(prompt, n)
        return found if len(prompt) != self.wrong else [*found[:-1], found[-1] ^ 1]

    def decode(self, prompt: list[int], n: int) -> float:
        return 1.0

    def prefill(self, prompt: list[int]) -> float:
        return 1.0

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        return 1.0


def copying(folder: Path, wrong: int | None = None) -> Peer:
    @contextmanager
    def start(dtype: str, n_seqs: int, context: int) -> Iterator[list[Copy]]:
        yield [Copy(folder, wrong)]

    return Peer("copy", None, start)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, *CHECKED_PROMPTS])
def test_a_peer_with_another_token_after_any_of_the_prompts_is_refused(wrong: int | None) -> None:
    tiny = model()
    with weights_folder(tiny) as folder, peer_sides(tiny, folder, [copying(folder, wrong)], 1, 64) as (sides, refused):
        if wrong is None:
            assert [side.name for side in sides] == ["copy plain"] and refused == {}
        else:
            assert sides == []
            assert refused["copy"].startswith(f"its greedy token 7 after {wrong} in fp32 is ")


def test_a_missing_peer_is_never_started() -> None:
    def start(*_: object) -> Any:
        raise AssertionError("was started")

    tiny = model()
    with (
        weights_folder(tiny) as folder,
        peer_sides(tiny, folder, [Peer("it", "is not here", start)], 1, 64) as (sides, refused),
    ):
        assert (sides, refused) == ([], {"it": "is not here"})


def test_llama_cpp_is_measured_on_the_cpu_only(tmp_path: Path) -> None:
    assert (
        bench_peers.llama_cpp_peer(model("--device", "cuda"), tmp_path, tmp_path).why_not
        == "is measured on the CPU only"
    )


@pytest.mark.slow
def test_compare_names_versions_ways_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(model: BenchModel, folder: Path, *_: object) -> Peer:
        return copying(folder)

    def wrong(model: BenchModel, folder: Path, *_: object) -> Peer:
        peer = copying(folder, 17)
        return Peer("other", None, peer.start)

    monkeypatch.setattr(bench_compare, "transformers_peer", right)
    monkeypatch.setattr(bench_compare, "llama_cpp_peer", wrong)
    monkeypatch.setattr(bench_compare, "llama_cpp_facts", lambda: {"version": "1", "system": "AVX = 1"})
    words = ["--subjects", "decode", "batch8", "mixed8", "prefill", "--tokens", "3", "--prompt-tokens", "4"]
    found = bench_compare.run(arguments(bench_compare, *words, "--prefill-tokens", "32"))
    assert found["peers"]["llama.cpp"] == {"version": "1", "system": "AVX = 1"}
    assert set(found["ceilings"]) == {"read_GB_s", "matmul_GFLOP_s"}
    for subject in ("decode", "batch8", "mixed8", "prefill"):
        assert set(found[subject]["medians"]) == {"ours", "copy plain"}
        assert found[subject]["best"] == {"copy": "copy plain"} and "copy plain" in found[subject]["ratios"]
        assert found[subject]["refused"].keys() == {"other", "transformers-continuous"}
    assert "batch32" not in found


@pytest.mark.slow
@pytest.mark.parametrize("peers, reason", [("--peers", "is not installed"), ("--no-peers", "left out (--no-peers)")])
def test_latency_and_offline_say_why_there_is_no_ratio(peers: str, reason: str) -> None:
    words = ["--tokens", "3", "--prompt-tokens", "4", "--ttft", "8"]
    found = bench_latency.run(arguments(bench_latency, peers, *words))
    for part in (found["decode"], found["prefill_8"]):
        assert (part["ratios"], part["refused"]) == ({}, {"transformers": reason})
    found = bench_offline.run(arguments(bench_offline, peers, "--prompts", "3"))
    assert (found["ratios"], found["refused"]) == ({}, {"transformers": reason})


@pytest.mark.slow
def test_latency_reports_no_share_of_what_varied_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(range(1, 1000))
    monkeypatch.setattr(bench_latency, "RemoteSides", lambda *_: nullcontext([Drifting(rates)]))
    args = arguments(bench_latency, "--no-peers", "--ttft", "8", "--max-spread", "0.1")
    found = bench_latency.run(args)
    assert "share_of_bandwidth" not in found["decode"] and found["decode"]["medians"] == {}
    assert "share" not in found["prefill_8"] and found["prefill_8"]["ttft_ms"] == {}


class Drifting:
    name = "ours"

    def __init__(self, rates: Iterator[int]) -> None:
        self.rates = rates

    def decode(self, prompt: list[int], n: int) -> float:
        return float(next(self.rates))

    def prefill(self, prompt: list[int]) -> float:
        return float(next(self.rates))

    def batch(self, prompts: list[list[int]], lengths: Sequence[int], at_once: int) -> float:
        return float(next(self.rates))


@pytest.mark.slow
def test_throughput_refuses_what_varied_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(range(1, 1000))
    monkeypatch.setattr(bench_throughput, "Ours", lambda engine: Drifting(rates))
    args = arguments(bench_throughput, "--requests", "2", "--shapes", "128/128", "2048/128", "--scale", "0.5")
    args.max_spread = 0.1
    found = bench_throughput.run(args)
    assert found["128/128"].startswith("too noisy: the spread of ")
    assert found["2048/128"] == "1024 + 64 tokens are more than the context of 256"


def test_no_share_and_no_picture_where_the_ceilings_moved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures themselves stay."""
    for subject, words in (
        (bench_latency, ["--no-peers", "--tokens", "3", "--ttft", "8"]),
        (bench_throughput, ["--requests", "2", "--shapes", "128/128", "--scale", "0.1"]),
        (bench_compare, ["--subjects", "decode", "--tokens", "3", "--prefill-tokens", "8"]),
    ):
        ceilings = iter([Ceilings(4e9, 2e11, "float32"), Ceilings(9e9, 2e11, "float32")])
        monkeypatch.setattr(subject, "measure_ceilings", lambda *_, ceilings=ceilings: next(ceilings))
        monkeypatch.setattr(bench_compare, "llama_cpp_peer", lambda *_: Peer("llama.cpp", "is not here", None))
        args = arguments(subject, *words, "--max-spread", "1")
        args.plot = tmp_path / "roof.png"
        monkeypatch.setattr(Figure, "noise", lambda self, bound: None)
        found = subject.run(args)
        assert "the read ceiling moved by 125%" in capsys.readouterr().out and not args.plot.exists()
        if subject is bench_latency:
            assert "share_of_bandwidth" not in found["decode"] and "share" not in found["prefill_8"]
            assert found["decode"]["medians"]["ours"] > 0
        elif subject is bench_throughput:
            assert found["128/128"]["share"] is None and found["128/128"]["output_tok_s"] > 0


@pytest.mark.slow
def test_a_peer_that_does_one_thing_is_not_asked_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(model: BenchModel, folder: Path, *_: object) -> Peer:
        return replace(copying(folder), only=["decode"])

    monkeypatch.setattr(bench_compare, "transformers_peer", right)
    monkeypatch.setattr(bench_compare, "llama_cpp_peer", lambda *_: Peer("llama.cpp", "is not here", None))
    words = ["--subjects", "decode", "prefill", "--tokens", "3", "--prefill-tokens", "8"]
    found = bench_compare.run(arguments(bench_compare, *words))
    assert "copy plain" in found["decode"]["medians"] and "copy" not in found["decode"]["refused"]
    assert "copy plain" not in found["prefill"]["medians"]
    assert found["prefill"]["refused"]["copy"] == "is measured in decode only"


PROMPTS, LENGTHS = [[5, 6, 7], [8], [9, 10], [11] * 9, [12]], [3, 9, 1, 4, 6]
CONTINUOUS_MISSING = bench_continuous.continuous_missing("cpu")


def test_ours_has_so_many_requests_in_flight_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Stream] = []
    in_flight: list[int] = []
    submit = Engine.submit

    def noting(*args: Any, **named: Any) -> Stream:
        streams.append(submit(*args, **named))
        in_flight.append(sum(stream.stats.finished is None for stream in streams))
        return streams[-1]

    monkeypatch.setattr(Engine, "submit", noting)
    with Engine(TINY, EngineConfig(device="cpu", dtype="float32", slots=5), progress=False) as engine:
        assert Ours(engine).batch(PROMPTS, LENGTHS, 2) > 0
    assert len(streams) == 5 and max(in_flight) == 2


@pytest.mark.skipif(transformers_missing() is not None, reason="transformers is not installed")
def test_transformers_gets_so_many_prompts_at_a_time() -> None:
    with weights_folder(model()) as folder:
        (side,) = transformers_sides(folder, "float32", "cpu", 1, ["eager"])
    calls: list[tuple[int, int]] = []
    side._generate = lambda prompts, n: calls.append((len(prompts), n))  # type: ignore[attr-defined]
    side.batch(PROMPTS, LENGTHS, 2)
    assert calls == [(2, 9), (2, 4), (1, 6)], "each to its longest output"


@pytest.mark.skipif(CONTINUOUS_MISSING is not None, reason=f"transformers' continuous batching {CONTINUOUS_MISSING}")
def test_continuous_batching_makes_our_tokens() -> None:
    with weights_folder(model()) as folder:
        with Engine(folder, EngineConfig(device="cpu", dtype="float32", slots=1), progress=False) as engine:
            expected = [Ours(engine).tokens(p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
        (side,) = bench_continuous.continuous_sides(folder, "float32", 1, 64)
    assert isinstance(side, bench_continuous.Continuous)
    assert side._run(PROMPTS, LENGTHS, 2)[0] == expected
    assert side.batch(PROMPTS, LENGTHS, 5) > 0


@pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama-cpp-python and gguf are not installed")
@pytest.mark.parametrize("cache", [0, 1])
def test_llama_cpp_begins_a_sequence_where_another_has_ended(cache: int, tmp_path: Path) -> None:
    with weights_folder(model()) as folder:
        with Engine(folder, EngineConfig(device="cpu", dtype="float32", slots=1), progress=False) as engine:
            expected = [Ours(engine).tokens(p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
        side = llama_cpp_sides(folder, "float32", tmp_path, 1, 2, 64)[cache]
    made: list[list[int]] = []
    places: dict[int, list[int]] = {}  # the tokens of the sequence that each place has now
    run = side._run  # type: ignore[attr-defined]

    def noting(parts: list[tuple[int, int, list[int]]]) -> list[int]:
        assert len(parts) <= 2 and parts == sorted(parts)
        tokens = run(parts)
        for (place, position, _), token in zip(parts, tokens, strict=True):
            if position == 0:
                places[place] = []
                made.append(places[place])
            places[place].append(token)
        return tokens

    side._run = noting  # type: ignore[attr-defined]
    side.batch(PROMPTS, LENGTHS, 2)
    assert made == expected


@pytest.mark.slow
def test_as_many_requests_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_throughput, "MOST_REQUESTS", 5)
    args = arguments(bench_throughput, "--requests", "fit", "--shapes", "128/128", "--scale", "0.1")
    found = bench_throughput.run(args)["128/128"]
    assert (found["requests"], found["sequences"]) == (5, 5)
    with pytest.raises(argparse.ArgumentTypeError, match="neither"):
        bench_throughput.request_count("0")


def test_random_weights_are_kept_for_the_next_command(tmp_path: Path) -> None:
    tiny = model("--keep-weights", str(tmp_path))
    with weights_folder(tiny) as first:
        changed = (first / "config.json").stat().st_mtime_ns
    with weights_folder(tiny) as second:
        assert second == first == tmp_path / "random-tiny-float32"
        assert (second / "config.json").stat().st_mtime_ns == changed
