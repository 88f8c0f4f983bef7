"""Linear layers: right at every row count, and the same bits at every row count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, check, error, normal

from kernels import reference, tiles, triton_ops
from kernels.linear_weight import LinearWeight, pack_weight
from kernels.matmul import launch_matmul
from kernels.tiles import MatmulTile

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]


def weight_of(n: int, k: int, dtype: torch.dtype) -> LinearWeight:
    """A guarded weight; `pack_weight` keeps a contiguous tensor as it is."""
    return pack_weight(normal(n, k, dtype=dtype))


def sums(x: torch.Tensor, weight: LinearWeight, tile: MatmulTile | None = None) -> torch.Tensor:
    """The fp32 sums themselves: rounding to 16 bits would hide most differences."""
    out = torch.empty((len(x), weight.n), dtype=torch.float32)
    chosen = tiles.matmul_tile(tiles.card(), len(x), weight.n, x.dtype == torch.float32)
    launch_matmul(x, weight, out, tile or chosen, 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(361, 352), (64, 172), (128, 512)])
@pytest.mark.parametrize("rows", [1, 5, 17, 64, 300])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, k, dtype=dtype), weight_of(n, k, dtype)
    out = triton_ops.linear(x, weight, batch_invariant=True)
    twin = reference.linear(x, LinearWeight(weight.data, n, k, False))
    check(out, twin, x.double() @ weight.data.double().T)


@pytest.mark.parametrize("rows", [3, 40])
def test_linear_of_a_wide_weight(rows: int) -> None:
    """More than 8192 columns have their own tiles."""
    x, weight = normal(rows, 128, dtype=torch.bfloat16), weight_of(8224, 128, torch.bfloat16)
    out = triton_ops.linear(x, weight, batch_invariant=True)
    check(out, x @ weight.data.T, x.double() @ weight.data.double().T)


def test_the_widest_tile() -> None:
    """128 x 256, which takes more columns than any test model has: chosen by hand."""
    many = tiles.card().many_rows_wide
    assert tiles.matmul_tile(tiles.card(), 2048, 12288, False) is many
    x, weight = normal(2040, 72, dtype=torch.bfloat16), weight_of(256 * 9, 72, torch.bfloat16)
    assert tiles.matmul_tile(tiles.card(), 2040, weight.n, False) is many
    out = triton_ops.linear(x, weight, batch_invariant=True)
    check(out, x @ weight.data.T, x.double() @ weight.data.double().T)


@pytest.mark.parametrize(
    "dtype, n, k", [(torch.bfloat16, 256, 1024), (torch.float16, 361, 352), (torch.float32, 72, 172)]
)
def test_a_row_has_the_same_bits_at_every_row_count(dtype: torch.dtype, n: int, k: int) -> None:
    x, weight = normal(300, k, dtype=dtype), weight_of(n, k, dtype)
    whole = sums(x, weight)
    for rows in (1, 7, 16, 17, 33, 65, 130, 257):
        assert torch.equal(sums(x[:rows], weight), whole[:rows]), rows
    assert torch.equal(sums(x[90:93], weight), whole[90:93])
    assert torch.equal(triton_ops.linear(x[:5], weight, batch_invariant=True), whole[:5].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, n, k", [(300, 264, 200), (128, 128, 64), (1, 72, 136), (130, 361, 352)])
def test_the_copy_engine_brings_the_same_bits(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    """By descriptors and by pointers; 361 fp32 sums are no multiple of 16 bytes, and the descriptors step aside."""
    tile = MatmulTile(128, 128, 64, 3, 8)
    x, weight = normal(rows, k, dtype=dtype), weight_of(n, k, dtype)
    whole = sums(x, weight, tile)
    assert torch.equal(sums(x, weight, replace(tile, tma=True)), whole)
    assert torch.equal(sums(x[: rows // 2 + 1], weight, replace(tile, tma=True)), whole[: rows // 2 + 1])
    assert error(whole, x.double() @ weight.data.double().T) < 1e-6


@pytest.mark.parametrize("rows", [1, 16, 30])
def test_split_sums_leave_their_counters_at_zero(rows: int) -> None:
    x, weight = normal(rows, 4096, dtype=torch.bfloat16), weight_of(64, 4096, torch.bfloat16)
    assert tiles.split_k(tiles.card(), tiles.matmul_tile(tiles.card(), rows, 64, False), rows, 64, 4096) == 4
    first = triton_ops.linear(x, weight)
    check(first, x @ weight.data.T, x.double() @ weight.data.double().T)
    assert weight.semaphores is not None and not weight.semaphores.any()
    assert torch.equal(triton_ops.linear(x, weight), first)


def test_many_rows_without_the_promise_go_to_torch() -> None:
    x, weight = normal(70, 128), weight_of(32, 128, torch.float32)
    assert torch.equal(triton_ops.linear(x, weight), x @ weight.data.T)
    assert error(triton_ops.linear(x, weight, batch_invariant=True), x.double() @ weight.data.double().T) < 1e-6


def test_no_rows() -> None:
    assert triton_ops.linear(torch.zeros(0, 128), weight_of(32, 128, torch.float32)).shape == (0, 32)
