"""`Runner`: weights, cache and sampler in one hand. `run(plan)` computes a step; only the engine thread calls it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama.batch import Batch
from llama.cache import KVCache
from llama.graphs import DecodeGraphs
from llama.model import Transformer
from llama.sampler import Sampler, report_logprobs
from llama.scheduler import Plan
from llama.sequence import Sequence, TokenLogprobs

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
    """A sequence that reaches its last token yields one, if it may grow. The row of position p predicts p + 1."""
    rows, sampled, prompts = [], [], []
    prompt_rows: list[int] = []
    row = 0
    for i, (seq, n) in enumerate(zip(plan.seqs, plan.counts, strict=True)):
        first = seq.num_computed
        if first + n == len(seq.token_ids) < seq.max_len:
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


class Runner:
    """graphs: replays decode steps where it is given; every other step runs kernel by kernel.

    threads: CPU threads of one operation in steps of more than one_thread_rows rows; smaller steps use one.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
        threads: int = 1,
        one_thread_rows: int = 0,
    ) -> None:
        self.model, self.cache, self.device, self.graphs = model, cache, device, graphs
        self.threads, self.one_thread_rows = threads, one_thread_rows
        self.sampler = Sampler(device)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute the plan's tokens and sample one for every sequence that reaches its last one."""
        if self.graphs is not None and self.graphs.serves(plan):
            return StepResult(*self.sampler.sample(self.graphs.run(plan), plan.seqs))
        threads = 1 if plan.n_tokens <= self.one_thread_rows else self.threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        wanted = wanted_rows(plan)
        batch = Batch.from_plan(plan, wanted.rows, self.cache.block_size, self.device)
        hidden = self.model.forward(batch, self.cache)
        result = StepResult([None] * len(plan.seqs), [None] * len(plan.seqs))
        if wanted.sampled:
            logits = self.model.logits(hidden[: len(wanted.sampled)])
            tokens, logprobs = self.sampler.sample(logits, [plan.seqs[i] for i in wanted.sampled])
            for i, token, logprob in zip(wanted.sampled, tokens, logprobs, strict=True):
                result.tokens[i], result.logprobs[i] = token, logprob
        row = len(wanted.sampled)
        for seq, begin, n in wanted.prompts:
            self._report_prompt(seq, begin, hidden[row : row + n])
            row += n
        return result

    def _report_prompt(self, seq: Sequence, begin: int, hidden: torch.Tensor) -> None:
        """Append the logprobs of the prompt tokens after positions begin, begin + 1, ... to the sequence."""
        n_top = seq.params.prompt_logprobs
        assert n_top is not None
        for at in range(0, len(hidden), _PROMPT_ROWS):
            part = hidden[at : at + _PROMPT_ROWS]
            first = begin + at + 1
            ids = torch.tensor(seq.token_ids[first : first + len(part)], dtype=torch.int64).to(self.device)
            reports = report_logprobs(self.model.logits(part), ids, [n_top] * len(part), n_top)
            seq.prompt_logprobs += [report for report in reports if report is not None]
