"""One request alone: time to first token, prefill and decode rates, beside transformers and the machine's limits."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import roofline_plot
from benchmarks.figures import OURS, Figure, Repeats, add_round_arguments, alternate, beside
from benchmarks.machine import machine_title, measure_ceilings
from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, random_prompt
from benchmarks.peers import add_peer_arguments, transformers_or_none
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side, our_sides
from llama_slots.roofline import Card, decode_rate, decode_work, prefill_seconds, prefill_work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_peer_arguments(parser)
    add_round_arguments(parser)
    roofline_plot.add_plot_argument(parser)
    parser.add_argument("--tokens", type=int, default=128, help="to decode")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="before the decoded ones")
    parser.add_argument(
        "--ttft", type=int, nargs="*", default=[128, 512, 2048], help="prompts to time the first token of"
    )


@dataclass(frozen=True)
class Options:
    """tokens: to decode, after prompt_tokens. ttft: lengths of the prompts whose first token is timed."""

    model: BenchModel
    repeats: Repeats
    peers: bool
    plot: Path | None
    tokens: int
    prompt_tokens: int
    ttft: list[int]

    @property
    def context(self) -> float:
        """The mean number of tokens in the cache while decoding."""
        return self.prompt_tokens + self.tokens / 2


def run(args: argparse.Namespace) -> dict[str, Any]:
    sizes = (args.tokens, args.prompt_tokens, args.ttft)
    return measure(Options(BenchModel.of(args), Repeats.of(args), args.peers, args.plot, *sizes))


def measure(options: Options) -> dict[str, Any]:
    model, rounds, max_spread = options.model, options.repeats.rounds, options.repeats.max_spread
    config, kept, dice = model.config, model.format, random.Random(1)
    prompts = [random_prompt(config, n, dice) for n in options.ttft if n < config.max_seq_len]
    prompt = random_prompt(config, options.prompt_tokens, dice)
    longest = max(options.prompt_tokens + options.tokens, *(len(timed) + 1 for timed in prompts), 1)
    before = measure_ceilings(model.device, model.dtype)
    with (
        transformers_or_none(model, options.peers, 1, longest) as (peers, refused, folder),
        RemoteSides(our_sides, model, 1, longest, folder) as ours,
    ):
        sides: list[Side] = [*ours, *peers]
        decode = alternate({side.name: partial(side.decode, prompt, options.tokens) for side in sides}, rounds)
        prefill = [alternate({side.name: partial(side.prefill, timed) for side in sides}, rounds) for timed in prompts]
        after = measure_ceilings(model.device, model.dtype)
    ceilings, moved = before.best(after), before.moved(after, max_spread)
    report: dict[str, Any] = {**model.facts, "ceilings": ceilings.report()}
    if moved:
        print(moved)
        report["refused"] = moved
    about = f"decode after {options.prompt_tokens} tokens: {model.title}"
    report["decode"] = beside(about, decode, "tok/s", max_spread, refused)
    report["decode"] |= _decode_limit(options, ceilings.card, decode[OURS], moved is None)
    points = roofline_plot.points("decode", decode, decode_work(config, kept, 1, options.context), 1, max_spread)
    for n, figures in zip(map(len, prompts), prefill, strict=True):
        about = f"prefill of {n}"
        report[f"prefill_{n}"] = beside(f"{about} tokens: {model.title}", figures, "tok/s", max_spread, refused)
        report[f"prefill_{n}"] |= _prefill_limit(options, ceilings.card, figures, n, moved is None)
        points += roofline_plot.points(about, figures, prefill_work(config, kept, n), n, max_spread)
    if options.plot and not moved:
        roofline_plot.draw(options.plot, model.title, machine_title(model.device), ceilings.card, points)
    return report


def _decode_limit(options: Options, card: Card, ours: Figure, steady: bool) -> dict[str, Any]:
    """steady: the ceilings did not move, so that a share of them means something."""
    config, kept = options.model.config, options.model.format
    nbytes = decode_work(config, kept, 1, options.context).nbytes
    limit = decode_rate(config, card, kept, 1, options.context)
    report = {"MB_per_token": round(nbytes / 1e6, 1), "limit": round(limit, 1)}
    if not steady or ours.noise(options.repeats.max_spread):
        print(f"  {nbytes / 1e6:.1f} MB per token; the limit is {limit:.0f} tok/s")
        return report
    share = ours.median * nbytes / card.bandwidth
    print(f"  {nbytes / 1e6:.1f} MB per token: {share:.0%} of the read bandwidth; the limit is {limit:.0f} tok/s")
    return report | {"share_of_bandwidth": round(share, 3)}


def _prefill_limit(options: Options, card: Card, figures: dict[str, Figure], n: int, steady: bool) -> dict[str, Any]:
    limit = n / prefill_seconds(options.model.config, card, options.model.format, n)
    max_spread = options.repeats.max_spread
    rates = {name: figure.median for name, figure in figures.items() if not figure.noise(max_spread)}
    ttft = {name: round(n / rate * 1e3, 2) for name, rate in rates.items()}
    report = {"ttft_ms": ttft, "limit": round(limit, 1)}
    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in ttft.items()) or "of none: too noisy"
    if not steady or OURS not in rates:
        print(f"  TTFT {told}; the limit is {limit:.0f} tok/s")
        return report
    share = rates[OURS] / limit
    print(f"  TTFT {told}; {share:.0%} of {limit:.0f} tok/s")
    return report | {"share": round(share, 3)}
