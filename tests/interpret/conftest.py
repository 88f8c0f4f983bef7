"""Kernels under Triton's interpreter: a process of its own, because Triton fixes its mode when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # kernel_cases.py

from kernel_cases import GUARD  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    from interpreter import repair

    repair()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="run as: TRITON_INTERPRET=1 python -m pytest tests/interpret"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):  # masked lanes compute what they like, as they do on a GPU
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors start as NaN (or the worst integer) and lie between guards that must stay as they are."""
    plain, made = torch.empty, []
    sentinel = 77  # a store past the end may well be NaN

    def empty(*size: int | tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        numel = int(np.prod(shape))
        whole = plain(numel + 2 * GUARD, dtype=dtype, device=device).fill_(sentinel)
        made.append(whole)
        inside = whole[GUARD : GUARD + numel].view(shape)
        return inside.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 2)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(tuple(x.shape), dtype=x.dtype))
    yield
    assert made, "the kernel's wrapper allocates in a way this fixture does not see"
    for whole in made:
        for guard in (whole[:GUARD], whole[-GUARD:]):
            assert bool((guard == sentinel).all()), "a store past the end of an output"
