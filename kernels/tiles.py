"""Tile constants per card: block shapes, pipeline stages and warps. They change how fast a kernel runs, never its bits.

The constants that do change bits (`KEYS`, `CHUNK`, the order of a sum) live beside the arithmetic, in the kernel files.
The first guesses come from offline compiles: registers, shared memory and programs per SM. None is measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.launch import cdiv, gpu_arch


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """One program of the matmul kernel: block_m rows of x times block_n rows of the weight, block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """block_m: query rows of a prefill program (a decode program has one token's query heads of one key head)."""

    block_m: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Card:
    """What one architecture wants.

    few_rows: (rows, for n <= 8192, for wider) in ascending order: the tile that serves up to so many rows.
    many_rows, many_rows_wide: for more rows; the wide one where it still gives every SM a tile.
    fp32: the matrix units are out of reach there, and the tiles twice as large.
    decode_programs: how many decode attention programs fill the card.
    library_rows: with batch_invariant=False, torch.matmul takes over from so many rows on.
    """

    sms: int
    few_rows: tuple[tuple[int, MatmulTile, MatmulTile], ...]
    many_rows: MatmulTile
    many_rows_wide: MatmulTile
    matmul_fp32: MatmulTile
    prefill: AttentionTile
    decode: AttentionTile
    attention_fp32: AttentionTile
    decode_programs: int
    library_rows: int


# Every program re-reads x from L2, block_m / block_n of what it reads of w: kept near 1/2 or less. block_n is at least
# 8 columns per warp, and there should be about one program per SM where n is small.
_FEW_ROWS = (
    (4, MatmulTile(16, 16, 256, 5, 2), MatmulTile(16, 32, 128, 5, 4)),
    (16, MatmulTile(16, 32, 256, 4, 4), MatmulTile(16, 64, 128, 4, 4)),
    (32, MatmulTile(32, 32, 128, 5, 4), MatmulTile(32, 64, 128, 4, 8)),
    (64, MatmulTile(64, 32, 128, 3, 4), MatmulTile(64, 64, 128, 3, 4)),
)
_HOPPER = Card(
    sms=132,
    few_rows=_FEW_ROWS,
    many_rows=MatmulTile(128, 128, 64, 3, 8),
    many_rows_wide=MatmulTile(128, 256, 64, 4, 8),
    matmul_fp32=MatmulTile(32, 32, 32, 3, 4),
    prefill=AttentionTile(128, 3, 8),
    decode=AttentionTile(16, 3, 4),
    attention_fp32=AttentionTile(16, 2, 4),
    decode_programs=396,
    library_rows=65,
)
_AMPERE = Card(
    sms=108,
    few_rows=_FEW_ROWS,
    many_rows=MatmulTile(128, 128, 64, 3, 8),
    many_rows_wide=MatmulTile(128, 128, 64, 3, 8),
    matmul_fp32=MatmulTile(32, 32, 32, 3, 4),
    prefill=AttentionTile(32, 3, 4),
    decode=AttentionTile(16, 3, 4),
    attention_fp32=AttentionTile(16, 2, 4),
    decode_programs=324,
    library_rows=65,
)
_CARDS = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}


def card() -> Card:
    """The row of the current card; one that is not listed gets the most modest."""
    return _CARDS.get(gpu_arch(), _AMPERE)


def matmul_tile(card: Card, rows: int, n: int, fp32: bool) -> MatmulTile:
    """The tile for x [rows, k] @ weight [n, k].T."""
    if fp32:
        return card.matmul_fp32
    for most, narrow, wide in card.few_rows:
        last = narrow if n <= 8192 else wide
        if rows <= most:
            return last
    if rows <= 256 and _tiles(card.many_rows, rows, n) < card.sms:
        return last
    enough = n % card.many_rows_wide.block_n == 0 and _tiles(card.many_rows_wide, rows, n) >= card.sms
    return card.many_rows_wide if enough else card.many_rows


def _tiles(tile: MatmulTile, rows: int, n: int) -> int:
    return cdiv(rows, tile.block_m) * cdiv(n, tile.block_n)


def split_k(card: Card, tile: MatmulTile, rows: int, n: int, k: int) -> int:
    """How many programs share the sum of one tile, so that two programs find work on every SM: 1, 2 or 4.

    Each part keeps at least 1024 of k, or its pipeline would hardly start; with many rows the parts themselves weigh.
    """
    splits, tiles = 1, _tiles(tile, rows, n)
    while splits < 4 and tile.block_m <= 32 and tiles * splits < 2 * card.sms:
        if k < 2048 * splits or k % (2 * splits * tile.block_k):
            break
        splits *= 2
    return splits
