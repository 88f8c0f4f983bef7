"""A runner that computes nothing, to measure everything else."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llama.runner import StepResult
from llama.scheduler import Plan


@dataclass(frozen=True, slots=True)
class Computed:
    """A step whose result is known when it is launched."""

    known: StepResult

    def result(self) -> StepResult:
        return self.known


class FakeRunner:
    """In the model's place: every sequence that yields gets the next of token_ids, after `step` seconds."""

    def __init__(self, token_ids: list[int], step: float = 0.0) -> None:
        self.token_ids, self.step, self.at = token_ids, step, 0

    def launch(self, plan: Plan) -> Computed:
        end = time.monotonic() + self.step
        tokens: list[int | None] = []
        for yields in plan.yields:
            self.at = (self.at + 1) % len(self.token_ids)
            tokens.append(self.token_ids[self.at] if yields else None)
        if self.step:
            time.sleep(max(end - time.monotonic(), 0))
        return Computed(StepResult(tokens, [None] * len(tokens)))
