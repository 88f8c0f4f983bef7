"""Causal attention over the paged cache, whose bits depend on a row's own tokens and their positions alone.

Single tokens and prefill share their arithmetic: `attend_tile` is an online-softmax step over KEYS keys (arXiv
2307.08691), and `merge_state` adds a chunk of keys to the running result. A row's state is its maximum m_i, its sum l_i
and its weighted values acc. Tiles and chunks are counted from position 0 of a sequence. Neither function knows how many
rows share a tile, where a prefill chunk began, or who else is in the batch. KEYS and the chunk length are part of a
model's numerics: changing one changes results.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_plan import MAX_KV_HEADS, TILE_POSITIONS, AttentionPlan, TritonPlan
from kernels.launch import FLOATS, cdiv, expect, next_power_of_2
from kernels.tiles import Card, card

KEYS = 64
HIDDEN = tl.constexpr(-1.0e30)  # a minus infinity that can be subtracted from itself


def chunk_length(n_kv_heads: int) -> int:
    """Keys of a chunk, the unit of work that programs share. Few key heads need more chunks to fill a card."""
    return 512 if n_kv_heads > 8 else 256


@triton.jit
def attend_tile(q, k, v, visible, m_i, l_i, acc, scale):
    """One online-softmax step. Every row must see a key of the first tile it is given.

    Row sums go through the matrix unit, as p times a tile of ones: tl.sum adds in the order of the tile's register
    layout, which differs between tiles of 16 and of 128 rows. The maximum is exact in any order. The mask comes before
    the scale, and the fma is explicit, so that both kernels round alike.
    """
    scores = tl.where(visible, tl.dot(q, k.T, input_precision="ieee"), HIDDEN)
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.math.exp2(tl.fma(scores, scale, -m_new[:, None])).to(v.dtype)
    alpha = tl.math.exp2(m_i - m_new)[:, None]
    ones = tl.full([k.shape[0], 16], 1.0, v.dtype)
    l_i = tl.dot(p, ones, l_i * alpha, input_precision="ieee")
    acc = tl.dot(p, v, acc * alpha, input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m_i, l_i, acc) of rows that have seen no key."""
    m_i = tl.full([BLOCK_M], HIDDEN, tl.float32)
    return m_i, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit
def merge_state(m_i, l_i, acc, m_chunk, l_chunk, acc_chunk):
    """Add a chunk to the running result. An empty state on either side adds exactly nothing."""
    m_new = tl.maximum(m_i, m_chunk)
    keep = tl.math.exp2(m_i - m_new)
    take = tl.math.exp2(m_chunk - m_new)
    l_i = tl.fma(l_i, keep, l_chunk * take)
    acc = tl.fma(acc, keep[:, None], acc_chunk * take[:, None])
    return m_new, l_i, acc


@triton.jit
def key_offsets(
    table, start, end, head, BLOCK_KEYS: tl.constexpr, KV_BLOCK: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr
):
    """[BLOCK_KEYS, 1]: where in the cache one head's keys from `start` on lie."""
    offs = tl.arange(0, BLOCK_KEYS)
    if KV_BLOCK % BLOCK_KEYS == 0:  # the tile lies inside one block: one entry of the block table
        block = tl.load(table + start // KV_BLOCK).to(tl.int64)
        row = block * KV_BLOCK + start % KV_BLOCK + offs
    else:
        at = start + offs
        block = tl.load(table + at // KV_BLOCK, mask=at < end, other=0).to(tl.int64)
        row = block * KV_BLOCK + at % KV_BLOCK
    return row[:, None] * (KVH * D) + head * D


@triton.jit
def attend_chunk(
    q, positions, k_ptr, v_ptr, table, start, end, head, scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    KV_BLOCK: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys start .. end - 1 of one head against the rows of q; positions: one for all rows, or [BLOCK_M, 1].
    Returns (m_i, l_i, acc)."""
    offs = tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, BLOCK_D)[None, :]
    m_i = tl.full([BLOCK_M], HIDDEN, tl.float32)
    l_i = tl.zeros([BLOCK_M, 16], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(start, end, BLOCK_KEYS, num_stages=STAGES):
        at = tile + offs
        # Nothing past the end is read: it may be another sequence's NaN, and 0 * NaN is NaN.
        inside = (at < end)[:, None]
        if BLOCK_D != D:
            inside = inside & (dims < D)
        cell = key_offsets(table, tile, end, head, BLOCK_KEYS, KV_BLOCK, KVH, D) + dims
        k = tl.load(k_ptr + cell, mask=inside, other=0.0)
        v = tl.load(v_ptr + cell, mask=inside, other=0.0)
        visible = (at[None, :] <= positions) & (at[None, :] < end)
        m_i, l_i, acc = attend_tile(q, k, v, visible, m_i, l_i, acc, scale)
    return m_i, tl.max(l_i, 1), acc  # the 16 columns of l_i are equal


@triton.jit(do_not_specialize=["table_width", "max_chunks"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_ptr, lengths_ptr, tables_ptr, part_ptr, part_sum_ptr, semaphore_ptr,
    scale, table_width, max_chunks,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, KV_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid (sequences, key heads, workers), for the sequences with one query.

    The query heads of a key head are the rows of its tile. Worker w takes chunks w, w + workers, ... The last worker to
    finish merges all chunks in order, so the number of workers changes no bit.
    """
    sequence, head, worker, workers = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    GROUP: tl.constexpr = H // KVH
    query = tl.load(starts_ptr + sequence)
    length = tl.load(lengths_ptr + sequence)
    chunks = tl.cdiv(length, CHUNK)
    active = tl.minimum(chunks, workers)
    if (tl.load(starts_ptr + sequence + 1) - query != 1) | (worker >= active):
        return
    member = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)[None, :]
    live = member < GROUP
    cells = live[:, None]
    if BLOCK_D != D:
        cells = cells & (dims < D)
    row = query.to(tl.int64) * H + head * GROUP + member
    q = tl.load(q_ptr + row[:, None] * D + dims, mask=cells, other=0.0)
    out_at = out_ptr + row[:, None] * D + dims
    table = tables_ptr + sequence.to(tl.int64) * table_width
    part = (sequence.to(tl.int64) * H + head * GROUP + member) * max_chunks
    for c in range(worker, chunks, workers):
        end = tl.minimum(c * CHUNK + CHUNK, length)
        m_i, l_i, acc = attend_chunk(
            q, length - 1, k_ptr, v_ptr, table, c * CHUNK, end, head, scale,
            BLOCK_M, BLOCK_D, BLOCK_KEYS, KV_BLOCK, KVH, D, STAGES,
        )  # fmt: skip
        if chunks == 1:
            tl.store(out_at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=cells)
        else:
            tl.store(part_ptr + (part + c)[:, None] * D + dims, acc, mask=cells)
            tl.store(part_sum_ptr + (part + c) * 2, m_i, mask=live)
            tl.store(part_sum_ptr + (part + c) * 2 + 1, l_i, mask=live)
    if chunks > 1:
        tl.debug_barrier()  # every thread's stores come before the release
        semaphore = semaphore_ptr + sequence * KVH + head
        if tl.atomic_add(semaphore, 1, sem="acq_rel", scope="gpu") == active - 1:
            m_i, l_i, acc = empty_state(BLOCK_M, BLOCK_D)
            for c in range(chunks):
                acc_part_at = part_ptr + (part + c)[:, None] * D + dims
                acc_part = tl.load(acc_part_at, mask=cells, other=0.0, cache_modifier=".cg")
                m_part = tl.load(part_sum_ptr + (part + c) * 2, mask=live, other=HIDDEN, cache_modifier=".cg")
                l_part = tl.load(part_sum_ptr + (part + c) * 2 + 1, mask=live, other=1.0, cache_modifier=".cg")
                m_i, l_i, acc = merge_state(m_i, l_i, acc, m_part, l_part, acc_part)
            tl.store(out_at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=cells)
            tl.store(semaphore, 0)  # ready for the next layer, and the next replay of a captured graph


@triton.jit(do_not_specialize=["table_width"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_ptr, lengths_ptr, tables_ptr, tiles_ptr, scale, table_width,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, KV_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KEYS: tl.constexpr, PER_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """grid (tiles * PER_TILE, query heads).

    Row tiles lie at multiples of BLOCK_M from position 0, wherever a chunk of a prompt begins. No tile straddles two
    key chunks. Tile -1 of any sequence ends before its first query; it pads a captured graph.
    """
    tl.static_assert(CHUNK % BLOCK_M == 0)
    work, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles_ptr + work // PER_TILE * 2)
    tile = tl.load(tiles_ptr + work // PER_TILE * 2 + 1) * PER_TILE + work % PER_TILE
    query = tl.load(starts_ptr + sequence)
    length = tl.load(lengths_ptr + sequence)
    first = length - (tl.load(starts_ptr + sequence + 1) - query)  # position of the first query
    end = tl.minimum((tile + 1) * BLOCK_M, length)
    if (end <= first) | (tile * BLOCK_M >= length):
        return
    positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    cells = (positions >= first) & (positions < length)
    if BLOCK_D != D:
        cells = cells & (dims < D)
    at = ((query + positions - first).to(tl.int64) * H + head) * D + dims
    q = tl.load(q_ptr + at, mask=cells, other=0.0)
    table = tables_ptr + sequence.to(tl.int64) * table_width
    m_i, l_i, acc = empty_state(BLOCK_M, BLOCK_D)
    for start in range(0, end, CHUNK):
        m_chunk, l_chunk, acc_chunk = attend_chunk(
            q, positions, k_ptr, v_ptr, table, start, tl.minimum(start + CHUNK, end), head // (H // KVH), scale,
            BLOCK_M, BLOCK_D, BLOCK_KEYS, KV_BLOCK, KVH, D, STAGES,
        )  # fmt: skip
        m_i, l_i, acc = merge_state(m_i, l_i, acc, m_chunk, l_chunk, acc_chunk)
    tl.store(out_ptr + at, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask=cells)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float, *, batch_invariant: bool = False
) -> Tensor:
    """The same kernels with and without batch_invariant. Rows of no sequence, or of one of length 0, stay unwritten."""
    if not isinstance(plan, TritonPlan):
        raise ValueError(f"plan: expected one made for Triton kernels on {q.device}, got one without that part")
    expect("q", q, (plan.n_rows, None, None), FLOATS, q.device)
    n_heads, head_dim = q.shape[1:]
    expect("k_cache", k_cache, (None, None, None, head_dim), q.dtype, q.device)
    expect("v_cache", v_cache, tuple(k_cache.shape), q.dtype, q.device)
    n_kv_heads = k_cache.shape[2]
    if n_heads % n_kv_heads:
        raise ValueError(f"q: expected a multiple of the cache's {n_kv_heads} heads, got {n_heads}")
    if n_kv_heads > MAX_KV_HEADS:
        raise ValueError(f"k_cache: expected at most {MAX_KV_HEADS} heads, got {n_kv_heads}")
    n_seqs = len(plan.seqlens_k)
    expect("plan.seqlens_k", plan.seqlens_k, (None,), torch.int32, q.device)
    expect("plan.cu_seqlens_q", plan.cu_seqlens_q, (n_seqs + 1,), torch.int32, q.device)
    expect("plan.block_tables", plan.block_tables, (n_seqs, None), torch.int32, q.device)
    num_blocks, block_size = k_cache.shape[:2]
    if plan.last_block >= num_blocks:
        raise ValueError(f"plan.block_tables: expected blocks below {num_blocks}, got {plan.last_block}")
    if plan.max_seqlen_k > plan.block_tables.shape[1] * block_size:
        given = f"{plan.block_tables.shape[1]} blocks of {block_size}"
        raise ValueError(f"plan.block_tables: expected blocks for {plan.max_seqlen_k} keys, got {given}")
    out = torch.empty_like(q)
    launch_attention(q, k_cache, v_cache, plan, scale, out)
    return out


def launch_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: TritonPlan, scale: float, out: Tensor,
    workers: int | None = None, tiles: Card | None = None,
) -> None:  # fmt: skip
    """The launches behind `paged_attention`: one for single tokens, one for longer pieces, both in a mixed batch.

    For tests: out may be of another dtype than q, and workers any number. For tuning: tiles instead of the card's own.
    """
    n_heads, head_dim = q.shape[1:]
    block_size, n_kv_heads = k_cache.shape[1:3]
    tiles, fp32 = tiles or card(), q.dtype == torch.float32
    lengths, chunk = (plan.cu_seqlens_q, plan.seqlens_k, plan.block_tables), chunk_length(n_kv_heads)
    scale *= math.log2(math.e)  # the kernels raise 2, not e
    shape = {"H": n_heads, "KVH": n_kv_heads, "D": head_dim, "KV_BLOCK": block_size, "CHUNK": chunk}
    shape |= {"BLOCK_D": max(16, next_power_of_2(head_dim)), "BLOCK_KEYS": KEYS}
    n_seqs, width = plan.block_tables.shape
    if plan.single:
        max_chunks = cdiv(plan.max_seqlen_k, chunk)
        workers = min(max_chunks, workers or max(1, tiles.decode_programs // (n_seqs * n_kv_heads)))
        part = torch.empty((n_seqs * n_heads * max_chunks, head_dim), dtype=torch.float32, device=q.device)
        part_sum = torch.empty((n_seqs * n_heads * max_chunks, 2), dtype=torch.float32, device=q.device)
        tile = tiles.attention_fp32 if fp32 else tiles.decode
        decode_kernel[(n_seqs, n_kv_heads, workers)](
            q, k_cache, v_cache, out, *lengths, part, part_sum, plan.semaphores, scale, width, max_chunks, **shape,
            BLOCK_M=max(16, next_power_of_2(n_heads // n_kv_heads)), STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    if len(plan.tiles):
        tile = tiles.attention_fp32 if fp32 else tiles.prefill
        per_tile = TILE_POSITIONS // tile.block_m
        prefill_kernel[(len(plan.tiles) * per_tile, n_heads)](
            q, k_cache, v_cache, out, *lengths, plan.tiles, scale, width, **shape,
            BLOCK_M=tile.block_m, PER_TILE=per_tile, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
