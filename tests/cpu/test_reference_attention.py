"""The CPU's paged attention beside the formula, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import AttentionPlan, paged_attention, plan_attention

BLOCK, N_HEADS, N_KV_HEADS, HEAD_DIM = 16, 4, 2, 8


def formula(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The queries are the last positions of one sequence."""
    n, n_keys, group = len(q), len(keys), N_HEADS // N_KV_HEADS
    keys, values = (c.double().repeat_interleave(group, 1) for c in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * HEAD_DIM**-0.5
    hidden = torch.arange(n_keys)[None, :] > torch.arange(n_keys - n, n_keys)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("side_by_side", [True, False])
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
def test_prompts_in_parts(queries_keys: list[tuple[int, int]], side_by_side: bool) -> None:
    check(queries_keys, side_by_side)


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
    monkeypatch.setattr("kernels.attention_plan._GATHER_BYTES", gathered)
    monkeypatch.setattr("kernels.attention_plan._PART_BYTES", part)
    plan = check(queries_keys, side_by_side=False)
    assert plan.cpu is not None
    work = plan.cpu.work(N_KV_HEADS, 4 * N_KV_HEADS * HEAD_DIM)
    assert (len(work.gathers), len(work.spans)) == (n_gathers, n_alone)


def check(queries_keys: list[tuple[int, int]], side_by_side: bool) -> AttentionPlan:
    """Sequences of so many queries and keys, in one call, beside the formula. Returns the call's plan."""
    dice = np.random.default_rng(5)
    torch.manual_seed(5)
    widths = [-(-n_keys // BLOCK) for _, n_keys in queries_keys]
    n_blocks = 1 + sum(widths)
    order = np.arange(1, n_blocks) if side_by_side else dice.permutation(np.arange(1, n_blocks))
    tables = np.zeros((len(widths), max(widths)), np.int32)
    for i, width in enumerate(widths):
        tables[i, :width], order = order[:width], order[width:]
    k_cache, v_cache = (torch.randn(n_blocks, BLOCK, N_KV_HEADS, HEAD_DIM) for _ in range(2))
    starts = np.cumsum([0] + [n for n, _ in queries_keys], dtype=np.int32)
    lengths = np.array([n_keys for _, n_keys in queries_keys], np.int32)
    q = torch.randn(int(starts[-1]), N_HEADS, HEAD_DIM)
    plan = plan_attention(starts, lengths, tables, BLOCK, torch.device("cpu"))
    made = paged_attention(q, k_cache, v_cache, plan, HEAD_DIM**-0.5)
    for i, (n, n_keys) in enumerate(queries_keys):
        keys, values = (c[tables[i, : widths[i]]].flatten(0, 1)[:n_keys] for c in (k_cache, v_cache))
        rows = slice(int(starts[i]), int(starts[i]) + n)
        torch.testing.assert_close(made[rows].double(), formula(q[rows], keys, values), atol=2e-5, rtol=0)
    return plan
