"""x @ weight.T, summed in fp32: one kernel for any number of rows, and a second form of it for many.

The bits of an output do not depend on the number of rows: one accumulator runs over ascending k, sixteen products at a
time, which the matrix units of Hopper and Blackwell add alike in every instruction (arXiv 2511.10909). So tiles, stages
and warps are free, and so is who fetches the operands: threads, or the copy engine of sm_90 and later (TMA).
`batch_invariant=False` gives that up, for split sums at a few rows and for torch.matmul at many.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import FLOATS, cdiv, expect
from kernels.linear_weight import LinearWeight
from kernels.tiles import MatmulTile, card, matmul_tile, split_k

_GROUP = 8


@triton.jit
def in_bands(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Walk the tiles in bands of GROUP row tiles, so that neighbours share x and the weight in L2."""
    band = GROUP * column_tiles
    first = program // band * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % band % height, program % band // height


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr, weight_ptr, out_ptr, part_ptr, semaphore_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    FEW: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid (column tiles, row tiles, SPLIT).

    EVEN_K: BLOCK_K divides K, so k needs no mask; true of every Llama-2. FEW: the loads of rows past M are masked, for
    less traffic; otherwise these rows re-read row 0, without a mask. Columns past N always re-read row 0 of the weight.
    SPLIT > 1: the last program of a tile to finish adds the parts in their order.
    """
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if not FEW:
        column_tiles = tl.num_programs(0)
        tile_m, tile_n = in_bands(tile_m * column_tiles + tile_n, tl.num_programs(1), column_tiles, GROUP)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    live = offs_m[:, None] < M
    read_m = offs_m if FEW else tl.where(offs_m < M, offs_m, 0)
    x_at = x_ptr + read_m[:, None].to(tl.int64) * K + offs_k
    weight_at = weight_ptr + tl.where(offs_n < N, offs_n, 0)[:, None].to(tl.int64) * K + offs_k
    begin, end = 0, K
    if SPLIT > 1:
        span = tl.cdiv(K, BLOCK_K * SPLIT) * BLOCK_K
        begin = split * span
        end = tl.minimum(begin + span, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_at + k)
            x = tl.load(x_at + k, mask=live, other=0.0) if FEW else tl.load(x_at + k)
        else:
            inside = k + offs_k < K
            weight = tl.load(weight_at + k, mask=inside, other=0.0)
            x = tl.load(x_at + k, mask=live & inside, other=0.0)
        # "ieee" keeps fp32 operands fp32; without it they are rounded to tf32.
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")

    stored = live & (offs_n[None, :] < N)
    at = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    if SPLIT == 1:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        part = M.to(tl.int64) * N
        tl.store(part_ptr + split * part + at, acc, mask=stored)
        tl.debug_barrier()  # every thread's stores come before the release
        semaphore = semaphore_ptr + tile_m * tl.num_programs(0) + tile_n
        if tl.atomic_add(semaphore, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(SPLIT):
                summed += tl.load(part_ptr + s * part + at, mask=stored, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, summed.to(out_ptr.dtype.element_ty), mask=stored)
            tl.store(semaphore, 0)  # ready for the next launch


@triton.jit
def matmul_tma_kernel(
    x_desc, weight_desc, out_desc, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid (column tiles, row tiles). The same sums as `matmul_kernel`, for many rows.

    The descriptors know the ends: past M, N or K they read zeros, which add nothing, and store nothing.
    """
    column_tiles = tl.num_programs(0)
    program = tl.program_id(1) * column_tiles + tl.program_id(0)
    tile_m, tile_n = in_bands(program, tl.num_programs(1), column_tiles, GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        acc = tl.dot(x_desc.load([row, k]), weight_desc.load([column, k]).T, acc, input_precision="ieee")
    out_desc.store([row, column], acc.to(out_desc.dtype))


def linear(x: Tensor, weight: LinearWeight, *, batch_invariant: bool = False) -> Tensor:
    expect("x", x, (None, weight.k), FLOATS, x.device)
    expect("weight", weight.data, (weight.n, weight.k), x.dtype, x.device)
    if weight.semaphores is None:
        raise ValueError(f"weight: expected one that pack_weight made on {x.device}, got one without counters")
    if not batch_invariant and len(x) >= card().library_rows:
        return x @ weight.data.T
    out = torch.empty((len(x), weight.n), dtype=x.dtype, device=x.device)
    if len(x):
        tile = matmul_tile(card(), len(x), weight.n, x.dtype == torch.float32)
        launch_matmul(x, weight, out, tile, 1 if batch_invariant else split_k(card(), tile, len(x), weight.n, weight.k))
    return out


def launch_matmul(x: Tensor, weight: LinearWeight, out: Tensor, tile: MatmulTile, splits: int) -> None:
    """The launch behind `linear`, with any tile. out may be of another dtype than x: tests compare fp32 sums."""
    rows = len(x)
    grid = (cdiv(weight.n, tile.block_n), cdiv(rows, tile.block_m), splits)
    shape = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    if tile.tma and splits == 1 and _fits_descriptors(x, weight.data, out):
        matmul_tma_kernel[grid](
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(weight.data, [tile.block_n, tile.block_k]),
            TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n]),
            weight.k, **shape, GROUP=_GROUP, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return
    part = out  # without a split nothing reads it; any pointer does
    if splits > 1:
        part = torch.empty((splits, rows, weight.n), dtype=torch.float32, device=x.device)
    matmul_kernel[grid](
        x, weight.data, out, part, weight.semaphores, rows, weight.n, weight.k, **shape,
        EVEN_K=weight.k % tile.block_k == 0, FEW=rows <= 256 and tile.block_m <= 64, GROUP=_GROUP,
        SPLIT=splits, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def _fits_descriptors(*matrices: Tensor) -> bool:
    """The copy engine needs every row to begin at a multiple of 16 bytes."""
    return all(m.data_ptr() % 16 == 0 and m.shape[1] * m.itemsize % 16 == 0 for m in matrices)
