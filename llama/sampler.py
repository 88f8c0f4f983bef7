"""`Sampler`: the sampling parameters of a batch's sequences as tensors, and the tokens that come out.

Order: fp32 logits, logit_bias, repetition penalty, presence and frequency penalty, bans, temperature, top_k, top_p,
min_p, draw. Logprobs are the log-softmax of the raw logits, before all of that. The random number of a token depends on
its sequence's seed and its position alone, so batching and preemption cannot move it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from llama.sequence import Sequence, TokenLogprobs

# Dividing by less would overflow fp32, and a request must not fail on a value that it may have.
MIN_PENALTY = 1e-6


@dataclass(frozen=True, slots=True)
class RowParams:
    """[rows] tensors of one batch; they stay the same as long as its sequences do."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    any_random: bool
    any_penalised: bool
    n_top: int | None  # the most logprobs that a row asks for; None: no row asks


class Sampler:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seqs: list[Sequence] = []
        self._rows: RowParams | None = None

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """One token per row of logits [len(seqs), vocab] fp32, which may be overwritten.

        A token is -1 where the best logit is not finite. Logprobs are None where they were not asked for.
        """
        if self._rows is None or seqs != self._seqs:
            self._seqs, self._rows = list(seqs), self._row_params(seqs)
        rows = self._rows
        raw = logits
        if rows.any_penalised:
            raw = logits.clone() if rows.n_top is not None else logits
            self._penalise(logits, seqs)
        uniforms = rows.temperature
        if rows.any_random:
            positions = torch.tensor([len(seq.token_ids) for seq in seqs], dtype=torch.int64).to(self.device)
            uniforms = kernels.uniform(rows.seeds, positions)
        ids = kernels.sample(logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniforms)
        if rows.n_top is None:
            return ids.tolist(), [None] * len(seqs)
        wanted = [seq.params.logprobs for seq in seqs]
        return ids.tolist(), report_logprobs(raw, ids, wanted, rows.n_top)

    def _row_params(self, seqs: list[Sequence]) -> RowParams:
        params = [seq.params for seq in seqs]
        asked = [p.logprobs for p in params if p.logprobs is not None]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        return RowParams(
            temperature=column([0.0 if p.greedy else p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float32),
            min_p=column([p.min_p for p in params], torch.float32),
            seeds=torch.tensor([seq.seed for seq in seqs], dtype=torch.int64).to(self.device),
            any_random=any(not p.greedy for p in params),
            any_penalised=any(p.penalised for p in params),
            n_top=max(asked) if asked else None,
        )

    def _penalise(self, logits: Tensor, seqs: list[Sequence]) -> None:
        """Change the few logits that biases, penalties and bans touch, all rows in one operation."""
        entries: list[tuple[int, int, float, float, float]] = []
        for row, seq in enumerate(seqs):
            if seq.params.penalised:
                entries += [(row, *entry) for entry in _penalties(seq)]
        if entries:
            row_ids, token_ids, bias, repetition, subtract = zip(*entries, strict=True)
            kernels.adjust_logits(
                logits,
                torch.tensor(row_ids, dtype=torch.int64).to(self.device),
                torch.tensor(token_ids, dtype=torch.int64).to(self.device),
                torch.tensor(bias, dtype=torch.float32).to(self.device),
                torch.tensor(repetition, dtype=torch.float32).to(self.device),
                torch.tensor(subtract, dtype=torch.float32).to(self.device),
            )


def _penalties(seq: Sequence) -> list[tuple[int, float, float, float]]:
    """(token, bias, repetition, subtract) for every token whose logit changes."""
    p = seq.params
    counts: Counter[int] = Counter()
    if p.presence_penalty or p.frequency_penalty:
        counts = Counter(seq.token_ids[seq.n_prompt :])
    repeated = set(seq.token_ids) if p.repetition_penalty != 1.0 else set()
    banned = seq.stop_ids if seq.n_generated < p.min_tokens else frozenset[int]()
    return [
        (
            token,
            -math.inf if token in banned else p.logit_bias.get(token, 0.0),
            max(p.repetition_penalty, MIN_PENALTY) if token in repeated else 1.0,
            p.presence_penalty + p.frequency_penalty * counts[token] if token in counts else 0.0,
        )
        for token in {*p.logit_bias, *counts, *repeated, *banned}
    ]


def report_logprobs(
    logits: Tensor, token_ids: Tensor, wanted: list[int | None], n_top: int
) -> list[TokenLogprobs | None]:
    """Logprobs of one token per row and of the best ones; wanted[row] = how many, None = no report for the row."""
    chosen, top_ids, top = kernels.token_logprobs(logits, token_ids, n_top)
    columns = zip(token_ids.tolist(), chosen.tolist(), top_ids.tolist(), top.tolist(), wanted, strict=True)
    return [
        None if n is None else TokenLogprobs(token, value, list(zip(best[:n], values[:n], strict=True)))
        for token, value, best, values, n in columns
    ]
