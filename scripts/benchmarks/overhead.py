"""Python per step and per token: the whole engine loop with a runner that computes nothing.

First scheduling, detokenizing, two stop strings and streaming, all in one thread. Then laying a plan out as tensors for
the CPU. Last, full collections of Python's garbage collector: each walks over every object of the process, those of
imported packages too, while all sequences wait. They are rare, so the first table leaves them out.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

import kernels
from benchmarks.fake_runner import FakeRunner
from benchmarks.figures import Figure, Repeats, add_round_arguments
from llama.batch import Batch, BlockTables, Step
from llama.blocks import BlockPool
from llama.detokenizer import Detokenizer
from llama.loop import EngineLoop
from llama.request import Request, SamplingParams
from llama.scheduler import Plan, Scheduler
from llama.sequence import Sequence
from llama.setup import find_model
from llama.stream import Mailbox
from llama.tokenizer import Tokenizer

BLOCK_SIZE = 64
BATCHES = ((1, 2000), (30, 400), (256, 100))  # sequences, tokens of each
CONTEXT = 100  # tokens of a sequence whose next step is laid out
LAYOUTS = 200  # in one measurement
COLLECTED_ROUNDS = 20  # full collections are rare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_round_arguments(parser)
    parser.add_argument("--model", default="demo", help="whose tokenizer makes the text")


@dataclass
class Collections:
    """Seconds of each full collection."""

    seconds: list[float] = field(default_factory=list)
    _since: float = 0.0

    def note(self, phase: str, about: dict[str, int]) -> None:
        if about["generation"] < 2:
            return
        if phase == "start":
            self._since = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self._since)


@contextmanager
def collections() -> Iterator[Collections]:
    """The full collections that happen in the block."""
    seen = Collections()
    gc.callbacks.append(seen.note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(seen.note)


@dataclass(frozen=True)
class Run:
    """Microseconds, without `full`: seconds of full collections."""

    per_token: float
    per_step: float
    full: list[float]


class Loop:
    """Runs sequences through the engine loop, nothing computed."""

    def __init__(self, model: str) -> None:
        self.vocabulary = Tokenizer(find_model(model) / "tokenizer.model").vocabulary
        self.words = [i for i, text in enumerate(self.vocabulary.texts) if text is not None]
        self.picked = random.Random(0).choices(self.words, k=100_003)

    def run(self, n_seqs: int, n_tokens: int) -> Run:
        scheduler = make_scheduler(n_seqs, n_tokens + 2)
        loop = EngineLoop(scheduler, FakeRunner(self.picked), SimpleQueue())
        mailboxes = []
        for i in range(n_seqs):
            params = SamplingParams(max_tokens=n_tokens, stop=("\n\n\n\n", "#### end"))
            mailboxes.append(Mailbox(1, None, lambda _: None))
            seq = make_sequence([1, self.words[i % len(self.words)]], params, i)
            text = Detokenizer(self.vocabulary, skip_first_mark=True, stop=tuple(params.stop))
            loop.add(mailboxes[-1], [(seq, text)])
        got = 0
        with collections() as full:
            start = time.perf_counter()
            while loop.scheduler.has_work:
                loop.step()
                for mailbox in mailboxes:
                    while mailbox.deltas:
                        got += len(mailbox.deltas.popleft().token_ids)
            taken = time.perf_counter() - start - sum(full.seconds)
        return Run(taken / got * 1e6, taken / loop.n_steps * 1e6, full.seconds)


def make_scheduler(n_seqs: int, length: int) -> Scheduler:
    """With blocks for so many sequences of so many tokens."""
    per_seq = -(-length // BLOCK_SIZE)
    return Scheduler(BlockPool(n_seqs * per_seq + 1, BLOCK_SIZE), n_seqs * CONTEXT + 2048, max(n_seqs, 256))


def make_sequence(prompt: list[int], params: SamplingParams, index: int) -> Sequence:
    assert params.max_tokens is not None
    length = len(prompt) + params.max_tokens
    return Sequence(Request([prompt], params), 0, prompt, len(prompt), length, index, frozenset([2]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure(args.model, Repeats.of(args))


def measure(model: str, repeats: Repeats) -> dict[str, Any]:
    """model: whose tokenizer makes the text."""
    loop = Loop(model)
    loop.run(8, 20)  # to warm up
    return steps(loop, repeats) | layouts(repeats) | collecting(loop)


def steps(loop: Loop, repeats: Repeats) -> dict[str, Any]:
    """Scheduling to streaming, per token and per step."""
    report: dict[str, Any] = {}
    print(f"{'sequences':>10} {'us/token':>9} {'us/step':>9} {'tokens/s':>10} {'spread':>7}")
    for n_seqs, n_tokens in BATCHES:
        runs = [loop.run(n_seqs, n_tokens) for _ in range(repeats.rounds)]
        token, step = Figure([run.per_token for run in runs]), Figure([run.per_step for run in runs])
        report[f"spread_{n_seqs}"] = round(token.spread, 3)
        if noise := token.noise(repeats.max_spread):
            print(f"{n_seqs:>10} {noise}")
            continue
        print(f"{n_seqs:>10} {token.median:>9.2f} {step.median:>9.0f} {1e6 / token.median:>10.0f} {token.spread:>7.0%}")
        report[f"us_per_token_{n_seqs}"] = round(token.median, 2)
        report[f"us_per_step_{n_seqs}"] = round(step.median, 1)
        report[f"tokens_per_s_{n_seqs}"] = round(1e6 / token.median)
    return report


def layouts(repeats: Repeats) -> dict[str, Any]:
    """`Step.of` and `Batch.of` of a decode step on the CPU, and `plan_attention`, which is part of it."""
    report: dict[str, Any] = {}
    print(f"{'sequences':>10} {'us/step to lay out a batch':>27} {'attention alone':>16} {'spread':>7}")
    for n_seqs, _ in BATCHES:
        whole, attention = time_layout(decode_plan(n_seqs), repeats.rounds)
        report[f"layout_spread_{n_seqs}"] = round(whole.spread, 3)
        if noise := whole.noise(repeats.max_spread):
            print(f"{n_seqs:>10} {noise}")
            continue
        print(f"{n_seqs:>10} {whole.median:>27.1f} {attention.median:>16.1f} {whole.spread:>7.0%}")
        report[f"us_layout_{n_seqs}"] = round(whole.median, 1)
        report[f"us_plan_attention_{n_seqs}"] = round(attention.median, 1)
    return report


def decode_plan(n_seqs: int) -> Plan:
    """The step after the prompts of so many sequences."""
    scheduler = make_scheduler(n_seqs, CONTEXT + 8)
    scheduler.add(make_sequence([1] * CONTEXT, SamplingParams(max_tokens=8), i) for i in range(n_seqs))
    scheduler.commit(scheduler.schedule(), [5] * n_seqs)
    plan = scheduler.schedule()
    assert plan.counts == [1] * n_seqs
    return plan


def time_layout(plan: Plan, rounds: int) -> tuple[Figure, Figure]:
    """Microseconds of the whole batch and of its attention plan."""
    n_seqs, device = len(plan.seqs), torch.device("cpu")
    block_tables = BlockTables()
    tables = block_tables.of(plan.seqs)
    starts, lengths = np.arange(n_seqs + 1, dtype=np.int32), np.array(plan.firsts, np.int32) + 1
    whole, attention = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(LAYOUTS):
            step = Step.of(plan, block_tables, BLOCK_SIZE, None)
            Batch.of(step, step.logit_rows, device, None)
        between = time.perf_counter()
        for _ in range(LAYOUTS):
            kernels.plan_attention(starts, lengths, tables, BLOCK_SIZE, device)
        whole.append((between - start) / LAYOUTS * 1e6)
        attention.append((time.perf_counter() - between) / LAYOUTS * 1e6)
    return Figure(whole[1:]), Figure(attention[1:])  # the first ones warmed up


def collecting(loop: Loop) -> dict[str, Any]:
    """Full collections while 256 sequences run, before and after gc.freeze(), which hides what is loaded by then."""
    n_seqs, n_tokens = BATCHES[-1]
    report: dict[str, Any] = {}
    print(f"full collections in {COLLECTED_ROUNDS * n_tokens} steps of {n_seqs} sequences")
    for name in ("as it is", "after gc.freeze()"):
        gc.collect()
        if name != "as it is":
            gc.freeze()
        objects = len(gc.get_objects())
        full = [seconds for _ in range(COLLECTED_ROUNDS) for seconds in loop.run(n_seqs, n_tokens).full]
        longest = max(full, default=0.0) * 1e3
        print(f"  {name:20} {len(full):>3}, the longest {longest:.2f} ms; {objects} objects to walk over")
        report["gc_frozen" if name != "as it is" else "gc"] = {
            "objects": objects,
            "full_collections": len(full),
            "longest_ms": round(longest, 2),
        }
    gc.unfreeze()
    return report
