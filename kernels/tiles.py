"""Tile constants per card: block shapes, pipeline stages and warps. They change how fast a kernel runs, never its bits.

The table is `tiles.json`, one entry per architecture. `scripts/bench.py kernels --tune` writes it on a card of that
kind; an entry's `source` says where it holds guesses. The constants that do change bits live in the kernel files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.launch import cdiv, gpu_arch

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """One program of the matmul kernels: block_m rows of x times block_n rows of the weight, block_k at a time.

    tma: the copy engine of sm_90 and later moves rows that begin at multiples of 16 bytes. Its descriptors cost the
    host time in every launch, which a product of many rows hides.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    tma: bool = False


@dataclass(frozen=True, slots=True)
class FewRows:
    """The tiles that serve up to `rows` rows: of weights with at most 8192 columns of output, and of wider ones."""

    rows: int
    narrow: MatmulTile
    wide: MatmulTile


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """block_m: query rows of a prefill program, a divisor of 128. A decode program ignores it."""

    block_m: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Card:
    """The tiles of one architecture.

    source: where the figures come from. few_rows: in ascending order of rows.
    many_rows, many_rows_wide: for more rows; the wide one where it still gives every SM a tile.
    matmul_fp32, attention_fp32: without the matrix units, and with operands of twice the size.
    decode_programs: how many decode attention programs fill the card.
    library_rows: with batch_invariant=False, torch.matmul takes over from so many rows on.
    """

    source: str
    sms: int
    few_rows: tuple[FewRows, ...]
    many_rows: MatmulTile
    many_rows_wide: MatmulTile
    matmul_fp32: MatmulTile
    prefill: AttentionTile
    decode: AttentionTile
    attention_fp32: AttentionTile
    decode_programs: int
    library_rows: int


def read_cards(path: Path) -> dict[int, Card]:
    """Architecture (80, 90 ...) -> its tiles."""
    return {int(arch): _card(entry) for arch, entry in json.loads(path.read_text()).items()}


def write_cards(cards: dict[int, Card], path: Path) -> None:
    """The same table as JSON, one tile a line, so that a change of it can be read in review."""
    entries = []
    for arch, card in sorted(cards.items()):
        values = {name: json.dumps(value) for name, value in asdict(card).items()}
        few = ",\n      ".join(json.dumps(asdict(tiles)) for tiles in card.few_rows)
        values["few_rows"] = f"[\n      {few}\n    ]"
        entries.append(f'  "{arch}": {{\n' + ",\n".join(f'    "{k}": {v}' for k, v in values.items()) + "\n  }")
    path.write_text(("{\n" + ",\n".join(entries) + "\n}\n").replace(', "tma": false', ""))


def _card(entry: dict[str, Any]) -> Card:
    few = tuple(FewRows(e["rows"], MatmulTile(**e["narrow"]), MatmulTile(**e["wide"])) for e in entry["few_rows"])
    matmul = {name: MatmulTile(**entry[name]) for name in ("many_rows", "many_rows_wide", "matmul_fp32")}
    attention = {name: AttentionTile(**entry[name]) for name in ("prefill", "decode", "attention_fp32")}
    return Card(**{**entry, **matmul, **attention, "few_rows": few})


_CARDS = read_cards(TABLE)


def card() -> Card:
    """The entry of the current card; one that is not listed gets the most modest, that of sm_80."""
    return _CARDS.get(gpu_arch(), _CARDS[80])


def matmul_tile(card: Card, rows: int, n: int, fp32: bool) -> MatmulTile:
    """The tile for x [rows, k] @ weight [n, k].T."""
    if fp32:
        return card.matmul_fp32
    for few in card.few_rows:
        last = few.narrow if n <= 8192 else few.wide
        if rows <= few.rows:
            return last
    if rows <= 256 and _tiles(card.many_rows, rows, n) < card.sms:
        return last
    enough = n % card.many_rows_wide.block_n == 0 and _tiles(card.many_rows_wide, rows, n) >= card.sms
    return card.many_rows_wide if enough else card.many_rows


def _tiles(tile: MatmulTile, rows: int, n: int) -> int:
    return cdiv(rows, tile.block_m) * cdiv(n, tile.block_n)


def split_k(card: Card, tile: MatmulTile, rows: int, n: int, k: int) -> int:
    """How many programs share the sum of one tile, so that every SM has two programs: 1, 2 or 4.

    A part has at least 1024 of k, for the sake of its pipeline. Tiles of many rows are not split: the parts weigh.
    """
    splits, tiles = 1, _tiles(tile, rows, n)
    while splits < 4 and tile.block_m <= 32 and tiles * splits < 2 * card.sms:
        if k < 2048 * splits or k % (2 * splits * tile.block_k):
            break
        splits *= 2
    return splits
