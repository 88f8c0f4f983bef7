"""Paged attention: right for any mix of pieces, and the same bits for a row in any company and any cutting."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, Paged, check, normal

from kernels import attention, reference, triton_ops
from kernels.attention_plan import TritonPlan

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]

BF16 = torch.bfloat16


def attend(q: torch.Tensor, cache: Paged, plan: TritonPlan, workers: int | None = None) -> torch.Tensor:
    """The kernels' result in fp32: rounding to 16 bits would hide most differences."""
    out = torch.empty(tuple(q.shape), dtype=torch.float32)
    attention.launch_attention(q, cache.k, cache.v, plan, q.shape[2] ** -0.5, out, workers)
    return out


def check_attention(cache: Paged, q: torch.Tensor, n_queries: list[int], forgiven: float = 2.0**-23) -> None:
    scale = q.shape[2] ** -0.5
    plan = cache.plan(n_queries)
    out = triton_ops.paged_attention(q, cache.k, cache.v, plan, scale)
    twin = reference.paged_attention(q, cache.k, cache.v, plan, scale)
    check(out, twin, cache.exact(q, n_queries, scale), forgiven)
    assert not plan.semaphores.any()


# group 1 to 8; head_dim 8 and 48 (padded inside), 16, 64 and 128; blocks smaller and larger than a key tile
SHAPES = [(16, 2, 4, 128), (64, 2, 1, 64), (128, 1, 8, 128), (32, 2, 2, 16), (16, 4, 2, 8), (48, 1, 3, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size, n_kv_heads, group, head_dim", SHAPES)
def test_single_tokens(block_size: int, n_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [300, 1, 63, 64, 65, 257]
    cache = Paged.of(lengths, n_kv_heads, head_dim, block_size, dtype)
    check_attention(cache, normal(len(lengths), n_kv_heads * group, head_dim, dtype=dtype), [1] * len(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size, n_kv_heads, group, head_dim", SHAPES)
def test_prefill(block_size: int, n_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths, n_queries = [150, 64, 33, 290], [150, 10, 2, 34]
    cache = Paged.of(lengths, n_kv_heads, head_dim, block_size, dtype)
    check_attention(cache, normal(sum(n_queries), n_kv_heads * group, head_dim, dtype=dtype), n_queries)


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_tokens_among_pieces(dtype: torch.dtype) -> None:
    lengths, n_queries = [130, 129, 70, 600], [1, 129, 3, 1]
    cache = Paged.of(lengths, 2, 64, 64, dtype)
    check_attention(cache, normal(sum(n_queries), 4, 64, dtype=dtype), n_queries)


def test_large_scores_and_chunks_of_very_different_weight() -> None:
    """exp2 of such scores is as inexact as the scores' own rounding makes it."""
    cache = Paged.of([700, 260], 1, 64, 64, torch.float32)
    check_attention(cache, normal(2, 4, 64) * 30, [1, 1], forgiven=2.0**-21)
    check_attention(cache, normal(302, 4, 64) * 30, [300, 2], forgiven=2.0**-21)


@pytest.mark.parametrize("n_kv_heads", [1, 10])  # chunks of 256 and of 512 keys
def test_bits_of_single_tokens_depend_neither_on_workers_nor_on_company(n_kv_heads: int) -> None:
    lengths = [700, 37, 1100]
    cache = Paged.of(lengths, n_kv_heads, 16, 64, BF16)
    q = normal(3, n_kv_heads * 2, 16, dtype=BF16)
    plan = cache.plan([1, 1, 1])
    many = attend(q, cache, plan, workers=6)
    for workers in (1, 2, 4):
        assert torch.equal(attend(q, cache, plan, workers), many), workers
    assert not plan.semaphores.any()
    for s in range(3):
        alone = cache.only(s)
        assert torch.equal(attend(q[s : s + 1], alone, alone.plan([1]))[0], many[s])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_bits_of_a_prompt_do_not_depend_on_how_it_was_cut(dtype: torch.dtype) -> None:
    """Single tokens are pieces too, so a cache block has the same bits whether its tokens were read or generated."""
    n = 330
    cache = Paged.of([n], 1, 64, 64, dtype)
    q = normal(n, 2, 64, dtype=dtype)
    whole = attend(q, cache, cache.plan([n]))
    for cuts in ([128, 256, n], [1, 70, n], [200, 201, 257, n - 1, n]):
        ends = zip([0, *cuts[:-1]], cuts, strict=True)
        pieces = [attend(q[a:b], cache, cache.plan([b - a], at=[b])) for a, b in ends]
        assert torch.equal(torch.cat(pieces), whole), cuts
    for row in (0, 63, 64, 127, 255, 256, 257):
        single = attend(q[row : row + 1], cache, cache.plan([1], at=[row + 1]))
        assert torch.equal(single[0], whole[row]), row


def test_bits_of_a_piece_do_not_depend_on_its_company() -> None:
    lengths, n_queries = [150, 64, 33], [150, 10, 1]
    cache = Paged.of(lengths, 2, 16, 16, BF16)
    q = normal(sum(n_queries), 4, 16, dtype=BF16)
    together = attend(q, cache, cache.plan(n_queries)).split(n_queries)
    for s, part in enumerate(q.split(n_queries)):
        alone = cache.only(s)
        assert torch.equal(attend(part, alone, alone.plan([n_queries[s]])), together[s])


def test_padding_rows_of_a_captured_graph_touch_nothing() -> None:
    cache = Paged.of([70, 1], 1, 16, 16, BF16)
    q = normal(2, 2, 16, dtype=BF16)
    out = attend(q, cache, cache.plan([1, 1], at=[70, 0]))
    assert not out[0].isnan().any() and out[1].isnan().all()
