"""How long a card waits between decode steps: the gaps between what runs on it, by torch's profiler."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, greedy, make_engine, random_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    parser.add_argument("--sequences", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100, help="of each sequence")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ends the command where there is no CUDA device: a CPU computes steps, it does not wait for them."""
    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        raise SystemExit("bench idle: needs --device cuda, and a card")
    return measure(BenchModel.of(args), args.sequences, args.prompt_tokens, args.tokens)


def measure(model: BenchModel, n_seqs: int, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Profile decode steps of `n_seqs` sequences; prints and returns how long the card waited between them."""
    config, dice = model.config, random.Random(10)
    prompts = [random_prompt(config, prompt_tokens, dice) for _ in range(n_seqs)]
    with make_engine(model, n_seqs, prompt_tokens + tokens) as engine:
        engine.generate(prompts, greedy(tokens))
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            engine.generate(prompts, greedy(tokens))
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in watched.events() or []
        if event.device_type == DeviceType.CUDA
    ]
    idle = between_steps(spans, tokens)
    print(f"{n_seqs} sequences, {tokens} decode steps: {model.title}")
    print(f"  idle between steps {idle['idle_us']:.1f} us (median), {idle['idle_share']:.1%} of all the time")
    return {**model.facts, **idle}


def between_steps(spans: Iterable[tuple[float, float]], steps: int) -> dict[str, Any]:
    """idle_us: the median of the `steps` longest gaps between spans, which are (start, end) in microseconds.

    idle_share: all gaps together, of the time from the first start to the last end. Raises ValueError without a gap.
    """
    gaps: list[float] = []
    ranked = sorted(spans)
    if not ranked:
        raise ValueError("the profiler saw nothing run on the card")
    begin, end = ranked[0][0], ranked[0][1]
    for start, stop in ranked[1:]:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    if not gaps:
        raise ValueError("nothing waited: there is no gap to measure")
    longest = sorted(gaps, reverse=True)[:steps]
    return {"idle_us": round(statistics.median(longest), 2), "idle_share": round(sum(gaps) / (end - begin), 4)}
