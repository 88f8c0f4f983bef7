"""The operations tuned for CPUs beside the textbook: odd shapes, block edges, poisoned caches, and their equal bits."""

from __future__ import annotations

import inspect

import pytest
import torch
from kernel_cases import DTYPES, FILTERS, Paged, check, guarded, normal
from torch import Tensor

import kernels
from kernels import Filters, reference
from kernels.cpu import ops
from kernels.cpu.attention_plan import plan_cpu
from kernels.launch import HAS_TRITON
from kernels.linear_weight import LinearWeight

if HAS_TRITON:
    from kernels import triton_ops

CPU = torch.device("cpu")
FP32 = torch.float32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ops.__all__)
def test_an_operation_has_one_signature(name: str) -> None:
    modules = [kernels, reference, ops, *([triton_ops] if HAS_TRITON else [])]
    assert len({str(inspect.signature(getattr(module, name))) for module in modules}) == 1


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_card_has_the_same_operations() -> None:
    assert triton_ops.__all__ == ops.__all__


# ---- rows ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, dim", [(1, 64), (3, 200), (5, 173), (2, 4096)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype)
    residual = normal(rows, dim, dtype=dtype) if with_residual else None
    out, summed = ops.rms_norm(x, weight, 1e-5, residual)
    twin, twin_summed = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(summed, twin_summed)
    wide = summed.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    check(out, twin, exact, forgiven=max(2.0**-23, torch.finfo(dtype).eps / 8))  # rounded before the weight, too


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, ffn", [(1, 172), (3, 353), (2, 1500)])
def test_swiglu(rows: int, ffn: int, dtype: torch.dtype, batch_invariant: bool) -> None:
    gate_up = normal(rows, 2 * ffn, dtype=dtype)
    gate_up[0, :3] = torch.tensor([-80.0, 90.0, 0.0])
    gate, up = gate_up.double().chunk(2, -1)
    out = ops.swiglu(gate_up, batch_invariant=batch_invariant)
    check(out, reference.swiglu(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
@pytest.mark.parametrize("n, k", [(361, 353), (1024, 520)])  # row-major, and in oneDNN's layout
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype, batch_invariant: bool) -> None:
    x, plain = normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype)
    weight = kernels.pack_weight(plain)
    out = ops.linear(x, weight, batch_invariant=batch_invariant)
    twin = reference.linear(x, LinearWeight(plain, n, k, False))
    check(out, twin, x.double() @ plain.double().T, forgiven=2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_rows_have_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    rows, dim = 37, 353
    x, residual, norm = normal(rows, dim, dtype=dtype), normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype)
    gate_up, weight = normal(rows, 2 * dim, dtype=dtype), kernels.pack_weight(normal(1024, dim, dtype=dtype))

    def outputs(first: int, end: int) -> list[Tensor]:
        part = slice(first, end)
        return [
            *ops.rms_norm(x[part], norm, 1e-5, residual[part], batch_invariant=True),
            ops.swiglu(gate_up[part], batch_invariant=True),
            ops.linear(x[part], weight, batch_invariant=True),
        ]

    together = outputs(0, rows)
    for first, end in ((0, 1), (5, 8), (13, 30), (36, 37)):
        for out, whole in zip(outputs(first, end), together, strict=True):
            assert torch.equal(out, whole[first:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(4, 4, 16), (8, 2, 8), (6, 6, 48), (8, 1, 128)])
def test_rope_write(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Into an fp32 cache, as the engine has it on the CPU."""
    qkv = normal(3, (n_heads + 2 * n_kv_heads) * head_dim, dtype=dtype)
    cos_sin = guarded(reference.rope_table(head_dim, 40, 10000.0, 1.0, CPU))
    positions, kv_index = torch.tensor([0, 5, 39]), torch.tensor([7, 47, 20])
    k, v, twin_k, twin_v = (torch.full((3, 16, n_kv_heads, head_dim), float("nan")) for _ in range(4))
    q = ops.rope_write(qkv, cos_sin, positions, kv_index, k, v, n_heads)
    twin = reference.rope_write(qkv, cos_sin, positions, kv_index, twin_k, twin_v, n_heads)
    torch.testing.assert_close(q, twin, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(k, twin_k, atol=2e-6, rtol=2e-6, equal_nan=True)
    assert torch.equal(v.nan_to_num(77.0), twin_v.nan_to_num(77.0))


# ---- attention ----

EDGES = [1, 15, 16, 17, 63, 64, 65, 130]  # of blocks of 16, and of key tiles of 64


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("n_kv_heads, group, head_dim", [(3, 1, 16), (2, 4, 8), (1, 8, 24)])
@pytest.mark.parametrize(
    "n_queries",
    [[1] * 8, [1, 15, 3, 17, 1, 64, 65, 100], [1, 1, 16, 1, 40, 1, 1, 1]],
    ids=["decode", "prefill", "mixed"],
)
def test_paged_attention(
    n_queries: list[int], n_kv_heads: int, group: int, head_dim: int, batch_invariant: bool
) -> None:
    cache = Paged.of(EDGES, n_kv_heads, head_dim, 16, FP32, zero_blocks=1)
    q, scale = normal(sum(n_queries), n_kv_heads * group, head_dim), head_dim**-0.5
    plan = plan_cpu(*cache.layout(n_queries), 16)
    out = ops.paged_attention(q, cache.k, cache.v, plan, scale, batch_invariant=batch_invariant)
    twin = reference.paged_attention(q, cache.k, cache.v, plan, scale)
    check(out, twin, cache.exact(q, n_queries, scale), forgiven=2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_16_bits(dtype: torch.dtype) -> None:
    cache = Paged.of(EDGES, 2, 16, 16, dtype, zero_blocks=1)
    q, n_queries = normal(8, 4, 16, dtype=dtype), [1] * 8
    plan = plan_cpu(*cache.layout(n_queries), 16)
    twin = reference.paged_attention(q, cache.k, cache.v, plan, 0.25)
    for batch_invariant in (False, True):
        out = ops.paged_attention(q, cache.k, cache.v, plan, 0.25, batch_invariant=batch_invariant)
        check(out, twin, cache.exact(q, n_queries, 0.25))


def test_bits_of_attention_depend_on_a_rows_own_tokens_only() -> None:
    """Not on its company, nor on where its prompt was cut."""
    cache = Paged.of(EDGES, 2, 16, 16, FP32, zero_blocks=1)
    q, n_queries = normal(sum(EDGES), 4, 16), EDGES
    whole = attend_invariant(q, cache, n_queries, None).split(n_queries)
    for s, part in enumerate(q.split(n_queries)):
        alone = cache.only(s)
        assert torch.equal(attend_invariant(part, alone, [len(part)], None), whole[s])
        ends = [end for end in (1, 2, 16, 20, 64, 100) if end < len(part)] + [len(part)]
        cuts = zip([0, *ends[:-1]], ends, strict=True)
        pieces = [attend_invariant(part[a:b], alone, [b - a], [b]) for a, b in cuts]
        assert torch.equal(torch.cat(pieces), whole[s])


def attend_invariant(q: Tensor, cache: Paged, n_queries: list[int], at: list[int] | None) -> Tensor:
    plan = plan_cpu(*cache.layout(n_queries, at), 16)
    return ops.paged_attention(q, cache.k, cache.v, plan, 0.25, batch_invariant=True)


def test_a_plan_for_a_card_is_refused() -> None:
    cache = Paged.of([5], 1, 8, 16, FP32)
    with pytest.raises(ValueError, match="plan: made for a CUDA kernel, but the tensors are on the CPU"):
        kernels.paged_attention(torch.zeros(1, 1, 8), cache.k, cache.v, cache.plan([1]), 1.0)


# ---- sampling ----


@pytest.mark.parametrize("vocab", [50, 256, 257, 3000])  # fewer and more tokens than the top filters look at first
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_sample(vocab: int, settings: dict[str, float]) -> None:
    logits = torch.randn(40, vocab) * 2
    logits[3, 7], logits[4, 7], logits[5] = float("nan"), float("inf"), -float("inf")
    logits[8:12, 5] = logits[8:12, 30] = 20.0  # equals, among greedy rows and others
    filters = Filters.alike(40, CPU, **settings)  # type: ignore[arg-type]
    filters.temperature[::4] = 0.0
    u = torch.rand(40)
    tokens = ops.sample(logits, filters, u)
    assert torch.equal(tokens, reference.sample(logits, filters, u))
    assert tokens[3:6].tolist() == [-1, -1, -1] and tokens[8] == 5
    for row in range(40):
        one_row = slice(row, row + 1)
        assert ops.sample(logits[one_row], Filters(*(t[one_row] for t in filters)), u[one_row])[0] == tokens[row]


@pytest.mark.parametrize("n_top", [0, 1, 20])
@pytest.mark.parametrize("vocab", [7, 361, 4096])
def test_token_logprobs(vocab: int, n_top: int) -> None:
    logits = torch.randn(5, vocab) * 3
    logits[1, [6, 2, 4]] = 20.0
    logits[2, 3:] = -float("inf")  # fewer tokens than n_top
    logits[3] = 1.0  # all equal, more than are looked at first
    ids = torch.tensor([0, 6, 2, 5, -1])
    found = ops.token_logprobs(logits, ids, n_top)
    assert all(map(torch.equal, found, reference.token_logprobs(logits, ids, n_top)))
