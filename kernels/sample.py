"""From logits to token ids and logprobs on the device: no sort, no scan, no host round trip.

A program holds one row in registers, so no other row can reach its arithmetic. It builds what a sort would find from
the highest bit down, with one sum over the row per bit: the k-th largest probability, the smallest set that holds top_p
of the mass, the token that a random number points at.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, expect, next_power_of_2
from kernels.reference import Filters

_ENTRIES = 128
ONE_BITS = tl.constexpr(0x3F800000)  # 1.0 as an integer; floats >= 0 are ordered as their bits are
TOP_BIT = tl.constexpr(1 << 29)  # the highest that a number in [0, 1] has


@triton.jit
def threshold(bits, weight, goal):
    """The largest t for which the weights of the entries with bits >= t add up to goal or more; 0 if there is none."""
    largest = 0
    bit = TOP_BIT
    while bit > 0:
        t = largest + bit
        largest = tl.where(tl.sum(tl.where(bits >= t, weight, 0.0), 0) >= goal, t, largest)
        bit = bit // 2
    return largest


@triton.jit
def draw(x, best, ids, temperature, top_k, top_p, min_p, u):
    """A token of the filtered distribution, by inverse transform in order of ids. x: the row, -inf past its end."""
    # Without the subtraction a tiny temperature would overflow. The probability of the best, not normed, is 1.
    prob = tl.exp((x - best) / temperature)
    bits = prob.to(tl.int32, bitcast=True)
    floor = min_p.to(tl.int32, bitcast=True)
    kept = tl.sum(prob, 0)
    if top_k > 0:
        last = threshold(bits, 1.0, top_k.to(tl.float32))
        above = bits > last
        tied = top_k.to(tl.float32) - tl.sum(above.to(tl.float32), 0)
        # Of the tokens tied with the last one, as many count as top_k has room for; with fewer tokens than top_k, all.
        if last > 0:
            kept = tl.sum(tl.where(above, prob, 0.0), 0) + tied * last.to(tl.float32, bitcast=True)
        floor = tl.maximum(floor, last)
    if top_p < 1.0:
        floor = tl.maximum(floor, threshold(bits, prob, top_p * kept))
    prob = tl.where(bits >= tl.minimum(floor, ONE_BITS), prob, 0.0)  # the best token always stays

    total = tl.sum(prob, 0)
    # u * total may round up to total, which no running sum exceeds: then the last token kept.
    below_total = (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    goal = tl.minimum(u * total, below_total)
    token = 0
    bit = x.shape[0] // 2
    while bit > 0:
        t = token + bit
        token = tl.where(tl.sum(tl.where(ids < t, prob, 0.0), 0) <= goal, t, token)
        bit = bit // 2
    return token


@triton.jit
def sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, out_ptr, V, BLOCK: tl.constexpr
):  # fmt: skip
    """grid (rows,); BLOCK >= V."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf"))
    best = tl.max(x, 0)
    token = tl.min(tl.where(x == best, ids, BLOCK), 0)  # the lowest id among equals
    # tl.max skips NaN; inf - inf is NaN
    broken = (tl.sum((x != x).to(tl.int32), 0) > 0) | (best - best != 0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
        min_p, u = tl.load(min_p_ptr + row), tl.load(uniform_ptr + row)
        token = draw(x, best, ids, temperature, top_k, top_p, min_p, u)
    tl.store(out_ptr + row, tl.where(broken, -1, token).to(tl.int64))


def sample(logits: Tensor, filters: Filters, uniforms: Tensor) -> Tensor:
    device = logits.device
    expect("logits", logits, (None, None), torch.float32, device)
    rows, vocab = logits.shape
    for name, values in filters._asdict().items():
        expect(name, values, (rows,), torch.int64 if name == "top_k" else torch.float32, device)
    expect("uniforms", uniforms, (rows,), torch.float32, device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        block = next_power_of_2(vocab)
        sample_kernel[(rows,)](logits, *filters, uniforms, out, vocab, BLOCK=block, num_warps=_warps(block))
    return out


@triton.jit(do_not_specialize=["n_top"])
def token_logprobs_kernel(logits_ptr, token_ptr, chosen_ptr, top_ids_ptr, top_ptr, V, n_top, BLOCK: tl.constexpr):
    """grid (rows,). Each of the n_top passes takes the largest logit that is left, the lowest id among equals."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=-float("inf"))
    best = tl.max(x, 0)
    log_total = tl.log(tl.sum(tl.exp(x - best), 0))
    token = tl.maximum(tl.load(token_ptr + row), 0)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + row * V + token) - best - log_total)
    for rank in range(n_top):
        top = tl.max(x, 0)
        # In a row of NaN nothing equals top; any valid id will do.
        top_id = tl.minimum(tl.min(tl.where(x == top, ids, BLOCK), 0), V - 1)
        x = tl.where(ids == top_id, float("nan"), x)  # tl.max skips NaN
        tl.store(top_ids_ptr + row * n_top + rank, top_id.to(tl.int64))
        tl.store(top_ptr + row * n_top + rank, top - best - log_total)


def token_logprobs(logits: Tensor, token_ids: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    device = logits.device
    expect("logits", logits, (None, None), torch.float32, device)
    rows, vocab = logits.shape
    expect("token_ids", token_ids, (rows,), torch.int64, device)
    if not 0 <= n_top <= vocab:
        raise ValueError(f"n_top: expected 0 to {vocab}, got {n_top}")
    chosen = torch.empty(rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((rows, n_top), dtype=torch.int64, device=device)
    top = torch.empty((rows, n_top), dtype=torch.float32, device=device)
    if rows:
        block = next_power_of_2(vocab)
        token_logprobs_kernel[(rows,)](
            logits, token_ids, chosen, top_ids, top, vocab, n_top, BLOCK=block, num_warps=_warps(block)
        )
    return chosen, top_ids, top


def _warps(block: int) -> int:
    """Up to 32 numbers a thread: a row of 32,000 fits the 64 registers that a thread of 32 warps has."""
    return min(32, max(4, block // 1024))


@triton.jit(do_not_specialize=["entries"])
def apply_penalties_kernel(
    logits_ptr, row_ptr, token_ptr, bias_ptr, repetition_ptr, subtract_ptr, V, entries, BLOCK: tl.constexpr
):
    """grid (ceil(entries / BLOCK),)."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    row = tl.load(row_ptr + entry, mask=inside, other=0)
    at = logits_ptr + row * V + tl.load(token_ptr + entry, mask=inside, other=0)
    repetition = tl.load(repetition_ptr + entry, mask=inside, other=1.0)
    x = tl.load(at, mask=inside, other=0.0) + tl.load(bias_ptr + entry, mask=inside, other=0.0)
    x = tl.where(x > 0, x / repetition, x * repetition) - tl.load(subtract_ptr + entry, mask=inside, other=0.0)
    tl.store(at, x, mask=inside)


def apply_penalties(
    logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor, repetition: Tensor, subtract: Tensor
) -> None:
    device = logits.device
    expect("logits", logits, (None, None), torch.float32, device)
    expect("rows", rows, (None,), torch.int64, device)
    entries = len(rows)
    expect("token_ids", token_ids, (entries,), torch.int64, device)
    for name, values in (("bias", bias), ("repetition", repetition), ("subtract", subtract)):
        expect(name, values, (entries,), torch.float32, device)
    if entries:
        apply_penalties_kernel[(cdiv(entries, _ENTRIES),)](
            logits, rows, token_ids, bias, repetition, subtract, logits.shape[1], entries, BLOCK=_ENTRIES, num_warps=4
        )


@triton.jit(do_not_specialize=["rows"])
def uniform_kernel(seed_ptr, position_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    """grid (ceil(rows / BLOCK),)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    position = tl.load(position_ptr + row, mask=inside, other=0)
    zero = tl.zeros([BLOCK], tl.uint32)
    seed = tl.load(seed_ptr + row, mask=inside, other=0)
    word, _, _, _ = tl.philox(seed, position.to(tl.uint32), (position >> 32).to(tl.uint32), zero, zero)
    tl.store(out_ptr + row, (word >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=inside)  # 2 ** -24


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    expect("seeds", seeds, (None,), torch.int64, seeds.device)
    expect("positions", positions, tuple(seeds.shape), torch.int64, seeds.device)
    out = torch.empty(len(seeds), dtype=torch.float32, device=seeds.device)
    if len(seeds):
        uniform_kernel[(cdiv(len(seeds), _ENTRIES),)](seeds, positions, out, len(seeds), BLOCK=_ENTRIES, num_warps=4)
    return out
