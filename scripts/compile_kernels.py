"""Compile every kernel launch of Llama-2 7B, 13B and 70B for A100, H100/H200 and B200, without a GPU.

python scripts/compile_kernels.py             print the table of registers, shared memory and instructions
python scripts/compile_kernels.py --write     and keep it in benchmarks/, where a change of it shows in review
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import triton

import kernels
from benchmarks.inspect_sass import Launch, Report, capture, inspect_all
from llama.batch import Batch
from llama.cache import KVCache
from llama.config import ModelConfig
from llama.model import Transformer, parameter_shapes

ARCHS = (80, 90, 100)
MODELS = ("7B", "13B", "70B")
DECODE_ROWS = (1, 8, 30, 64)
PREFILL_ROWS = (128, 2048)
META = torch.device("meta")


def step(model: Transformer, n_queries: list[int], max_len: int) -> None:
    """One step of sequences with so many new tokens each, as the engine runs it, and the sampling after it."""
    rows, n_seqs, block_size = sum(n_queries), len(n_queries), 64
    starts = np.concatenate(([0], np.cumsum(n_queries))).astype(np.int32)
    lengths, tables = np.full(n_seqs, max_len, np.int32), np.zeros((n_seqs, max_len // block_size), np.int32)
    attention = kernels.plan_attention(starts, lengths, tables, block_size, META)
    ids = torch.empty(rows, dtype=torch.int64, device=META)
    batch = Batch(ids, ids, ids, attention, torch.empty(n_seqs, dtype=torch.int64, device=META))
    cache = KVCache.empty(model.config, 1024, block_size, torch.bfloat16, META)
    logits = model.logits(model.forward(batch, cache))
    column, chosen = torch.empty(n_seqs, device=META), torch.empty(n_seqs, dtype=torch.int64, device=META)
    kernels.apply_penalties(logits, chosen, chosen, column, column, column)
    tokens = kernels.sample(logits, kernels.Filters.alike(n_seqs, META), kernels.uniform(chosen, chosen))
    kernels.token_logprobs(logits, tokens, 5)


def launches_of(arch: int, name: str, batch_invariant: bool) -> list[Launch]:
    """Every launch of one model: single tokens, prefill, and both at once."""
    config = replace(ModelConfig.named(name), n_layers=1)
    with capture(arch) as launches:
        weights = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=META)
            for name, shape in parameter_shapes(config).items()
        }
        model = Transformer(config, weights, 4096, batch_invariant)
        for rows in DECODE_ROWS:
            step(model, [1] * rows, 4096)
        for rows in PREFILL_ROWS:
            step(model, [rows], 4096)
        step(model, [512, 1, 1], 4096)
    return launches


def all_launches(arch: int) -> list[Launch]:
    return [launch for name in MODELS for invariant in (True, False) for launch in launches_of(arch, name, invariant)]


def name_of(launch: Launch) -> str:
    """Kernel and constants, short enough for a table."""
    shown = {k: v for k, v in launch.constants.items() if k not in ("num_warps", "num_stages")}
    return f"{launch.kernel} " + " ".join(f"{key}={value}" for key, value in shown.items())


def table(launches: list[Launch], reports: dict[str, Report]) -> list[str]:
    """One line per program, sorted by name."""
    lines = {}
    for launch in launches:
        r = reports[launch.code]
        counts = " ".join(f"{name}={n}" for name, n in r.counts.items() if n)
        lines[name_of(launch)] = (
            f"| {name_of(launch)} | {launch.arch} | {r.registers} | {r.shared} | {r.warps} | {r.per_sm} "
            f"| {r.instructions} | {counts} |"
        )
    return [lines[name] for name in sorted(lines)]


HEAD = """\
# Machine code of the kernels

Every program that a step of Llama-2 7B, 13B or 70B launches, compiled without a GPU. This file is made by
`scripts/compile_kernels.py --write`, and a change of it is reviewed like code. per SM: programs that an SM holds at
once. A spill is an error unless `tests/aot` gives a reason for it.

triton {version}

| program | sm | registers | shared | warps | per SM | instructions | of these |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/")
    arguments = parser.parse_args()
    lines, programs = [], 0
    for arch in ARCHS:
        launches = all_launches(arch)
        reports = inspect_all(launches)
        lines += table(launches, reports)
        programs += len(reports)
    text = HEAD.format(version=triton.__version__) + "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        place = Path(__file__).parents[1] / "benchmarks" / f"kernels-sm-triton-{triton.__version__}.md"
        place.write_text(text)
    print(json.dumps({"command": "compile_kernels", "triton": triton.__version__, "programs": programs}))


if __name__ == "__main__":
    main()
