"""Prompts and outputs of fixed lengths, all queued at once: output tokens per second beside the machine's limit."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

import bench_figures
import bench_model
import roofline_plot
from bench_figures import OURS, Figure
from bench_machine import machine_title, measure_ceilings
from bench_model import make_engine, model_config, model_format, model_title, random_prompt
from bench_sides import Ours
from roofline import Card, serving_rate, serving_work

MOST_REQUESTS = 1024  # that "fit"
SHAPES = ("128/128", "128/2048", "500/2000", "1000/1000", "2048/128", "2048/2048")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser, rounds=3)
    roofline_plot.add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="tokens in / tokens out")
    parser.add_argument(
        "--requests",
        type=request_count,
        default=256,
        help="of each shape; 'fit': what the KV cache holds (default: 256)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the lengths by this, for small machines")


def request_count(text: str) -> int | None:
    """A number, or None for as many as fit."""
    if text == "fit":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of at least 1 nor 'fit'")
    return int(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype}
    before = measure_ceilings(args.device, args.dtype)
    measured = {shape: measure(args, shape) for shape in args.shapes}
    after = measure_ceilings(args.device, args.dtype)
    ceilings, moved = before.best(after), before.moved(after, args.max_spread)
    found["ceilings"] = ceilings.report()
    if moved:
        print(moved)
        found["refused"] = moved
    points: list[roofline_plot.Point] = []
    print(f"{args.requests or 'as many as fit'} requests at once, lengths x {args.scale}: {model_title(args)}")
    print(
        f"{'in/out':>10} {'requests':>9} {'output tok/s':>13} {'spread':>7} {'sequences':>10} {'limit':>9} {'share':>6}"
    )
    for shape, one in measured.items():
        found[shape] = one if isinstance(one, str) else line(args, shape, one, ceilings.card, moved is None)
        if isinstance(one, str):
            print(f"{shape:>10} {one}")
        else:
            work = serving_work(model_config(args), model_format(args), one.sequences, one.isl, one.osl)
            tokens = one.sequences * one.osl
            points += roofline_plot.points(shape, {OURS: one.figure}, work, tokens, args.max_spread)
    if args.plot and not moved:
        roofline_plot.draw(args.plot, model_title(args), machine_title(args.device), ceilings.card, points)
    return found


def line(args: argparse.Namespace, shape: str, one: Measured, card: Card, steady: bool) -> dict[str, Any]:
    """A line of the table, and the same by name. steady: the ceilings did not move, so a share can be told."""
    limit = serving_rate(model_config(args), card, model_format(args), one.sequences, one.isl, one.osl)
    share = one.figure.median / limit if steady else None
    told = f"{share:.0%}" if share is not None else "-"
    figure = f"{one.figure.median:>13.1f} {one.figure.spread:>7.0%}"
    print(f"{shape:>10} {one.requests:>9} {figure} {one.sequences:>10.0f} {limit:>9.0f} {told:>6}")
    return {
        "requests": one.requests,
        "output_tok_s": round(one.figure.median, 1),
        "spread": round(one.figure.spread, 3),
        "rounds": len(one.figure.values),
        "sequences": round(one.sequences),
        "limit": round(limit, 1),
        "share": share and round(share, 3),
    }


@dataclass(frozen=True)
class Measured:
    """Output tokens/s of `requests` with isl tokens in and osl out, at most `sequences` of them there at a time."""

    figure: Figure
    requests: int
    sequences: float
    isl: int
    osl: int


def measure(args: argparse.Namespace, shape: str) -> Measured | str:
    """Or why there is no figure."""
    config, dice = model_config(args), random.Random(5)
    isl, osl = (max(2, round(int(part) * args.scale)) for part in shape.split("/"))
    if isl + osl > config.max_seq_len:
        return f"{isl} + {osl} tokens are more than the context of {config.max_seq_len}"
    slots = args.requests or MOST_REQUESTS
    with make_engine(args, slots, isl + osl, args.batch_invariant, max_batch_seqs=slots, whole_card=True) as engine:
        cached = engine.memory_plan.kv_tokens
        requests = args.requests or max(1, min(slots, cached // (isl + osl)))
        prompts = [random_prompt(config, isl, dice) for _ in range(requests)]
        ours = Ours(engine)
        ours.batch(prompts[:2], [min(4, osl)] * len(prompts[:2]), 2)
        figure = Figure([ours.batch(prompts, [osl] * requests, requests) for _ in range(args.rounds)])
    return figure.noise(args.max_spread) or Measured(
        figure, requests, min(requests, cached / (isl + osl / 2)), isl, osl
    )
