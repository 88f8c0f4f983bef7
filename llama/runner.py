"""`Runner`: weights, cache and sampler. `launch(plan)` starts a step; only the engine thread calls it.

On CUDA no launch waits for the device, so the next step can be launched while one runs: inputs come from pinned memory,
results go there. A planned token that its sequence does not have yet is the one sampled by the previous step; it is
read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import kernels
from llama.batch import Batch, BlockTables, LastStep, PromptSpan, Step
from llama.cache import KVCache
from llama.model import Transformer
from llama.sampler import Sampled, Sampler, report_logprobs
from llama.scheduler import Plan
from llama.sequence import TokenLogprobs

# Logits of prompt positions are made this many rows at a time, so that their memory does not grow with the prompt.
_PROMPT_ROWS = 256


@dataclass(slots=True)
class StepResult:
    """For each sequence of the plan: its new token (None: none yet; -1: its logits are not finite) and its logprobs."""

    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was launched. done: recorded behind everything; None on the CPU."""

    step: Step
    sampled: Sampled | None
    done: torch.cuda.Event | None

    def result(self) -> StepResult:
        """Wait until the step is computed. Appends to the `prompt_logprobs` of sequences that asked for them."""
        if self.done is not None:
            self.done.synchronize()
        n_seqs = len(self.step.plan.seqs)
        result = StepResult([None] * n_seqs, [None] * n_seqs)
        if self.sampled is not None:
            for i, token, logprobs in zip(self.step.sampled, *self.sampled.read(), strict=True):
                result.tokens[i], result.logprobs[i] = token, logprobs
        for span in self.step.prompt_spans:
            for report in span.reports:
                span.seq.prompt_logprobs += [entry for entry in report.read() if entry is not None]
        return result


class Executor(Protocol):
    """One way to compute steps. The runner takes the first one that serves a step."""

    def serves(self, step: Step) -> bool: ...

    def run(self, step: Step, last: LastStep | None) -> Tensor | None:
        """Write the K/V of the step's rows. Returns the logits of its sampled rows, [n, vocab_size] fp32, valid until
        the next run of any executor; None if it samples none. last: has the tokens not read yet."""
        ...


class PlainExecutor:
    """Serves every step, operation by operation; the only one that reports on prompts."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache, self.device = model, cache, model.embedding.device

    def serves(self, step: Step) -> bool:
        return True

    def run(self, step: Step, last: LastStep | None) -> Tensor | None:
        hidden = self.model.forward(Batch.of(step, step.logit_rows, self.device, last), self.cache)
        row = n_sampled = len(step.sampled)
        for span in step.prompt_spans:
            self._report(span, hidden[row : row + span.n])
            row += span.n
        return self.model.logits(hidden[:n_sampled]) if n_sampled else None

    def _report(self, span: PromptSpan, hidden: Tensor) -> None:
        n_top = span.seq.params.prompt_logprobs
        assert n_top is not None
        for i in range(0, span.n, _PROMPT_ROWS):
            rows = hidden[i : i + _PROMPT_ROWS]
            begin = span.first + i + 1
            (ids,) = kernels.to_device(self.device, np.array(span.seq.token_ids[begin : begin + len(rows)], np.int64))
            span.reports.append(report_logprobs(self.model.logits(rows), ids, [n_top] * len(rows), n_top))


class Runner:
    """executors: asked in order before the plain one.

    threads: CPU threads of one operation in steps of more than one_thread_rows rows; smaller steps use one.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        executors: SequenceOf[Executor] = (),
        threads: int = 1,
        one_thread_rows: int = 0,
    ) -> None:
        self.model, self.cache = model, cache
        self.executors: list[Executor] = [*executors, PlainExecutor(model, cache)]
        self.threads, self.one_thread_rows = threads, one_thread_rows
        self.sampler = Sampler(model.embedding.device)
        self._tables = BlockTables()
        self._last: LastStep | None = None

    @torch.inference_mode()
    def launch(self, plan: Plan) -> PendingStep:
        """Start computing the plan's tokens and sampling one for each sequence that yields one."""
        step, sampled, done = Step.of(plan, self._tables, self.cache.block_size, self._last), None, None
        self._set_threads(step.n_rows)
        executor = next(executor for executor in self.executors if executor.serves(step))
        logits = executor.run(step, self._last)
        self._last = None
        if logits is not None:
            seqs = [plan.seqs[i] for i in step.sampled]
            sampled = self.sampler.sample(logits, seqs, [plan.firsts[i] + plan.counts[i] for i in step.sampled])
            self._last = LastStep(sampled.device_ids, seqs)
        if self.sampler.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return PendingStep(step, sampled, done)

    def _set_threads(self, n_rows: int) -> None:
        threads = 1 if n_rows <= self.one_thread_rows else self.threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
