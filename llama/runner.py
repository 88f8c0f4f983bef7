"""`Runner`: weights, cache and sampler in one hand. `launch(plan)` starts a step; only the engine thread calls it.

On CUDA nothing in a launch waits for the device: inputs come from pinned memory, results go there, and tokens that the
step before has not delivered yet are taken over on the device. So the next step can be launched while one runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

import kernels
from llama.batch import Batch, LastStep
from llama.cache import KVCache
from llama.compiled_batch import CompiledBatch
from llama.compiled_row import CompiledRow
from llama.decode_graphs import DecodeGraphs
from llama.model import Transformer
from llama.prompt_graphs import PromptGraphs
from llama.sampler import Report, Sampled, Sampler, report_logprobs
from llama.scheduler import Plan
from llama.sequence import Sequence, TokenLogprobs

log = logging.getLogger("llama")

# Logits of prompt positions are made this many rows at a time, so that their memory does not grow with the prompt.
_PROMPT_ROWS = 256


@dataclass(slots=True)
class StepResult:
    """For each sequence of the plan: its new token (None: none yet; -1: its logits are not finite) and its logprobs."""

    tokens: list[int | None]
    logprobs: list[TokenLogprobs | None]


@dataclass(slots=True)
class Wanted:
    """Which rows of a step's batch need logits. rows: of the sampled sequences first, then of the prompt spans.

    sampled: places in the plan. prompts: (sequence, first position, how many), for prompt logprobs.
    """

    rows: list[int]
    sampled: list[int]
    prompts: list[tuple[Sequence, int, int]]


def wanted_rows(plan: Plan) -> Wanted:
    """The row of position p predicts p + 1."""
    rows, sampled, prompts = [], [], []
    prompt_rows: list[int] = []
    row = 0
    for i, (seq, first, n) in enumerate(zip(plan.seqs, plan.firsts, plan.counts, strict=True)):
        if plan.yields[i]:
            sampled.append(i)
            rows.append(row + n - 1)
        if seq.params.prompt_logprobs is not None:
            begin = max(first, len(seq.prompt_logprobs))  # what an earlier run reported is not reported again
            end = min(first + n, seq.n_prompt - 1)
            if begin < end:
                prompts.append((seq, begin, end - begin))
                prompt_rows += range(row + begin - first, row + end - first)
        row += n
    return Wanted(rows + prompt_rows, sampled, prompts)


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was launched. places: of the sequences in the plan that yield a token, in the order of `sampled`.

    prompts: logprobs for their sequences' prompts. done: recorded behind everything; None on the CPU.
    """

    n_seqs: int
    places: list[int]
    sampled: Sampled | None
    prompts: list[tuple[Sequence, Report]]
    done: torch.cuda.Event | None

    def result(self) -> StepResult:
        """Wait until the step is computed. Appends to the `prompt_logprobs` of sequences that asked for them."""
        if self.done is not None:
            self.done.synchronize()
        result = StepResult([None] * self.n_seqs, [None] * self.n_seqs)
        if self.sampled is not None:
            tokens, logprobs = self.sampled.read()
            for i, token, logprob in zip(self.places, tokens, logprobs, strict=True):
                result.tokens[i], result.logprobs[i] = token, logprob
        for seq, report in self.prompts:
            seq.prompt_logprobs += [entry for entry in report.read() if entry is not None]
        return result


class Runner:
    """decode_graphs, prompt_graphs, compiled: run the steps they serve, where given; every other step runs kernel by
    kernel.

    threads: CPU threads of one operation in steps of more than one_thread_rows rows; smaller steps use one.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        device: torch.device,
        decode_graphs: DecodeGraphs | None = None,
        prompt_graphs: PromptGraphs | None = None,
        compiled: Collection[CompiledRow | CompiledBatch] = (),
        threads: int = 1,
        one_thread_rows: int = 0,
    ) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.decode_graphs, self.prompt_graphs, self.compiled = decode_graphs, prompt_graphs, list(compiled)
        self.threads, self.one_thread_rows = threads, one_thread_rows
        self.sampler = Sampler(device)
        self._last: LastStep | None = None

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Start computing the plan's tokens and sampling one for each sequence that yields one. Returns what waits for
        the result.

        Tokens that the plan computes and its sequences lack are those that the last launched step yields.
        """
        sampled, logits, prompts = None, None, []
        self._set_threads(plan.n_tokens)
        places = list(range(len(plan.seqs)))
        if self.decode_graphs is not None and self.decode_graphs.serves(plan):
            logits = self.decode_graphs.run(plan, self._last)
        if logits is None:
            wanted = wanted_rows(plan)
            places = wanted.sampled
            logits = None if wanted.prompts else self._run_whole(plan, wanted.rows)
            if logits is None:
                hidden = self._forward(plan, wanted)
                row = len(places)
                for seq, begin, n in wanted.prompts:
                    prompts += self._report_prompt(seq, begin, hidden[row : row + n])
                    row += n
                if places:
                    logits = self.model.logits(hidden[: len(places)])
        self._last = None
        if logits is not None and places:
            seqs = [plan.seqs[i] for i in places]
            sampled = self.sampler.sample(logits, seqs, [plan.firsts[i] + plan.counts[i] for i in places])
            self._last = LastStep(sampled.device_ids, seqs)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return PendingStep(len(plan.seqs), places, sampled, prompts, done).result

    def _run_whole(self, plan: Plan, rows: list[int]) -> torch.Tensor | None:
        """Logits of those rows, which are of the sequences that yield a token, if a graph or compiled layers serve the
        plan. Compiled ones that fail once (they may have to be compiled again, when others have reset the compiler) are
        not asked again."""
        if self.prompt_graphs is not None and self.prompt_graphs.serves(plan):
            logits = self.prompt_graphs.run(plan, rows, self._last)
            if logits is not None:
                return logits
        for steps in self.compiled:
            if steps.serves(plan):
                try:
                    return steps.run(plan)
                except Exception:
                    log.warning("compiled steps failed; from now on they run operator by operator", exc_info=True)
                    self.compiled = [other for other in self.compiled if other is not steps]
                    return None
        return None

    def _forward(self, plan: Plan, wanted: Wanted) -> torch.Tensor:
        """The hidden rows that are wanted [len(wanted.rows), dim], kernel by kernel."""
        batch = Batch.from_plan(plan, wanted.rows, self.cache.block_size, self.device, self._last)
        return self.model.forward(batch, self.cache)

    def _set_threads(self, n_rows: int) -> None:
        threads = 1 if n_rows <= self.one_thread_rows else self.threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _report_prompt(self, seq: Sequence, begin: int, hidden: torch.Tensor) -> list[tuple[Sequence, Report]]:
        """Logprobs of the prompt tokens after positions begin, begin + 1, ... of the sequence."""
        n_top = seq.params.prompt_logprobs
        assert n_top is not None
        reports = []
        for at in range(0, len(hidden), _PROMPT_ROWS):
            part = hidden[at : at + _PROMPT_ROWS]
            first = begin + at + 1
            (ids,) = kernels.upload(self.device, np.array(seq.token_ids[first : first + len(part)], np.int64))
            reports.append((seq, report_logprobs(self.model.logits(part), ids, [n_top] * len(part), n_top)))
        return reports
