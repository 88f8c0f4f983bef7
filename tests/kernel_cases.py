"""What the kernel tests on the interpreter and on a GPU share: exact references, the tolerance rule, paged caches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.attention_plan import TritonPlan, plan_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GUARD = 4096
# Settings of `kernels.Filters`, those left out being off; all forms of `sample` are tested with each.
FILTERS: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.5, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "min_p": 0.02},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.9, "top_k": 300, "top_p": 0.99},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.03},
]


def guarded(tensor: Tensor) -> Tensor:
    """A copy with NaN (or the worst integer) on both sides: a read past either end shows in the result."""
    worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
    whole = torch.full((tensor.numel() + 2 * GUARD,), worst, dtype=tensor.dtype, device=tensor.device)
    whole[GUARD:-GUARD] = tensor.reshape(-1)
    return whole[GUARD:-GUARD].view(tensor.shape)


def guards_are_nan(tensor: Tensor) -> bool:
    """Nothing was stored past either end of a `guarded` tensor of floats."""
    whole = tensor.as_strided((tensor.numel() + 2 * GUARD,), (1,), tensor.storage_offset() - GUARD)
    return bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all())


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Guarded random numbers."""
    return guarded(torch.randn(*shape, device=device).to(dtype))


def filtered(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution [vocab] that one row of `sample` draws from, in float64. Tokens tied with the last one stay."""
    probs = (logits.double().cpu() / temperature).softmax(-1)
    ranked = probs.sort(descending=True).values[: top_k if top_k > 0 else None]
    crossing = int((ranked.cumsum(-1) < top_p * ranked.sum()).sum())
    floor = max(float(ranked[min(crossing, len(ranked) - 1)]), min_p * float(ranked[0]))
    kept = torch.where(probs >= floor, probs, 0.0)
    return kept / kept.sum()


def error(out: Tensor, exact: Tensor) -> float:
    """The worst row's relative error, exact being float64; NaN stays NaN and fails every comparison."""
    out, exact = out.double().flatten(0, -2), exact.double().flatten(0, -2)
    return ((out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)).max().item()


def check(out: Tensor, twin: Tensor, exact: Tensor, forgiven: float = 2.0**-23) -> None:
    """The tolerance rule: at most twice the error of plain torch in the same dtype. An ulp of fp32 is forgiven."""
    assert out.dtype == twin.dtype and out.shape == twin.shape
    mine, theirs = error(out, exact), error(twin, exact)
    assert mine <= 2 * theirs + forgiven, f"error {mine:.3e}, plain torch {theirs:.3e}"


@dataclass(frozen=True)
class Paged:
    """Sequences in a paged cache. Whatever no sequence owns is NaN, but for leading blocks of zeros."""

    k: Tensor
    v: Tensor
    tables: np.ndarray
    seqlens_k: np.ndarray

    @classmethod
    def of(
        cls,
        seqlens_k: list[int],
        n_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
        zero_blocks: int = 0,
        shuffled: bool = True,
    ) -> Paged:
        """zero_blocks: blocks that no sequence owns and that hold zeros, as block 0 of the engine's cache."""
        used = [-(-n // block_size) for n in seqlens_k]
        n_blocks = sum(used) + 2
        order = np.random.default_rng(0).permutation(n_blocks) if shuffled else np.arange(n_blocks)
        order = (zero_blocks + order).astype(np.int32)
        shape = (zero_blocks + n_blocks, block_size, n_kv_heads, head_dim)
        k, v = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
        k[:zero_blocks], v[:zero_blocks] = 0, 0
        tables = np.full((len(seqlens_k), max(used) + 1), order[-1], np.int32)
        given = 0
        for s, (n, blocks) in enumerate(zip(seqlens_k, used, strict=True)):
            tables[s, :blocks] = order[given : given + blocks]
            given += blocks
            at = np.arange(n)
            rows = torch.from_numpy(tables[s, at // block_size].astype(np.int64) * block_size + at % block_size)
            for cache in (k, v):
                flat = cache.view(-1, n_kv_heads, head_dim)
                flat[rows.to(device)] = torch.randn(n, n_kv_heads, head_dim, device=device).to(dtype)
        return cls(guarded(k), guarded(v), tables, np.array(seqlens_k, np.int32))

    def layout(self, n_queries: list[int], at: list[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The last n queries of each sequence, which ends at position `at` (the whole of it by default)."""
        seqlens_k = self.seqlens_k if at is None else np.array(at, np.int32)
        return np.cumsum([0, *n_queries], dtype=np.int32), seqlens_k, self.tables[: len(n_queries)]

    def plan(self, n_queries: list[int], at: list[int] | None = None) -> TritonPlan:
        """As `layout`, for the Triton kernels and the textbook."""
        plan = plan_triton(*self.layout(n_queries, at), self.k.device)
        return replace(plan, block_tables=guarded(plan.block_tables))

    def only(self, s: int) -> Paged:
        """The sequence s alone, in the same cache."""
        return replace(self, tables=self.tables[s : s + 1], seqlens_k=self.seqlens_k[s : s + 1])

    def exact(self, q: Tensor, n_queries: list[int], scale: float) -> Tensor:
        """Attention of the last n queries of each sequence, in float64."""
        out = []
        group = q.shape[1] // self.k.shape[2]
        for s, part in enumerate(q.double().split(n_queries)):
            n, blocks = int(self.seqlens_k[s]), torch.from_numpy(self.tables[s].astype(np.int64)).to(q.device)
            k, v = (
                c[blocks].flatten(0, 1)[:n].double().repeat_interleave(group, 1).transpose(0, 1)
                for c in (self.k, self.v)
            )
            scores = part.transpose(0, 1) @ k.transpose(1, 2) * scale
            positions = torch.arange(n - len(part), n, device=q.device)
            hidden = torch.arange(n, device=q.device) > positions[:, None]
            out.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out)
