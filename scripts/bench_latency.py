"""One request alone: time to first token, prefill and decode rates, beside transformers and the machine's limits."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import Any

import bench_figures
import bench_model
import bench_peers
import roofline_plot
from bench_figures import OURS, Figure, alternate, beside
from bench_machine import machine_title, measure_ceilings
from bench_model import model_config, model_format, model_title, random_prompt
from bench_peers import transformers_or_none
from bench_remote import RemoteSides
from bench_sides import Side, our_sides
from roofline import Card, decode_rate, decode_work, prefill_seconds, prefill_work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_peers.add_arguments(parser)
    bench_figures.add_arguments(parser)
    roofline_plot.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=128, help="to decode")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="before the decoded ones")
    parser.add_argument(
        "--ttft", type=int, nargs="*", default=[128, 512, 2048], help="prompts to time the first token of"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    config, kept, dice = model_config(args), model_format(args), random.Random(1)
    prompts = [random_prompt(config, n, dice) for n in args.ttft if n < config.max_seq_len]
    prompt = random_prompt(config, args.prompt_tokens, dice)
    longest = max(args.prompt_tokens + args.tokens, *(len(one) + 1 for one in prompts), 1)
    before = measure_ceilings(args.device, args.dtype)
    with (
        transformers_or_none(args, 1, longest) as (peers, refused, folder),
        RemoteSides(our_sides, args, 1, longest, args.batch_invariant, folder) as ours,
    ):
        sides: list[Side] = [*ours, *peers]
        decode = alternate({side.name: partial(side.decode, prompt, args.tokens) for side in sides}, args.rounds)
        prefill = [alternate({side.name: partial(side.prefill, one) for side in sides}, args.rounds) for one in prompts]
        after = measure_ceilings(args.device, args.dtype)
    ceilings, moved = before.best(after), before.moved(after, args.max_spread)
    title, context = model_title(args), args.prompt_tokens + args.tokens / 2
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype, "ceilings": ceilings.report()}
    if moved:
        print(moved)
        found["refused"] = moved
    about = f"decode after {args.prompt_tokens} tokens: {title}"
    found["decode"] = beside(about, decode, "tok/s", args.max_spread, refused)
    found["decode"] |= _decode_limit(args, ceilings.card, decode[OURS], moved is None)
    points = roofline_plot.points("decode", decode, decode_work(config, kept, 1, context), 1, args.max_spread)
    for one, figures in zip(prompts, prefill, strict=True):
        n, what = len(one), f"prefill of {len(one)}"
        found[f"prefill_{n}"] = beside(f"{what} tokens: {title}", figures, "tok/s", args.max_spread, refused)
        found[f"prefill_{n}"] |= _prefill_limit(args, ceilings.card, figures, n, moved is None)
        points += roofline_plot.points(what, figures, prefill_work(config, kept, n), n, args.max_spread)
    if args.plot and not moved:
        roofline_plot.draw(args.plot, title, machine_title(args.device), ceilings.card, points)
    return found


def _decode_limit(args: argparse.Namespace, card: Card, ours: Figure, steady: bool) -> dict[str, Any]:
    """steady: the ceilings did not move, so a share of them can be told."""
    config, kept = model_config(args), model_format(args)
    context = args.prompt_tokens + args.tokens / 2
    nbytes = decode_work(config, kept, 1, context).nbytes
    limit = decode_rate(config, card, kept, 1, context)
    found = {"MB_per_token": round(nbytes / 1e6, 1), "limit": round(limit, 1)}
    if not steady or ours.noise(args.max_spread):
        print(f"  {nbytes / 1e6:.1f} MB per token; the limit is {limit:.0f} tok/s")
        return found
    share = ours.median * nbytes / card.bandwidth
    print(f"  {nbytes / 1e6:.1f} MB per token: {share:.0%} of the read bandwidth; the limit is {limit:.0f} tok/s")
    return found | {"share_of_bandwidth": round(share, 3)}


def _prefill_limit(
    args: argparse.Namespace, card: Card, figures: dict[str, Figure], n: int, steady: bool
) -> dict[str, Any]:
    limit = n / prefill_seconds(model_config(args), card, model_format(args), n)
    rates = {name: figure.median for name, figure in figures.items() if not figure.noise(args.max_spread)}
    ttft = {name: round(n / rate * 1e3, 2) for name, rate in rates.items()}
    found = {"ttft_ms": ttft, "limit": round(limit, 1)}
    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in ttft.items()) or "of none: too noisy"
    if not steady or OURS not in rates:
        print(f"  TTFT {told}; the limit is {limit:.0f} tok/s")
        return found
    share = rates[OURS] / limit
    print(f"  TTFT {told}; {share:.0%} of {limit:.0f} tok/s")
    return found | {"share": round(share, 3)}
