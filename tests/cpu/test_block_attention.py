"""Attention block by block, uncompiled: the textbook's sums, whatever the shapes and the lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Paged
from torch import Tensor

from kernels.cpu.attention_plan import CpuPlan, plan_cpu
from kernels.cpu.block_attention import attend_blocks
from kernels.reference import paged_attention

Spans = list[tuple[int, int]]  # queries and keys of each sequence
spans = st.lists(
    st.integers(1, 40).flatmap(lambda keys: st.tuples(st.integers(1, min(keys, 7)), st.just(keys))),
    min_size=1,
    max_size=5,
)


def layout(sequences: Spans, size: int, n_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, CpuPlan]:
    """Shuffled blocks; NaN wherever no sequence has a key, but in block 0, which is zero."""
    cache = Paged.of([keys for _, keys in sequences], n_kv_heads, head_dim, size, torch.float32, zero_blocks=1)
    return cache.k, cache.v, plan_cpu(*cache.layout([queries for queries, _ in sequences]), size)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, plan: CpuPlan) -> Tensor:
    return attend_blocks(q * q.shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1), plan.blocks)[0]


@pytest.mark.parametrize("n_kv_heads, group", [(1, 1), (2, 3), (4, 2), (12, 1), (16, 1)])
@pytest.mark.parametrize("head_dim", [4, 24, 64])
@settings(max_examples=15, deadline=None)
@given(sequences=spans, size=st.sampled_from([1, 3, 16, 64]))
def test_it_is_paged_attention(n_kv_heads: int, group: int, head_dim: int, sequences: Spans, size: int) -> None:
    torch.manual_seed(1)
    k, v, plan = layout(sequences, size, n_kv_heads, head_dim)
    q = torch.randn(sum(queries for queries, _ in sequences), n_kv_heads * group, head_dim)
    expected = paged_attention(q, k, v, plan, head_dim**-0.5)
    torch.testing.assert_close(by_blocks(q, k, v, plan), expected, atol=1e-5, rtol=0)


def test_large_scores() -> None:
    """exp of any of them would be infinite or 0; only differences from the largest may be taken."""
    k, v, plan = layout([(1, 40), (3, 20)], 16, 2, 16)
    k *= 1000
    q = torch.randn(4, 2, 16)
    torch.testing.assert_close(by_blocks(q, k, v, plan), paged_attention(q, k, v, plan, 0.25))


def test_nan_stays_with_its_query() -> None:
    """Even the first query's, which owns the padding block."""
    k, v, plan = layout([(1, 40), (3, 20), (1, 5)], 16, 2, 16)
    q = torch.randn(5, 2, 16)
    expected = by_blocks(q, k, v, plan)
    q[0], q[2] = float("nan"), float("nan")
    found = by_blocks(q, k, v, plan)
    assert found[[0, 2]].isnan().all()
    assert torch.equal(found[[1, 3, 4]], expected[[1, 3, 4]])
