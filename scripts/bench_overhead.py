"""Python per step and per token: the whole engine loop with a runner that computes nothing.

Scheduling, detokenizing, two stop strings and streaming out, all in one thread.
"""

from __future__ import annotations

import argparse
import random
import time
from queue import SimpleQueue
from typing import Any

from bench_figures import Figure
from fake_runner import FakeRunner

from llama.blocks import BlockPool
from llama.detokenizer import Detokenizer
from llama.loop import EngineLoop
from llama.request import Request, SamplingParams
from llama.scheduler import Scheduler
from llama.sequence import Sequence
from llama.setup import find_model
from llama.stream import Mailbox
from llama.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="whose tokenizer makes the text")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Scheduling, detokenizing, two stop strings and streaming out, all in one thread, per token and per step."""
    vocabulary = Tokenizer(find_model(args.model) / "tokenizer.model").vocabulary
    words = [i for i, text in enumerate(vocabulary.texts) if text is not None]
    picked = random.Random(0).choices(words, k=100_003)

    def once(n_seqs: int, n_tokens: int) -> tuple[float, float]:
        per_seq = -(-(n_tokens + 2) // 64)
        loop = EngineLoop(Scheduler(BlockPool(n_seqs * per_seq + 1, 64), 2048, 256), FakeRunner(picked), SimpleQueue())
        mailboxes = []
        for i in range(n_seqs):
            params = SamplingParams(max_tokens=n_tokens, stop=("\n\n\n\n", "#### end"))
            prompt = [1, words[i % len(words)]]
            mailboxes.append(Mailbox(1, None, lambda _: None))
            seq = Sequence(Request([prompt], params), 0, prompt, 2, 2 + n_tokens, i, frozenset([2]))
            text = Detokenizer(vocabulary, skip_first_mark=True, stop=tuple(params.stop))
            loop.add(mailboxes[-1], [(seq, text)])
        start, got = time.perf_counter(), 0
        while loop.scheduler.has_work:
            loop.step()
            for mailbox in mailboxes:
                while mailbox.deltas:
                    got += len(mailbox.deltas.popleft().token_ids)
        taken = time.perf_counter() - start
        return taken / got * 1e6, taken / loop.n_steps * 1e6

    once(8, 20)
    found: dict[str, Any] = {}
    print(f"{'sequences':>10} {'us/token':>9} {'us/step':>9} {'tokens/s':>10} {'spread':>7}")
    for n_seqs, n_tokens in ((1, 2000), (30, 400), (256, 100)):
        runs = [once(n_seqs, n_tokens) for _ in range(args.rounds)]
        token, step = Figure([run[0] for run in runs]), Figure([run[1] for run in runs])
        print(f"{n_seqs:>10} {token.median:>9.2f} {step.median:>9.0f} {1e6 / token.median:>10.0f} {token.spread:>6.0%}")
        found[f"us_per_token_{n_seqs}"] = round(token.median, 2)
        found[f"us_per_step_{n_seqs}"] = round(step.median, 1)
    found["tokens_per_s_256"] = round(1e6 / found["us_per_token_256"])
    return found
