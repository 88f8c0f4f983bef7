"""`Runner`: weights, cache and sampler in one hand. `run(plan)` computes a step; only the engine thread calls it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama.batch import Batch
from llama.cache import KVCache
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


class Runner:
    def __init__(self, model: Transformer, cache: KVCache, device: torch.device, batch_invariant: bool) -> None:
        self.model, self.cache, self.device, self.batch_invariant = model, cache, device, batch_invariant
        self.sampler = Sampler(device)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute the plan's tokens and sample one for every sequence that reaches its last one."""
        sampled: list[int] = []  # places in the plan
        rows: list[int] = []  # rows of the batch whose logits are wanted: first the sampled ones
        prompt_rows: list[tuple[Sequence, int, int]] = []  # (sequence, first position, row of it)
        row = 0
        for i, (seq, n) in enumerate(zip(plan.seqs, plan.counts, strict=True)):
            if seq.num_computed + n == len(seq.token_ids) < seq.max_len:
                sampled.append(i)
                rows.append(row + n - 1)
            if seq.params.prompt_logprobs is not None and seq.num_computed < seq.n_prompt:
                prompt_rows.append((seq, seq.num_computed, row))
            row += n
        n_sampled = len(rows)
        spans = []
        for seq, first, start in prompt_rows:
            # The row of position p predicts token p + 1; what an earlier run reported is not reported again.
            begin = max(first, len(seq.prompt_logprobs))
            end = min(first + plan.counts[plan.seqs.index(seq)], seq.n_prompt - 1)
            if begin < end:
                spans.append((seq, begin, len(rows)))
                rows += range(start + begin - first, start + end - first)
        batch = Batch.from_plan(plan, rows, self.cache.block_size, self.device, self.batch_invariant)
        hidden = self.model.forward(batch, self.cache)

        result = StepResult([None] * len(plan.seqs), [None] * len(plan.seqs))
        if sampled:
            logits = self.model.logits(hidden[:n_sampled])
            tokens, logprobs = self.sampler.sample(logits, [plan.seqs[i] for i in sampled])
            for i, token, logprob in zip(sampled, tokens, logprobs, strict=True):
                result.tokens[i], result.logprobs[i] = token, logprob
        ends = [start for _, _, start in spans[1:]] + [len(rows)]
        for (seq, begin, start), end in zip(spans, ends, strict=True):
            self._report_prompt(seq, begin, hidden[start:end])
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
