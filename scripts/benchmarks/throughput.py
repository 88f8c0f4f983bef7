"""Prompts and outputs of fixed lengths, all queued at once: output tokens per second beside the machine's limit."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import roofline_plot
from benchmarks.figures import OURS, Figure, Repeats, add_round_arguments
from benchmarks.machine import machine_title, measure_ceilings
from benchmarks.model import BenchModel, add_mode_arguments, add_model_arguments, make_engine, random_prompt
from benchmarks.sides import Ours
from llama_slots.roofline import Card, serving_rate, serving_work

MOST_REQUESTS = 1024  # that "fit"
SHAPES = ("128/128", "128/2048", "500/2000", "1000/1000", "2048/128", "2048/2048")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_mode_arguments(parser)
    add_round_arguments(parser, rounds=3)
    roofline_plot.add_plot_argument(parser)
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


@dataclass(frozen=True)
class Options:
    """shapes: "tokens in/tokens out", each shrunk by scale. requests: of each shape; None: what the cache holds."""

    model: BenchModel
    repeats: Repeats
    plot: Path | None
    shapes: list[str]
    requests: int | None
    scale: float


@dataclass(frozen=True)
class Measured:
    """Output tokens/s of `requests` with isl tokens in and osl out; `sequences`: how many the cache held at a time."""

    figure: Figure
    requests: int
    sequences: float
    isl: int
    osl: int


def run(args: argparse.Namespace) -> dict[str, Any]:
    wanted = (args.plot, args.shapes, args.requests, args.scale)
    return measure(Options(BenchModel.of(args), Repeats.of(args), *wanted))


def measure(options: Options) -> dict[str, Any]:
    model, max_spread = options.model, options.repeats.max_spread
    report: dict[str, Any] = model.facts
    before = measure_ceilings(model.device, model.dtype)
    outcomes = {shape: measure_shape(options, shape) for shape in options.shapes}
    after = measure_ceilings(model.device, model.dtype)
    ceilings, moved = before.best(after), before.moved(after, max_spread)
    report["ceilings"] = ceilings.report()
    if moved:
        print(moved)
        report["refused"] = moved
    points: list[roofline_plot.Point] = []
    print(f"{options.requests or 'as many as fit'} requests at once, lengths x {options.scale}: {model.title}")
    print(
        f"{'in/out':>10} {'requests':>9} {'output tok/s':>13} {'spread':>7} {'sequences':>10} {'limit':>9} {'share':>6}"
    )
    for shape, outcome in outcomes.items():
        if isinstance(outcome, str):
            print(f"{shape:>10} {outcome}")
            report[shape] = outcome
            continue
        report[shape] = line(model, shape, outcome, ceilings.card, moved is None)
        work = serving_work(model.config, model.format, outcome.sequences, outcome.isl, outcome.osl)
        points += roofline_plot.points(shape, {OURS: outcome.figure}, work, outcome.sequences * outcome.osl, max_spread)
    if options.plot and not moved:
        roofline_plot.draw(options.plot, model.title, machine_title(model.device), ceilings.card, points)
    return report


def line(model: BenchModel, shape: str, measured: Measured, card: Card, steady: bool) -> dict[str, Any]:
    """A line of the table, and the same by name. steady: the ceilings did not move, so that a share means something."""
    limit = serving_rate(model.config, card, model.format, measured.sequences, measured.isl, measured.osl)
    share = measured.figure.median / limit if steady else None
    told = f"{share:.0%}" if share is not None else "-"
    figure = f"{measured.figure.median:>13.1f} {measured.figure.spread:>7.0%}"
    print(f"{shape:>10} {measured.requests:>9} {figure} {measured.sequences:>10.0f} {limit:>9.0f} {told:>6}")
    return {
        "requests": measured.requests,
        "output_tok_s": round(measured.figure.median, 1),
        "spread": round(measured.figure.spread, 3),
        "rounds": len(measured.figure.values),
        "sequences": round(measured.sequences),
        "limit": round(limit, 1),
        "share": share and round(share, 3),
    }


def measure_shape(options: Options, shape: str) -> Measured | str:
    """Or why there is no figure."""
    model, config, dice = options.model, options.model.config, random.Random(5)
    isl, osl = (max(2, round(int(part) * options.scale)) for part in shape.split("/"))
    if isl + osl > config.max_seq_len:
        return f"{isl} + {osl} tokens are more than the context of {config.max_seq_len}"
    slots = options.requests or MOST_REQUESTS
    with make_engine(model, slots, isl + osl, max_batch_seqs=slots, whole_card=True) as engine:
        cached = engine.memory_plan.kv_tokens
        requests = options.requests or max(1, min(slots, cached // (isl + osl)))
        prompts = [random_prompt(config, isl, dice) for _ in range(requests)]
        ours = Ours(engine)
        ours.batch(prompts[:2], [min(4, osl)] * len(prompts[:2]), 2)
        figure = Figure([ours.batch(prompts, [osl] * requests, requests) for _ in range(options.repeats.rounds)])
    sequences = min(requests, cached / (isl + osl / 2))
    return figure.noise(options.repeats.max_spread) or Measured(figure, requests, sequences, isl, osl)
