"""Every launch of Llama-2 7B, 13B and 70B compiles for A100, H200 and B200 into the machine code it was written for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import kernels
from benchmarks.inspect_sass import SHARED_PER_PROGRAM, Launch, Report, capture, inspect_all
from scripts.compile_kernels import ARCHS, META, all_launches, name_of, table

pytestmark = pytest.mark.aot

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Rule:
    """What the machine code of a kernel must look like.

    needs: instructions that must occur. matrix: it multiplies on the matrix units. narrow_loads, narrow_copies: at most
    so many loads and asynchronous copies of less than 16 bytes (lengths, positions, table entries); a lost alignment
    shows here. per_sm: at least so many programs fit on an SM of sm_90.
    """

    needs: tuple[str, ...]
    matrix: bool = False
    narrow_loads: int = 0
    narrow_copies: int = 0
    per_sm: int = 1


RULES = {
    "matmul_kernel": Rule(("copy128",), matrix=True),
    "matmul_tma_kernel": Rule(("tma_load", "tma_store"), matrix=True),
    "decode_kernel": Rule(("copy128", "atomic"), matrix=True, narrow_loads=6, narrow_copies=3, per_sm=3),
    "prefill_kernel": Rule(("copy128", "store128"), matrix=True, narrow_loads=5, narrow_copies=5),
    "rms_norm_kernel": Rule(("load128", "store128"), per_sm=2),
    "rope_write_kernel": Rule(("load128", "store128"), narrow_loads=2, per_sm=8),
    "swiglu_kernel": Rule(("load128", "store128"), per_sm=8),
    "sample_kernel": Rule(("load128",), narrow_loads=5),
    "token_logprobs_kernel": Rule(("load128",), narrow_loads=2),
    "apply_penalties_kernel": Rule(("load",), narrow_loads=6),
    "uniform_kernel": Rule(("load",), narrow_loads=2),
}
# Spills that stand, with the reason. On sm_100 the compiler keeps the 32 token ids of a thread beside its 32 logits in
# the 64 registers that a program of 1024 threads has; a handful of them go to the stack and stay in L1.
SPILLS = {("sample_kernel", 100): 40, ("token_logprobs_kernel", 100): 60}


@functools.cache
def programs(arch: int) -> list[tuple[Launch, Report]]:
    launches = all_launches(arch)
    reports = inspect_all(launches)
    return [(launch, reports[code]) for code, launch in {launch.code: launch for launch in launches}.items()]


def matrix_instruction(launch: Launch) -> str:
    """What a product with that many rows must become: the wide forms want 64 rows or more."""
    if launch.arch == 80 or launch.constants["BLOCK_M"] < 64:
        return "mma"
    return "wgmma" if launch.arch == 90 else "tcgen05"


def complaints(launch: Launch, report: Report) -> list[str]:
    rule, n = RULES[launch.kernel], report.counts
    needs = (*rule.needs, matrix_instruction(launch)) if rule.matrix else rule.needs
    found = [f"no {name}" for name in needs if not n[name]]
    allowed = SPILLS.get((launch.kernel, launch.arch), 0)
    if n["spill"] > allowed or (report.stack and not allowed):
        found.append(f"{n['spill']} spills, {allowed} allowed; stack {report.stack}, {report.registers} registers")
    # The tiles of sm_80 also serve every card that the table does not list, and those may have 99 KiB.
    if report.shared > (99 * 1024 if launch.arch == 80 else SHARED_PER_PROGRAM[launch.arch]):
        found.append(f"{report.shared} bytes of shared memory")
    if n["load"] - n["load128"] > rule.narrow_loads:
        found.append(f"{n['load'] - n['load128']} narrow loads, {rule.narrow_loads} allowed")
    if n["copy"] - n["copy128"] > rule.narrow_copies:
        found.append(f"{n['copy'] - n['copy128']} narrow copies, {rule.narrow_copies} allowed")
    if launch.arch == 90 and report.per_sm < rule.per_sm:
        found.append(f"{report.per_sm} programs per SM, {rule.per_sm} wanted")
    if re.search(r"kWidth = (4|8)", launch.program.asm["ttgir"]):
        found.append("k is permuted inside a dot: other groups of sixteen, other bits than the other kernels")
    return [f"{name_of(launch)} sm_{launch.arch}: {what}" for what in found]


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: int) -> None:
    wrong = [line for launch, report in programs(arch) for line in complaints(launch, report)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_committed_table_is_up_to_date(arch: int) -> None:
    """A change of registers, shared memory or instructions is to be seen in review."""
    place = Path(__file__).parents[2] / "benchmarks" / f"kernels-sm-triton-{triton.__version__}.md"
    if not place.is_file():
        pytest.skip(f"no table for triton {triton.__version__}; scripts/compile_kernels.py --write makes one")
    committed = [line for line in place.read_text().splitlines() if f" | {arch} | " in line]
    reports = {launch.code: report for launch, report in programs(arch)}
    found = table([launch for launch, _ in programs(arch)], reports)
    assert found == committed, "run scripts/compile_kernels.py --write and look at what changed"


def test_the_number_of_rows_never_compiles_anew() -> None:
    """One program per row bucket, whatever the batch: a new one while serving would stall every request."""
    x, weight = torch.empty(4096, 4096, dtype=BF16, device=META), torch.empty(4096, 4096, dtype=BF16, device=META)
    with capture(90) as launches:
        packed = kernels.pack_weight(weight)
        for rows in (*range(1, 65), 300, 384, 385, 1000, 1100, 2048, 4095):
            kernels.linear(x[:rows], packed, batch_invariant=True)
    assert len({launch.code for launch in launches}) == 6
    assert [launch.kernel for launch in launches[-3:]] == ["matmul_tma_kernel"] * 3


def test_the_batch_never_compiles_attention_anew() -> None:
    cache = torch.empty(100, 64, 8, 128, dtype=BF16, device=META)
    with capture(90) as launches:
        for n_queries, longest, width in (
            ([1], 5, 1),
            ([1] * 7, 900, 15),
            ([1] * 16, 4096, 64),
            ([33, 1, 1, 17], 111, 2),
        ):
            starts = np.concatenate(([0], np.cumsum(n_queries))).astype(np.int32)
            lengths = np.full(len(n_queries), longest, np.int32)
            tables = np.zeros((len(n_queries), width), np.int32)
            plan = kernels.plan_attention(starts, lengths, tables, 64, META)
            kernels.paged_attention(
                torch.empty(sum(n_queries), 64, 128, dtype=BF16, device=META), cache, cache, plan, 0.1
            )
    assert sorted({(launch.kernel, launch.code) for launch in launches}) == sorted(
        {launch.kernel: (launch.kernel, launch.code) for launch in launches}.values()
    )
