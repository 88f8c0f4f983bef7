"""How the CPU's attention divides a step: prompts in parts, decoding sequences gathered; beside the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Paged

from kernels.cpu import ops
from kernels.cpu.attention_plan import CpuPlan, plan_cpu

BLOCK, N_HEADS, N_KV_HEADS, HEAD_DIM = 16, 4, 2, 8


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "queries_keys",
    [
        [(1, 1)],
        [(129, 129)],  # one query more than goes in one part
        [(300, 300), (1, 40), (128, 512)],
        [(200, 512)],
        [(200, 513)],  # behind what is cut in parts
        [(5, 9), (257, 400), (1, 1)],
    ],
)
def test_prompts_in_parts(queries_keys: list[tuple[int, int]], shuffled: bool) -> None:
    check(queries_keys, shuffled)


DECODING = [(1, 30), (1, 2), (1, 17)]
BESIDE = [(1, 64), (40, 60), (1, 1), (1, 33), (1, 300), (3, 3), (1, 16), (1, 90)]
MANY = [(1, n) for n in range(1, 20)]


@pytest.mark.parametrize(
    "queries_keys, gathered, part, n_gathers, n_alone",
    [
        (DECODING, 0, 1 << 20, 0, 3),
        (DECODING, 1 << 14, 1 << 20, 1, 0),
        (BESIDE, 0, 1 << 20, 0, 8),
        (BESIDE, 1 << 14, 1 << 20, 1, 4),  # the prompts, and what is too long
        (BESIDE, 1 << 20, 1 << 20, 1, 2),
        (BESIDE, 1 << 20, 1 << 13, 2, 3),  # 90 and 64 keys; 33, 16 and 1; 300 beside the prompts
        (MANY, 1 << 12, 1 << 20, 4, 3),
        (MANY, 1 << 14, 1 << 20, 2, 0),
        (MANY, 1 << 20, 1 << 20, 1, 0),
        (MANY, 1 << 20, 1 << 9, 4, 0),
    ],
)
def test_decoding_sequences(
    queries_keys: list[tuple[int, int]],
    gathered: int,
    part: int,
    n_gathers: int,
    n_alone: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone and beside prompts, in parts of so many bytes of keys and of like length, some too long to be gathered."""
    monkeypatch.setattr("kernels.cpu.attention_plan._GATHER_BYTES", gathered)
    monkeypatch.setattr("kernels.cpu.attention_plan._PART_BYTES", part)
    plan = check(queries_keys, shuffled=True)
    work = plan.work(N_KV_HEADS, 4 * N_KV_HEADS * HEAD_DIM)
    assert (len(work.gathers), len(work.spans)) == (n_gathers, n_alone)


def check(queries_keys: list[tuple[int, int]], shuffled: bool) -> CpuPlan:
    """Sequences of so many queries and keys, in one call, beside the formula. Returns the call's plan."""
    torch.manual_seed(5)
    n_queries = [n for n, _ in queries_keys]
    cache = Paged.of(
        [n for _, n in queries_keys], N_KV_HEADS, HEAD_DIM, BLOCK, torch.float32, zero_blocks=1, shuffled=shuffled
    )
    q = torch.randn(sum(n_queries), N_HEADS, HEAD_DIM)
    plan, scale = plan_cpu(*cache.layout(n_queries), BLOCK), HEAD_DIM**-0.5
    out = ops.paged_attention(q, cache.k, cache.v, plan, scale)
    torch.testing.assert_close(out.double(), cache.exact(q, n_queries, scale), atol=2e-5, rtol=0)
    return plan
