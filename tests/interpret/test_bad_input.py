"""What a kernel cannot do is refused before any launch, with the argument, what it should be and what it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import kernels
from kernels import Filters
from kernels.cpu.attention_plan import plan_cpu
from kernels.linear_weight import LinearWeight

pytestmark = pytest.mark.interpret

X, W = torch.zeros(4, 64), torch.ones(64)
CPU = torch.device("cpu")
CACHE = torch.zeros(3, 16, 2, 16)
ROPE = kernels.rope_table(16, 32, 10000.0, 1.0, CPU)
QKV, INDEX = torch.zeros(4, 8 * 16), torch.zeros(4, dtype=torch.int64)
Q = torch.zeros(2, 4, 16)
LAYOUT = np.array([0, 1, 2], np.int32), np.array([5, 9], np.int32), np.zeros((2, 1), np.int32)
PLAN = kernels.plan_attention(*LAYOUT, 16, CPU)
ROW = torch.zeros(4)
FILTERS = Filters.alike(4, CPU)
LOGITS = torch.zeros(4, 100)

CALLS: dict[str, Callable[[], object]] = {
    "weight: expected shape [64], got [63]": lambda: kernels.rms_norm(X, W[:63], 1e-5),
    "x: expected shape [any, any], got [64]": lambda: kernels.rms_norm(W, W, 1e-5),
    "x: expected dtype": lambda: kernels.rms_norm(X.double(), W.double(), 1e-5),
    "weight: expected dtype torch.float32, got torch.bfloat16": lambda: kernels.rms_norm(X, W.bfloat16(), 1e-5),
    "residual: expected shape [4, 64], got [3, 64]": lambda: kernels.rms_norm(X, W, 1e-5, X[:3]),
    "x: expected a contiguous tensor, got strides [1, 4]": lambda: kernels.rms_norm(torch.zeros(64, 4).T, W, 1e-5),
    "weight: expected device cpu, got meta": lambda: kernels.rms_norm(X, W.to("meta"), 1e-5),
    "x: expected shape [any, 32], got [4, 64]": lambda: kernels.linear(X, kernels.pack_weight(torch.zeros(8, 32))),
    "weight: expected dtype torch.float32": lambda: kernels.linear(X, kernels.pack_weight(torch.zeros(8, 64).half())),
    "weight: expected one that pack_weight made": lambda: kernels.linear(
        X, LinearWeight(torch.zeros(8, 64), 8, 64, False)
    ),
    "gate_up: expected an even number of columns": lambda: kernels.swiglu(torch.zeros(2, 7)),
    "qkv: expected shape [any, 128]": lambda: kernels.rope_write(X, ROPE, INDEX, INDEX, CACHE, CACHE, 4),
    "kv_index: expected dtype torch.int64": lambda: kernels.rope_write(QKV, ROPE, INDEX, INDEX.int(), CACHE, CACHE, 4),
    "positions: expected shape [4], got [3]": lambda: kernels.rope_write(QKV, ROPE, INDEX[:3], INDEX, CACHE, CACHE, 4),
    "v_cache: expected shape": lambda: kernels.rope_write(QKV, ROPE, INDEX, INDEX, CACHE, CACHE[:2], 4),
    "cos_sin: expected shape [any, 16], got [32, 8]": lambda: kernels.rope_write(
        QKV, ROPE[:, :8].contiguous(), INDEX, INDEX, CACHE, CACHE, 4
    ),
    "q: expected a multiple of the cache's 2 heads, got 3": lambda: kernels.paged_attention(
        Q[:, :3].contiguous(), CACHE, CACHE, PLAN, 0.25
    ),
    "k_cache: expected shape [any, any, any, 8]": lambda: kernels.paged_attention(
        torch.zeros(2, 4, 8), CACHE, CACHE, PLAN, 0.25
    ),
    "q: expected shape [2, any, any], got [1, 4, 16]": lambda: kernels.paged_attention(Q[:1], CACHE, CACHE, PLAN, 0.25),
    "plan.block_tables: expected blocks for 9 keys, got 1 blocks of 8": lambda: kernels.paged_attention(
        Q, CACHE[:, :8].contiguous(), CACHE[:, :8].contiguous(), PLAN, 0.25
    ),
    "plan.block_tables: expected blocks below 0, got 0": lambda: kernels.paged_attention(
        Q, CACHE[:0], CACHE[:0], PLAN, 0.25
    ),
    "plan: expected one made for Triton kernels on cpu": lambda: kernels.paged_attention(
        Q, CACHE, CACHE, plan_cpu(*LAYOUT, 16), 0.25
    ),
    "top_k: expected dtype torch.int64": lambda: kernels.sample(LOGITS, FILTERS._replace(top_k=ROW), ROW),
    "min_p: expected shape [4], got [3]": lambda: kernels.sample(LOGITS, FILTERS._replace(min_p=ROW[:3]), ROW),
    "logits: expected dtype torch.float32": lambda: kernels.sample(LOGITS.half(), FILTERS, ROW),
    "n_top: expected 0 to 100, got 101": lambda: kernels.token_logprobs(LOGITS, INDEX, 101),
    "positions: expected shape [4], got [1]": lambda: kernels.uniform(INDEX, INDEX[:1]),
    "bias: expected shape [4], got [2]": lambda: kernels.apply_penalties(LOGITS, INDEX, INDEX, ROW[:2], ROW, ROW),
}


@pytest.mark.parametrize("message", CALLS)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        CALLS[message]()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "starts, lengths, tables, named",
    [
        ([1, 2], [5], [[1]], "cu_seqlens_q"),
        ([0, 1, 1], [5, 5], [[1], [2]], "cu_seqlens_q"),
        ([0, 1], [5, 5], [[1], [2]], "cu_seqlens_q"),
        ([0, 1, 4], [5, 2], [[1], [2]], r"seqlens_k\[1\]: expected at least its 3 queries, got 2"),
        ([0, 1], [17], [[1]], r"block_tables: expected shape \[1, >= 2\], got \[1, 1\]"),
        ([0, 1], [16], [[1], [2]], "block_tables: expected shape"),
        ([0, 1], [17], [[1, -1]], "block_tables: expected blocks from 0 on, got -1"),
    ],
)
def test_a_plan_whose_rows_lie_nowhere(
    starts: list[int], lengths: list[int], tables: list[list[int]], named: str
) -> None:
    arrays = (np.array(part, np.int32) for part in (starts, lengths, tables))
    with pytest.raises(ValueError, match=named):
        kernels.plan_attention(*arrays, 16, torch.device("cpu"))
