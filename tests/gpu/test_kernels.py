"""Every kernel on a card, at the shapes of Llama-2, against float64 and plain torch; and the equal bits it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, FILTERS, Paged, check, guards_are_nan, normal
from torch import Tensor

import kernels
from kernels import Filters, attention, reference, tiles
from kernels.attention_plan import TritonPlan
from kernels.linear_weight import LinearWeight
from kernels.matmul import launch_matmul
from kernels.tiles import MatmulTile

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
# 7B, 13B, 70B: (dim, heads, key heads, ffn)
MODELS = [(4096, 32, 32, 11008), (5120, 40, 40, 13824), (8192, 64, 8, 28672)]


def cuda_normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return normal(*shape, dtype=dtype, device="cuda")


# ---- rows ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 30, 300])
@pytest.mark.parametrize("dim", [172, 4096, 5120, 8192])
def test_rms_norm(dim: int, rows: int, dtype: torch.dtype) -> None:
    x, residual, weight = (cuda_normal(*shape, dtype=dtype) for shape in ((rows, dim), (rows, dim), (dim,)))
    out, total = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    wide = total.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    check(out, F.rms_norm(total, (dim,), weight, 1e-5), exact)
    assert torch.equal(kernels.rms_norm(x[:1], weight, 1e-5, residual[:1])[0][0], out[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn", [172, 11008, 13824, 28672])
def test_swiglu(ffn: int, dtype: torch.dtype) -> None:
    gate_up = cuda_normal(30, 2 * ffn, dtype=dtype)
    gate, up = gate_up.chunk(2, -1)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    check(kernels.swiglu(gate_up), F.silu(gate) * up, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim", [(32, 32, 128), (40, 40, 128), (64, 8, 128), (8, 4, 16), (8, 4, 8)]
)
def test_rope_write(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    rows = 100
    qkv = cuda_normal(rows, (n_heads + 2 * n_kv_heads) * head_dim, dtype=dtype)
    table = kernels.rope_table(head_dim, 4096, 10000.0, 1.0, CUDA)
    positions = torch.randint(0, 4096, (rows,), device=CUDA)
    kv_index = torch.randperm(40 * 64, device=CUDA)[:rows]
    k, v, twin_k, twin_v = (cuda_normal(40, 64, n_kv_heads, head_dim, dtype=dtype).fill_(0) for _ in range(4))
    q = kernels.rope_write(qkv, table, positions, kv_index, k, v, n_heads)
    twin = reference.rope_write(qkv, table, positions, kv_index, twin_k, twin_v, n_heads)
    wide = qkv.double().view(rows, -1, head_dim)[:, : n_heads + n_kv_heads]
    cos, sin = table.double()[positions][:, None].chunk(2, -1)
    first, second = wide.chunk(2, -1)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    check(q, twin, exact[:, :n_heads])
    check(k.flatten(0, 1)[kv_index], twin_k.flatten(0, 1)[kv_index], exact[:, n_heads:])
    assert torch.equal(v, twin_v) and torch.equal(k == 0, twin_k == 0)
    assert guards_are_nan(k) and guards_are_nan(v)


# ---- linear ----


def sums(x: Tensor, weight: LinearWeight, tile: MatmulTile | None = None) -> Tensor:
    """The fp32 sums themselves: rounding to 16 bits would hide most differences. By pointers, unless `tile` says else:
    a wide tile of fp32 has no room beside the operands of the copy engine."""
    out = torch.empty((len(x), weight.n), dtype=torch.float32, device=CUDA)
    chosen = tiles.matmul_tile(tiles.card(), len(x), weight.n, x.dtype == torch.float32)
    launch_matmul(x, weight, out, tile or replace(chosen, tma=False), 1)
    return out


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 30, 64, 128, 300, 2048])
@pytest.mark.parametrize(
    "n, k",
    [(12288, 4096), (22016, 4096), (4096, 11008), (5120, 5120), (10240, 8192), (8192, 28672), (361, 352), (64, 172)],
)
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_linear(n: int, k: int, rows: int, batch_invariant: bool) -> None:
    x, weight = cuda_normal(rows, k), kernels.pack_weight(cuda_normal(n, k))
    for _ in range(2):  # the counters of a split sum are back at zero
        out = kernels.linear(x, weight, batch_invariant=batch_invariant)
        check(out, x @ weight.data.T, x.double() @ weight.data.double().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_linear_in_other_dtypes(dtype: torch.dtype) -> None:
    x, weight = cuda_normal(70, 4096, dtype=dtype), kernels.pack_weight(cuda_normal(512, 4096, dtype=dtype))
    exact = x.double() @ weight.data.double().T
    for rows in (1, 16, 70):
        out = kernels.linear(x[:rows], weight, batch_invariant=True)
        # cuBLAS may add fp32 in other blocks than one chain of fma: a few ulp are forgiven
        check(out, x[:rows] @ weight.data.T, exact[:rows], forgiven=2.0**-20)


@pytest.mark.parametrize("n, k", [(12288, 4096), (4096, 11008), (361, 352)])
def test_a_row_has_the_same_bits_at_every_row_count(n: int, k: int) -> None:
    x, weight = cuda_normal(2100, k), kernels.pack_weight(cuda_normal(n, k))
    whole = sums(x, weight)
    for rows in (1, 3, 4, 5, 16, 17, 32, 33, 64, 65, 130, 256, 257, 600):
        assert torch.equal(sums(x[:rows], weight), whole[:rows]), rows
        assert torch.equal(sums(x[700 : 700 + rows], weight), whole[700 : 700 + rows]), rows


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no copy engine")
@pytest.mark.parametrize("n, k", [(12288, 4096), (4096, 11008), (264, 200)])
def test_the_copy_engine_brings_the_same_bits(n: int, k: int) -> None:
    """The sums themselves in a tile that has room for them, and the tile that serves prompts, rounded as it is."""
    x, weight = cuda_normal(2100, k), kernels.pack_weight(cuda_normal(n, k))
    whole, tile = sums(x, weight), MatmulTile(128, 128, 64, 3, 8, tma=True)
    for rows in (1, 65, 128, 300, 2100):
        assert torch.equal(sums(x[:rows], weight, tile), whole[:rows]), rows
        assert torch.equal(kernels.linear(x[:rows], weight, batch_invariant=True), whole[:rows].to(BF16)), rows


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_split_sums_add_alike_a_thousand_times(rows: int) -> None:
    x, weight = cuda_normal(rows, 4096), kernels.pack_weight(cuda_normal(1024, 4096))
    first = kernels.linear(x, weight)
    for i in range(1000):
        assert torch.equal(kernels.linear(x, weight), first), i
    assert weight.semaphores is not None and not weight.semaphores.any()


# ---- attention ----


def attend(q: Tensor, cache: Paged, plan: TritonPlan, workers: int | None = None) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float32, device=CUDA)
    attention.launch_attention(q, cache.k, cache.v, plan, q.shape[2] ** -0.5, out, workers)
    return out


def plain_attention(cache: Paged, q: Tensor, n_queries: list[int], scale: float) -> Tensor:
    """torch's own, sequence by sequence, in the dtype of q."""
    out = []
    group = q.shape[1] // cache.k.shape[2]
    for s, part in enumerate(q.split(n_queries)):
        n, blocks = int(cache.seqlens_k[s]), torch.from_numpy(cache.tables[s]).long().to(CUDA)
        k, v = (c[blocks].flatten(0, 1)[:n].repeat_interleave(group, 1).transpose(0, 1) for c in (cache.k, cache.v))
        visible = torch.arange(n, device=CUDA) <= torch.arange(n - len(part), n, device=CUDA)[:, None]
        out.append(F.scaled_dot_product_attention(part.transpose(0, 1), k, v, visible, scale=scale).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, block_size",
    [(32, 32, 128, 64), (64, 8, 128, 64), (64, 8, 128, 16), (8, 4, 16, 32), (8, 4, 8, 16), (8, 1, 64, 128)],
)
@pytest.mark.parametrize(
    "lengths, n_queries",
    [
        ([1, 63, 64, 65, 511, 512, 513, 4000], [1] * 8),
        ([700, 64, 129, 2000], [700, 10, 129, 300]),
        ([700, 64, 129, 2000], [1, 64, 1, 300]),
    ],
)
def test_attention(
    lengths: list[int],
    n_queries: list[int],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    cache = Paged.of(lengths, n_kv_heads, head_dim, block_size, dtype, device="cuda")
    q, scale = cuda_normal(sum(n_queries), n_heads, head_dim, dtype=dtype), head_dim**-0.5
    plan = cache.plan(n_queries)
    out = kernels.paged_attention(q, cache.k, cache.v, plan, scale)
    exact = cache.exact(q, n_queries, scale)
    check(out, plain_attention(cache, q, n_queries, scale), exact, forgiven=2.0**-20)
    assert not plan.semaphores.any()


@pytest.mark.parametrize("n_heads, n_kv_heads", [(32, 32), (64, 8)])
def test_bits_of_attention_depend_on_a_rows_own_tokens_only(n_heads: int, n_kv_heads: int) -> None:
    n = 1500
    cache = Paged.of([n], n_kv_heads, 128, 64, BF16, device="cuda")
    q = cuda_normal(n, n_heads, 128)
    whole = attend(q, cache, cache.plan([n]))
    for cuts in ([512, 1024, n], [1, 700, n], [200, 201, 1025, n - 1, n]):
        ends = zip([0, *cuts[:-1]], cuts, strict=True)
        pieces = [attend(q[a:b], cache, cache.plan([b - a], at=[b])) for a, b in ends]
        assert torch.equal(torch.cat(pieces), whole), cuts
    for row in (0, 63, 64, 127, 255, 256, 511, 512, 1023, 1024, n - 1):
        single = attend(q[row : row + 1], cache, cache.plan([1], at=[row + 1]))
        assert torch.equal(single[0], whole[row]), row


def test_the_last_worker_merges_alike_a_thousand_times() -> None:
    lengths = [4000, 37, 1100, 2049]
    cache = Paged.of(lengths, 8, 128, 64, BF16, device="cuda")
    q, plan = cuda_normal(4, 64, 128), cache.plan([1] * 4)
    one = attend(q, cache, plan, workers=1)
    for i in range(1000):
        assert torch.equal(attend(q, cache, plan, workers=1 + i % 16), one), i


def test_decode_replays_from_a_graph_with_new_lengths() -> None:
    cache = Paged.of([1280, 1280], 8, 128, 64, BF16, device="cuda")
    q, plan = cuda_normal(2, 64, 128), cache.plan([1, 1])
    attend(q, cache, plan)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, cache, plan)
    for lengths in ([1280, 37], [1, 640], [129, 0], [512, 513]):
        plan.seqlens_k.copy_(torch.tensor(lengths))
        graph.replay()
        live = [i for i, n in enumerate(lengths) if n]
        assert torch.equal(out[live], attend(q, cache, plan)[live]), lengths


def test_a_cache_of_more_than_two_to_the_31_numbers() -> None:
    n_blocks, row = 40_000, 8 * 128
    if torch.cuda.mem_get_info()[0] < 2.5 * n_blocks * 64 * row * 2:
        pytest.skip("needs 13 GB of free memory")
    k, v = (torch.zeros(n_blocks, 64, 8, 128, dtype=BF16, device=CUDA) for _ in range(2))
    small = Paged.of([100], 8, 128, 64, BF16, device="cuda")
    q, last = cuda_normal(1, 64, 128), [n_blocks - 1, n_blocks - 2]
    for big, little in ((k, small.k), (v, small.v)):
        big[last] = little[torch.from_numpy(small.tables[0, :2]).long().to(CUDA)]
    plan = small.plan([1])
    expected = kernels.paged_attention(q, small.k, small.v, plan, 0.1)
    plan.block_tables[0, :2] = torch.tensor(last)
    assert torch.equal(kernels.paged_attention(q, k, v, plan, 0.1), expected)


# ---- sampling ----


@pytest.mark.parametrize("vocab", [361, 32000])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_sample(vocab: int, settings: dict[str, float]) -> None:
    rows = 64
    logits = cuda_normal(rows, vocab, dtype=torch.float32) * 3
    filters = Filters.alike(rows, CUDA, **settings)  # type: ignore[arg-type]
    filters.temperature[::4] = 0.0
    seeds, positions = torch.arange(rows, device=CUDA), torch.arange(100, 100 + rows, device=CUDA)
    u = kernels.uniform(seeds, positions)
    assert torch.equal(u.cpu(), reference.uniform(seeds.cpu(), positions.cpu()))
    tokens = kernels.sample(logits, filters, u)
    twin = reference.sample(logits.cpu(), Filters(*(t.cpu() for t in filters)), u.cpu())
    assert int((tokens.cpu() != twin).sum()) <= 1  # a number within rounding of a border may fall either way
    assert torch.equal(tokens[::4], logits[::4].argmax(-1))
    for row in range(8):
        one_row = slice(row, row + 1)
        alone = kernels.sample(logits[one_row].clone(), Filters(*(t[one_row] for t in filters)), u[one_row])
        assert alone[0] == tokens[row]


def test_token_logprobs_and_apply_penalties() -> None:
    logits = cuda_normal(30, 32000, dtype=torch.float32) * 3
    ids = torch.randint(0, 32000, (30,), device=CUDA)
    bias, repetition, subtract = (
        torch.randn(30, device=CUDA),
        torch.rand(30, device=CUDA) + 0.5,
        torch.randn(30, device=CUDA),
    )
    twin, rows = logits.clone(), torch.arange(30, device=CUDA)
    kernels.apply_penalties(logits, rows, ids, bias, repetition, subtract)
    reference.apply_penalties(twin, rows, ids, bias, repetition, subtract)
    assert torch.equal(logits, twin)
    chosen, top_ids, top = kernels.token_logprobs(logits, ids, 20)
    exact = logits.double().log_softmax(-1)
    assert torch.allclose(chosen.double(), exact.gather(1, ids[:, None])[:, 0], rtol=1e-6, atol=4e-6)
    order = exact.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_ids, order.indices[:, :20])
    assert torch.allclose(top.double(), order.values[:, :20], rtol=1e-6, atol=4e-6)
