"""Would the interpreter tests notice? One bug at a time is planted in a copy of the kernels, and a test must fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.interpret

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """`right` occurs once in kernels/<file>.py and becomes `wrong`; tests: file and -k expression that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, str]


SINGLE = ("test_attention_kernels.py", "single_tokens and (64 or 16)")
PREFILL = ("test_attention_kernels.py", "test_prefill and dtype2")
CUTS = ("test_attention_kernels.py", "how_it_was_cut")
LINEAR = ("test_matmul_kernel.py", "test_linear and 352")
BITS = ("test_matmul_kernel.py", "same_bits")
COPIES = ("test_matmul_kernel.py", "copy_engine")
WIDE = ("test_matmul_kernel.py", "widest")
ROWS = ("test_row_kernels.py", "dtype2")
SAMPLE = ("test_sample_kernels.py", "filtered and 512")
EDGES = ("test_sample_kernels.py", "greedy or finite or ties")

BUGS = [
    Bug("mask edge: a key too few", "attention", "(at[None, :] <= positions)", "(at[None, :] < positions)", PREFILL),
    Bug(
        "mask edge: a key too many",
        "attention",
        "(at[None, :] <= positions)",
        "(at[None, :] <= positions + 1)",
        PREFILL,
    ),
    Bug("a read past the end", "attention", "inside = (at < end)[:, None]", "inside = (at < end + 1)[:, None]", SINGLE),
    Bug(
        "last tile skipped",
        "attention",
        "tl.range(start, end, BLOCK_KEYS",
        "tl.range(start, end - 1, BLOCK_KEYS",
        SINGLE,
    ),
    Bug("last chunk skipped", "attention", "for c in range(chunks):", "for c in range(chunks - 1):", SINGLE),
    Bug("swapped key head", "attention", "head // (H // KVH)", "head % KVH", PREFILL),
    Bug("unscaled chunk", "attention", "keep, l_chunk * take)", "keep, l_chunk)", PREFILL),
    Bug("table row of another", "attention", "sequence.to(tl.int64) * table_width\n    part", "0\n    part", SINGLE),
    Bug("no worker merges", "attention", "== active - 1", "== active", SINGLE),
    Bug("semaphore not reset", "attention", "tl.store(semaphore, 0)", "pass", SINGLE),
    Bug("other chunks in prefill", "attention", "range(0, end, CHUNK)", "range(0, end, CHUNK * 2)", CUTS),
    Bug("rows counted from a cut", "attention", "positions = tile", "positions = first % BLOCK_M + tile", CUTS),
    Bug("k read past its end", "matmul", "inside = k + offs_k < K", "inside = k + offs_k < K + 1", LINEAR),
    Bug("rows past M read", "matmul", "live = offs_m[:, None] < M", "live = offs_m[:, None] <= M", LINEAR),
    Bug("column edge", "matmul", "(offs_n[None, :] < N)", "(offs_n[None, :] < N - 1)", LINEAR),
    Bug(
        "a split left out",
        "matmul",
        "static_range(SPLIT)",
        "static_range(SPLIT - 1)",
        ("test_matmul_kernel.py", "split"),
    ),
    Bug(
        "another order of summation for a few rows",
        "matmul",
        'acc = tl.dot(x, weight.T, acc, input_precision="ieee")',
        "acc = (acc + tl.dot(x, weight.T)) if FEW else tl.dot(x, weight.T, acc)",
        BITS,
    ),
    Bug("descriptor: row and column swapped", "matmul", "store([row, column]", "store([column, row]", COPIES),
    Bug("descriptor: always the first k", "matmul", "x_desc.load([row, k])", "x_desc.load([row, 0])", COPIES),
    Bug(
        "descriptor: another order of summation",
        "matmul",
        "acc = tl.dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc,",
        "acc += tl.dot(x_desc.load([row, k]), weight_desc.load([column, k]).T,",
        COPIES,
    ),
    Bug("bands of tiles overlap", "matmul", "program // band * GROUP", "program // band", WIDE),
    Bug("missing residual", "rms_norm", "x.to(tl.float32) + residual.to(tl.float32)", "x.to(tl.float32)", ROWS),
    Bug("mean over the padding", "rms_norm", "0) / D + eps", "0) / BLOCK_D + eps", ROWS),
    Bug("no eps", "rms_norm", "/ D + eps)", "/ D)", ("test_row_kernels.py", "eps")),
    Bug("sine's sign", "rope_cache", "(a * cos - b * sin)", "(a * cos + b * sin)", ROWS),
    Bug("v rotated too", "rope_cache", "rotated = head < H + KVH", "rotated = head < H + 2 * KVH", ROWS),
    Bug("k head off by one", "rope_cache", "(head - H) * D", "(head - H + 1) * D", ROWS),
    Bug(
        "padding written",
        "rope_cache",
        "(head >= H + KVH) & (kv_index >= 0)",
        "(head >= H + KVH)",
        ("test_row_kernels.py", "padding"),
    ),
    Bug("gate and up swapped", "swiglu", "gate / (1.0 + tl.exp(-gate)) * up", "up / (1.0 + tl.exp(-up)) * gate", ROWS),
    Bug("row edge", "swiglu", "inside = offs < FFN", "inside = offs < FFN + 1", ROWS),
    Bug(
        "highest id among equals",
        "sample",
        "token = tl.min(tl.where(x == best, ids, BLOCK), 0)",
        "token = tl.max(tl.where(x == best, ids, 0), 0)",
        EDGES,
    ),
    Bug("NaN goes unseen", "sample", "(tl.sum((x != x).to(tl.int32), 0) > 0) | ", "", EDGES),
    Bug(
        "top_k keeps one more",
        "sample",
        "threshold(bits, 1.0, top_k.to(tl.float32))",
        "threshold(bits, 1.0, top_k.to(tl.float32) + 1)",
        SAMPLE,
    ),
    Bug("top_p over the whole row", "sample", "top_p * kept", "top_p * tl.sum(prob, 0)", SAMPLE),
    Bug(
        "ties at the border dropped",
        "sample",
        "prob = tl.where(bits >= tl.minimum",
        "prob = tl.where(bits > tl.minimum",
        EDGES,
    ),
    Bug("a token before the filtered ones", "sample", "0.0), 0) <= goal", "0.0), 0) < goal", SAMPLE),
    Bug("random past the total", "sample", "goal = tl.minimum(u * total, below_total)", "goal = total", SAMPLE),
    Bug("position's high half", "sample", "(position >> 32)", "(position >> 31)", ("test_sample_kernels.py", "philox")),
    Bug(
        "logprob of a neighbour",
        "sample",
        "x = tl.where(ids == top_id",
        "x = tl.where(ids == top_id + 1",
        ("test_sample_kernels.py", "logprobs"),
    ),
    Bug(
        "penalty's direction",
        "sample",
        "x / repetition, x * repetition",
        "x * repetition, x / repetition",
        ("test_sample_kernels.py", "penalties"),
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.what for bug in BUGS])
def test_a_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    for folder in ("kernels", "llama", "tests/interpret"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for file in ("tests/conftest.py", "tests/kernel_cases.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    place = tmp_path / "kernels" / f"{bug.file}.py"
    source = place.read_text()
    assert source.count(bug.right) == 1, "the kernel has changed: plant the bug anew"
    place.write_text(source.replace(bug.right, bug.wrong))
    file, expression = bug.tests
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/interpret/{file}",
        "-k",
        expression,
    ]
    child = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.returncode == pytest.ExitCode.TESTS_FAILED, f"nothing noticed: {bug.what}\n{child.stdout[-3000:]}"
    assert "AssertionError" in child.stdout or "assert " in child.stdout, child.stdout[-3000:]
