"""`bench.py all`: what it runs, that it goes on after a failure and within its time, and the file it leaves."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import bench
from benchmarks import all as bench_all
from benchmarks import throughput
from benchmarks.all import PLANS, Command, Options
from benchmarks.card_peers import CardPeers

SCRIPTS = Path(__file__).parents[2] / "scripts"

OVERHEAD = Command("python", "overhead --rounds 1 --max-spread 100")
WRONG = Command("wrong", "latency --model no-such-folder")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_all.add_arguments(parser)
    return parser.parse_args(words)


OPTIONS = Options("cpu", None, 600, 5, None, CardPeers(None, False))


@pytest.mark.parametrize("device", list(PLANS))
def test_every_command_of_a_plan_is_one_that_bench_takes(device: str) -> None:
    names = [command.name for command in PLANS[device]]
    assert len(set(names)) == len(names)
    for command in PLANS[device]:
        words = command.line.split()
        words += ["--keep-weights", "w"] if command.weights else []
        args = bench.parse(words)
        assert getattr(args, "device", device) == device or command.subject in ("overhead", "serve")
        assert not command.plot or args.plot is None


def test_a_card_has_every_goal_in_its_plan() -> None:
    lines = [command.line for command in PLANS["cuda"]]
    for name in ("7B", "13B", "70B"):
        assert any(line.startswith("latency ") and f"--shape {name}" in line for line in lines)
    shapes = {word for line in lines if line.startswith("throughput ") for word in line.split() if "/" in word}
    assert shapes == set(throughput.SHAPES)
    assert {"slots-7B", "idle-7B", "compare-7B"} <= {command.name for command in PLANS["cuda"]}


@pytest.mark.slow
def test_it_goes_on_after_a_failure_and_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "cpu", (WRONG, OVERHEAD))
    out = tmp_path / "found.md"
    found = bench_all.run(arguments("--out", str(out)))
    reason = "bench.py latency: model='no-such-folder': is not a folder, nor the name 'demo'"
    assert found == {"out": str(out), "measured": ["python"], "failed": {"wrong": reason}}
    text = out.read_text()
    assert f"**No figures: {reason}**" in text
    assert f"`python scripts/bench.py {OVERHEAD.line}`" in text and "us/token" in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["what"] for line in lines] == ["ceilings", "overhead"]
    assert lines[1]["command"] == f"bench.py {OVERHEAD.line}" and lines[0]["ceilings"]["read_GB_s"] > 0
    with pytest.raises(SystemExit, match="exists; --out names another file"):
        bench_all.run(arguments("--out", str(out)))


def test_a_command_past_its_limit_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = bench_all.execute("overhead --rounds 100000", tmp_path, 0.5)
    assert outcome.error == "stopped after 0 seconds" or outcome.error == "stopped after 1 seconds"
    assert outcome.figures == {} and time.monotonic() - started < 60


def test_what_has_no_time_left_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_all, "execute", lambda *_: pytest.fail("was run"))
    outcome = bench_all.run_command(OVERHEAD, OPTIONS, tmp_path, time.monotonic())
    assert outcome.error == "not run: the 5 minutes are over"


def test_subjects_are_chosen_by_subject_or_by_name() -> None:
    names = [command.name for command in bench_all.chosen("cuda", ["latency"])]
    assert names == ["latency-7B", "latency-13B", "latency-70B"]
    assert len(bench_all.chosen("cuda", ["idle-7B"])) == 1
    with pytest.raises(SystemExit, match="'speed' is nothing for cpu; there are "):
        bench_all.chosen("cpu", ["speed"])


def test_what_a_command_is_given_besides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str] = []

    def execute(line: str, *_: object) -> bench_all.Outcome:
        lines.append(line)
        return bench_all.Outcome("", {}, 0.0)

    monkeypatch.setattr(bench_all, "execute", execute)
    monkeypatch.setattr(bench_all, "Drawing", None)
    options = replace(OPTIONS, peers=CardPeers.of(arguments("--vllm", "--gpt-fast", str(tmp_path))))
    end = time.monotonic() + 60
    bench_all.run_command(Command("a", "compare", True, True), options, tmp_path, end)
    bench_all.run_command(Command("b", "latency", False, True), options, tmp_path, end)
    monkeypatch.setattr(bench_all, "Drawing", object)
    bench_all.run_command(Command("c", "latency", False, True), options, tmp_path, end)
    assert lines == [
        f"compare --keep-weights weights --gpt-fast {tmp_path} --vllm",
        "latency",
        "latency --plot c.png",
    ]


def test_the_file_is_named_after_the_machine() -> None:
    facts = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-12-01"}
    assert bench_all.default_file("cuda", facts).name == "h100-80gb-hbm3-2026-12-01.md"
    assert bench_all.default_file("cpu", facts).name == "cpu-2026-12-01.md"


def test_a_picture_lies_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "latency.png").write_bytes(b"x")
    name = bench_all.keep(tmp_path / "a" / "latency.png", tmp_path / "h200.md")
    assert name == "h200-latency.png" and (tmp_path / name).read_bytes() == b"x"
    text = bench_all.section("l", "latency", bench_all.Outcome("said\n", {"a": 1}, 2.0), [name])
    assert "![l](h200-latency.png)" in text


MISSING = (
    *("pydantic", "starlette", "uvicorn", "h11", "prometheus_client", "openai"),
    *("matplotlib", "gguf", "llama_cpp", "transformers", "vllm"),
)


@pytest.mark.slow
def test_on_a_bare_machine_every_subject_but_serve_starts() -> None:
    """Torch and what the engine itself needs are there; no HTTP, no pictures, no peers."""
    subjects = [name for name in bench.SUBJECTS if name != "serve"]
    done = on_a_bare_machine(f"for what in {subjects}: bench.parse([what])")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_serve_lacks_is_said() -> None:
    done = on_a_bare_machine("bench.main(['serve'])")
    assert done.returncode == 1
    assert re.fullmatch(
        r"bench\.py serve: needs \S+, which is not (installed|found): (run `)?pip install .*\n", done.stderr
    )


def on_a_bare_machine(code: str) -> subprocess.CompletedProcess[str]:
    before = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path[:0] = [{str(SCRIPTS)!r}, {str(SCRIPTS.parent)!r}]
import bench
"""
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
