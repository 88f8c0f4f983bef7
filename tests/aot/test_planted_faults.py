"""Would the compile gate notice? Faults of tiles and alignment that change no result, planted one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_launches import complaints

import kernels
from benchmarks.inspect_sass import capture, inspect_all
from kernels import tiles
from kernels.tiles import AttentionTile, FewRows, MatmulTile
from scripts.compile_kernels import META

pytestmark = pytest.mark.aot

BF16 = torch.bfloat16


def prefill() -> None:
    cache = torch.empty(100, 64, 32, 128, dtype=BF16, device=META)
    starts, lengths, tables = np.array([0, 512], np.int32), np.array([512], np.int32), np.zeros((1, 8), np.int32)
    plan = kernels.plan_attention(starts, lengths, tables, 64, META)
    kernels.paged_attention(torch.empty(512, 32, 128, dtype=BF16, device=META), cache, cache, plan, 0.1)


def linear(k: int = 4096, rows: int = 16) -> None:
    weight = kernels.pack_weight(torch.empty(4096, k, dtype=BF16, device=META))
    kernels.linear(torch.empty(rows, k, dtype=BF16, device=META), weight, batch_invariant=True)


def complaints_about(launch: Callable[[], None]) -> list[str]:
    with capture(90) as launches:
        launch()
    reports = inspect_all(launches)
    return [line for made in launches for line in complaints(made, reports[made.code])]


def card_with(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setitem(tiles._CARDS, 90, replace(tiles._CARDS[90], **changes))


def test_without_a_fault_nothing_is_said() -> None:
    assert not complaints_about(prefill) and not complaints_about(linear)
    assert not complaints_about(lambda: linear(rows=2048))


def test_a_tile_too_large_for_the_copy_engine_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    card_with(monkeypatch, many_rows_wide=MatmulTile(128, 256, 64, 5, 8, tma=True))
    assert any("bytes of shared memory" in line for line in complaints_about(lambda: linear(rows=2048)))


def test_too_few_warps_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    card_with(monkeypatch, prefill=AttentionTile(128, 3, 4))
    assert any("spills" in line for line in complaints_about(prefill))


def test_too_many_stages_do_not_fit_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = MatmulTile(16, 64, 256, 8, 4)
    card_with(monkeypatch, few_rows=(FewRows(64, tile, tile),))
    assert any("bytes of shared memory" in line for line in complaints_about(linear))


def test_an_odd_row_length_loses_the_wide_copies() -> None:
    found = complaints_about(lambda: linear(4100))
    assert any("copy128" in line or "narrow" in line for line in found)
