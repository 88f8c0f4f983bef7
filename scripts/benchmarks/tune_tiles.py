"""Try tile constants on this card and keep the fastest of each kind in the table that the kernels read.

Only constants that cannot change a result are tried. The table's own tile is always among the candidates, so tuning
makes nothing slower. A candidate that does not fit the card is passed over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import triton

import kernels
from benchmarks.gpu_timer import Call, Timer, copies
from benchmarks.inspect_sass import SHARED_PER_PROGRAM
from kernels import tiles
from kernels.attention import launch_attention
from kernels.attention_plan import TILE_POSITIONS, plan_triton
from kernels.launch import gpu_arch
from kernels.matmul import launch_matmul
from kernels.tiles import AttentionTile, Card, FewRows, MatmulTile, read_cards, write_cards
from llama.config import ModelConfig

BF16 = torch.bfloat16
DECODE_ROWS, DECODE_LENGTH, PREFILL_LENGTH, MANY_ROWS = 16, 4096, 4096, 2048
Tile = TypeVar("Tile", MatmulTile, AttentionTile)


def few_rows_candidates(rows: int, shared: int) -> list[MatmulTile]:
    """Tiles for up to `rows` rows that need at most `shared` bytes of shared memory."""
    shapes = product((16, 32, 64, 128), (64, 128, 256), (3, 4, 5, 6), (2, 4, 8))
    candidates = [MatmulTile(max(16, rows), n, k, stages, warps) for n, k, stages, warps in shapes if n >= 8 * warps]
    return [tile for tile in candidates if _shared(tile) <= shared]


def many_rows_candidates(arch: int, shared: int) -> list[MatmulTile]:
    """Tiles for many rows; by descriptors too, where the card has a copy engine."""
    shapes = product((64, 128, 256), (128, 256), (64, 128), (3, 4), (4, 8), (False, True))
    candidates = [MatmulTile(*shape) for shape in shapes if arch >= 90 or not shape[-1]]
    # More than 128 x 128 sums in four warps spill.
    return [t for t in candidates if _shared(t) <= shared and t.block_m * t.block_n <= 4096 * t.warps]


def attention_candidates(prefill: bool) -> list[AttentionTile]:
    rows = tuple(m for m in (32, 64, 128) if TILE_POSITIONS % m == 0) if prefill else (16,)
    return [AttentionTile(*shape) for shape in product(rows, (2, 3, 4, 5), (4, 8))]


def _shared(tile: MatmulTile) -> int:
    """Bytes of 16-bit operands in flight."""
    return 2 * tile.stages * tile.block_k * (tile.block_m + tile.block_n)


def fastest(what: str, candidates: Sequence[Tile], calls: Callable[[Tile], list[Call]], timer: Timer) -> Tile:
    """The candidate whose calls take the least time; one that does not fit the card loses."""
    timed: list[tuple[float, Tile]] = []
    for tile in candidates:
        try:
            timed.append((timer([calls(tile)])[0], tile))
        except triton.runtime.errors.OutOfResources:
            continue
    best, tile = min(timed, key=lambda pair: pair[0])
    print(f"{what:32} {best * 1e6:9.1f} us, of {len(timed)} tiles: {tile}", flush=True)
    return tile


def tune(config: ModelConfig, timer: Timer, device: torch.device, table: Path) -> dict[str, Any]:
    """Measure every tile of 16-bit operands for this card at the shapes of `config`, and write the table."""
    arch, card = gpu_arch(), tiles.card()
    shared = SHARED_PER_PROGRAM.get(arch, SHARED_PER_PROGRAM[80])
    with torch.inference_mode():
        card = replace(card, few_rows=tuple(_few_rows(few, config, shared, timer, device) for few in card.few_rows))
        card = _many_rows(card, config, many_rows_candidates(arch, shared), timer, device)
        card = _attention(card, config, timer, device)
    card = replace(card, source=f"measured {time.strftime('%Y-%m-%d')}, triton {triton.__version__}, {_name(device)}")
    write_cards({**read_cards(tiles.TABLE), arch: card}, table)
    return asdict(card)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _matmul(rows: int, n: int, k: int, device: torch.device) -> Callable[[MatmulTile], list[Call]]:
    weights = [kernels.pack_weight(torch.randn(n, k, dtype=BF16, device=device)) for _ in copies(2 * n * k)]
    x = torch.randn(rows, k, dtype=BF16, device=device)
    out = torch.empty(rows, n, dtype=BF16, device=device)
    return lambda tile: [partial(launch_matmul, x, weight, out, tile, 1) for weight in weights]


def _few_rows(few: FewRows, config: ModelConfig, shared: int, timer: Timer, device: torch.device) -> FewRows:
    fastest_of = {}
    for kind, n, now in (("narrow", config.dim, few.narrow), ("wide", 2 * config.ffn_dim, few.wide)):
        calls = _matmul(few.rows, n, config.dim, device)
        candidates = [now, *few_rows_candidates(few.rows, shared)]
        fastest_of[kind] = fastest(f"linear, {few.rows} rows, {n} columns", candidates, calls, timer)
    return FewRows(few.rows, fastest_of["narrow"], fastest_of["wide"])


def _many_rows(
    card: Card, config: ModelConfig, candidates: list[MatmulTile], timer: Timer, device: torch.device
) -> Card:
    """The wide tile at a prompt's rows. The other one serves fewer rows, whose launches descriptors would slow."""
    calls = _matmul(MANY_ROWS, 2 * config.ffn_dim, config.dim, device)
    wide = fastest(f"linear, {MANY_ROWS} rows", [card.many_rows_wide, *candidates], calls, timer)
    calls, plain = _matmul(256, config.dim, config.dim, device), [tile for tile in candidates if not tile.tma]
    many = fastest("linear, 256 rows", [card.many_rows, *plain], calls, timer)
    return replace(card, many_rows=many, many_rows_wide=wide)


def _attention(card: Card, config: ModelConfig, timer: Timer, device: torch.device) -> Card:
    """Both kinds are set to the tile that is tried, since a launch reads only the tile of its kind."""
    prefill = _paged(card, [PREFILL_LENGTH], PREFILL_LENGTH, config, device)
    pieces = fastest("prefill attention", [card.prefill, *attention_candidates(True)], prefill, timer)
    decode = _paged(card, [1] * DECODE_ROWS, DECODE_LENGTH, config, device)
    single = fastest("decode attention", [card.decode, *attention_candidates(False)], decode, timer)
    return replace(card, prefill=pieces, decode=single)


def _paged(
    card: Card, n_queries: list[int], length: int, config: ModelConfig, device: torch.device
) -> Callable[[AttentionTile], list[Call]]:
    block_size, n_seqs = 64, len(n_queries)
    blocks = length // block_size
    starts = np.concatenate(([0], np.cumsum(n_queries))).astype(np.int32)
    tables = np.random.default_rng(0).permutation(n_seqs * blocks).astype(np.int32).reshape(n_seqs, blocks)
    plan = plan_triton(starts, np.full(n_seqs, length, np.int32), tables, device)
    shape = (n_seqs * blocks, block_size, config.n_kv_heads, config.head_dim)
    k, v = (torch.randn(shape, dtype=BF16, device=device) for _ in range(2))
    q = torch.randn(sum(n_queries), config.n_heads, config.head_dim, dtype=BF16, device=device)
    out, scale = torch.empty_like(q), config.head_dim**-0.5

    def calls(tile: AttentionTile) -> list[Call]:
        with_tile = replace(card, prefill=tile, decode=tile)
        return [partial(launch_attention, q, k, v, plan, scale, out, tiles=with_tile)]

    return calls
