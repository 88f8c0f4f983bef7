"""RMSNorm, SwiGLU, and RoPE with the cache write, against float64 and their twins."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, check, guarded, guards_are_nan, normal

from kernels import reference, triton_ops

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, dim", [(1, 64), (3, 200), (5, 172), (2, 4096)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype)
    residual = normal(rows, dim, dtype=dtype) if with_residual else None
    out, total = triton_ops.rms_norm(x, weight, 1e-5, residual)
    twin, twin_total = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, twin_total)
    wide = total.double()
    check(out, twin, wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double())


def test_rms_norm_of_tiny_rows_is_ruled_by_eps() -> None:
    x, weight = normal(2, 64) * 1e-6, normal(64)
    out, _ = triton_ops.rms_norm(x, weight, 1e-5)
    check(
        out,
        reference.rms_norm(x, weight, 1e-5)[0],
        x.double() / (1e-5 + x.double().square().mean(-1, True)).sqrt() * weight,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, ffn", [(1, 172), (3, 352), (2, 1024), (2, 1500)])
def test_swiglu(rows: int, ffn: int, dtype: torch.dtype) -> None:
    gate_up = normal(rows, 2 * ffn, dtype=dtype)
    gate_up[0, :3] = torch.tensor([-200.0, 90.0, 0.0])
    gate, up = gate_up.double().chunk(2, -1)
    check(triton_ops.swiglu(gate_up), reference.swiglu(gate_up), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(4, 4, 16), (8, 2, 8), (6, 6, 48), (32, 8, 64), (8, 1, 128)])
def test_rope_write(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = normal(3, (n_heads + 2 * n_kv_heads) * head_dim, dtype=dtype)
    cos_sin = guarded(reference.rope_table(head_dim, 40, 10000.0, 1.0, torch.device("cpu")))
    positions, kv_index = guarded(torch.tensor([0, 5, 39])), guarded(torch.tensor([7, 47, 20]))
    caches = [guarded(torch.full((3, 16, n_kv_heads, head_dim), float("nan"), dtype=dtype)) for _ in range(4)]
    q = triton_ops.rope_write(qkv, cos_sin, positions, kv_index, caches[0], caches[1], n_heads)
    twin = reference.rope_write(qkv, cos_sin, positions, kv_index, caches[2], caches[3], n_heads)

    wide = qkv.double().view(3, -1, head_dim)[:, : n_heads + n_kv_heads]
    cos, sin = cos_sin.double()[positions][:, None].chunk(2, -1)
    first, second = wide.chunk(2, -1)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    check(q, twin, exact[:, :n_heads])
    k, twin_k = (c.view(-1, n_kv_heads, head_dim) for c in (caches[0], caches[2]))
    check(k[kv_index], twin_k[kv_index], exact[:, n_heads:])
    assert torch.equal(k.isnan(), twin_k.isnan())  # nothing else was written
    assert torch.equal(caches[1].nan_to_num(77.0), caches[3].nan_to_num(77.0))


def test_rope_write_leaves_the_cache_alone_for_padding_rows() -> None:
    qkv, cos_sin = normal(2, 6 * 16), reference.rope_table(16, 8, 10000.0, 1.0, torch.device("cpu"))
    k, v = guarded(torch.zeros(1, 4, 1, 16)), guarded(torch.zeros(1, 4, 1, 16))
    triton_ops.rope_write(qkv, cos_sin, torch.tensor([3, 0]), torch.tensor([2, -1]), k, v, 4)
    assert (k.view(4, -1) != 0).any(1).tolist() == (v.view(4, -1) != 0).any(1).tolist() == [False, False, True, False]
    assert guards_are_nan(k) and guards_are_nan(v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    x, residual, weight = normal(4, 352, dtype=dtype), normal(4, 352, dtype=dtype), normal(352, dtype=dtype)
    out, total = triton_ops.rms_norm(x, weight, 1e-5, residual)
    gated = triton_ops.swiglu(x)
    for i in range(4):
        alone, alone_total = triton_ops.rms_norm(x[i : i + 1], weight, 1e-5, residual[i : i + 1])
        assert torch.equal(alone[0], out[i]) and torch.equal(alone_total[0], total[i])
        assert torch.equal(triton_ops.swiglu(x[i : i + 1])[0], gated[i])
