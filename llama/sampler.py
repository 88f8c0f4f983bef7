"""`Sampler`: the sampling parameters of a batch's sequences as tensors, and the tokens drawn with them.

Order: fp32 logits, logit_bias, repetition penalty, presence and frequency penalty, bans, temperature, top_k, top_p,
min_p, draw. Logprobs are the log-softmax of the raw logits, before all of that. The random number of a token depends on
its sequence's seed and its position alone, so batching and preemption cannot change it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.sequence import Sequence, TokenLogprobs

# Dividing by less would overflow fp32, and a request must not fail on a value that it may have.
MIN_PENALTY = 1e-6


@dataclass(frozen=True, slots=True)
class RowParams:
    """[rows] tensors of one batch; they stay the same as long as its sequences do."""

    filters: kernels.Filters
    seeds: Tensor
    any_random: bool
    any_penalised: bool
    n_top: int | None  # the most logprobs that a row asks for; None: no row asks


@dataclass(frozen=True, slots=True)
class Report:
    """Logprobs of one token per row, on their way to the host: token ids, their logprobs, the best ids, theirs."""

    tensors: tuple[Tensor, ...]
    wanted: list[int | None]

    def read(self) -> list[TokenLogprobs | None]:
        """One entry per row, None where wanted[row] is. Call it when the device has computed the step."""
        columns = zip(*(tensor.tolist() for tensor in self.tensors), self.wanted, strict=True)
        return [
            None if n is None else TokenLogprobs(token, value, list(zip(best[:n], values[:n], strict=True)))
            for token, value, best, values, n in columns
        ]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The drawn tokens: on the device, for the next step, and on their way to the host."""

    device_ids: Tensor
    ids: Tensor
    report: Report | None

    def read(self) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """Tokens, -1 where the best logit is not finite, and logprobs, as `Report.read`."""
        ids = self.ids.tolist()
        return ids, [None] * len(ids) if self.report is None else self.report.read()


class Sampler:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seqs: list[Sequence] = []
        self._rows: RowParams | None = None

    def sample(self, logits: Tensor, seqs: list[Sequence], positions: list[int]) -> Sampled:
        """Draw one token per row of logits [len(seqs), vocab] fp32, which may be overwritten. Waits for nothing.

        positions: of the tokens to draw, in their sequences. Sequences whose parameters count tokens must have all
        their tokens before that; others may lack the last one.
        """
        if self._rows is None or seqs != self._seqs:
            self._seqs, self._rows = list(seqs), self._row_params(seqs)
        rows = self._rows
        raw = logits
        if rows.any_penalised:
            raw = logits.clone() if rows.n_top is not None else logits
            self._penalise(logits, seqs, positions)
        uniforms = rows.filters.temperature  # of no use to greedy rows
        if rows.any_random:
            (at,) = kernels.to_device(self.device, np.array(positions, np.int64))
            uniforms = kernels.uniform(rows.seeds, at)
        ids = kernels.sample(logits, rows.filters, uniforms)
        report = None
        if rows.n_top is not None:
            report = report_logprobs(raw, ids, [seq.params.logprobs for seq in seqs], rows.n_top)
        return Sampled(ids, kernels.to_host(ids), report)

    def _row_params(self, seqs: list[Sequence]) -> RowParams:
        params = [seq.params for seq in seqs]
        asked = [p.logprobs for p in params if p.logprobs is not None]
        seeds, *filters = kernels.to_device(
            self.device,
            np.array([seq.seed for seq in seqs], np.int64),
            np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
            np.array([p.top_k for p in params], np.int64),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
        )
        return RowParams(
            filters=kernels.Filters(*filters),
            seeds=seeds,
            any_random=any(not p.greedy for p in params),
            any_penalised=any(p.penalised for p in params),
            n_top=max(asked) if asked else None,
        )

    def _penalise(self, logits: Tensor, seqs: list[Sequence], positions: list[int]) -> None:
        """Change the few logits that biases, penalties and bans touch, all rows in one operation."""
        entries: list[tuple[int, int, float, float, float]] = []
        for row, (seq, position) in enumerate(zip(seqs, positions, strict=True)):
            if seq.params.penalised:
                entries += [(row, *entry) for entry in _penalties(seq, position)]
        if entries:
            dtypes = np.int64, np.int64, np.float32, np.float32, np.float32
            columns = (
                np.array(column, dtype) for column, dtype in zip(zip(*entries, strict=True), dtypes, strict=True)
            )
            kernels.apply_penalties(logits, *kernels.to_device(self.device, *columns))


def _penalties(seq: Sequence, position: int) -> list[tuple[int, float, float, float]]:
    """(token, bias, repetition, subtract) for every token whose logit changes."""
    p = seq.params
    counts = Counter(seq.token_ids[seq.n_prompt :] if p.presence_penalty or p.frequency_penalty else [])
    repeated = set(seq.token_ids) if p.repetition_penalty != 1.0 else set()
    banned = seq.stop_ids if position - seq.n_prompt < p.min_tokens else frozenset[int]()
    return [
        (
            token,
            -math.inf if token in banned else p.logit_bias.get(token, 0.0),
            max(p.repetition_penalty, MIN_PENALTY) if token in repeated else 1.0,
            p.presence_penalty + p.frequency_penalty * counts[token] if token in counts else 0.0,
        )
        for token in {*p.logit_bias, *counts, *repeated, *banned}
    ]


def report_logprobs(logits: Tensor, token_ids: Tensor, wanted: list[int | None], n_top: int) -> Report:
    """Logprobs of one token per row and of the best ones; wanted[row] = how many, None = no report for the row."""
    tensors = token_ids, *kernels.token_logprobs(logits, token_ids, n_top)
    return Report(tuple(map(kernels.to_host, tensors)), wanted)
