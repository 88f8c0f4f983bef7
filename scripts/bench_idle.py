"""How long a card waits between decode steps: the gaps between what runs on it, by torch's profiler."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterable
from typing import Any

import bench_model
import torch
from bench_model import greedy, make_engine, model_config, model_title, random_prompt
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    parser.add_argument("--sequences", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=100, help="of each sequence")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ends the command where there is no CUDA device: on the CPU nothing waits."""
    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        raise SystemExit("bench idle: needs --device cuda, and a card")
    config, dice = model_config(args), random.Random(10)
    prompts = [random_prompt(config, args.prompt_tokens, dice) for _ in range(args.sequences)]
    with make_engine(args, args.sequences, args.prompt_tokens + args.tokens, args.batch_invariant) as engine:
        engine.generate(prompts, greedy(args.tokens))
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            engine.generate(prompts, greedy(args.tokens))
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in watched.events() or []
        if event.device_type == DeviceType.CUDA
    ]
    found = between_steps(spans, args.tokens)
    print(f"{args.sequences} sequences, {args.tokens} decode steps: {model_title(args)}")
    print(f"  idle between steps {found['idle_us']:.1f} us (median), {found['idle_share']:.1%} of all the time")
    return {"model": args.model or args.shape, "dtype": args.dtype, **found}


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
