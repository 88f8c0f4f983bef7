"""Prompts and outputs of fixed lengths, all queued at once: output tokens per second beside the machine's limit."""

from __future__ import annotations

import argparse
import random
from typing import Any

import bench_figures
import bench_model
from bench_figures import Figure
from bench_machine import measure_ceilings
from bench_model import make_engine, model_config, model_format, model_title, random_prompt
from bench_sides import Ours
from roofline import serving_rate

SHAPES = ("128/128", "128/2048", "500/2000", "1000/1000", "2048/128", "2048/2048")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_model.add_arguments(parser)
    bench_model.add_invariance(parser)
    bench_figures.add_arguments(parser, rounds=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="tokens in / tokens out")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the lengths by this, for small machines")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = model_config(args)
    found: dict[str, Any] = {"model": args.model or args.shape, "dtype": args.dtype, "requests": args.requests}
    ceilings = measure_ceilings(args.device, args.dtype)
    found["ceilings"] = ceilings.report()
    print(f"{args.requests} requests at once, lengths x {args.scale}: {model_title(args)}")
    print(f"{'in/out':>10} {'output tok/s':>13} {'spread':>7} {'sequences':>10} {'limit':>9} {'share':>6}")
    for shape in args.shapes:
        isl, osl = (max(2, round(int(part) * args.scale)) for part in shape.split("/"))
        if isl + osl > config.max_seq_len:
            found[shape] = f"{isl} + {osl} tokens are more than the context of {config.max_seq_len}"
            print(f"{shape:>10} {found[shape]}")
            continue
        dice = random.Random(5)
        prompts = [random_prompt(config, isl, dice) for _ in range(args.requests)]
        with make_engine(args, args.requests, isl + osl, args.batch_invariant, max_batch_seqs=args.requests) as engine:
            ours = Ours(engine)
            ours.batch(prompts[:2], [4, 4])
            figure = Figure([ours.batch(prompts, [osl] * args.requests) for _ in range(args.rounds)])
            fitting = min(args.requests, engine.memory_plan.kv_tokens / (isl + osl / 2))
        if figure.spread > args.max_spread:
            found[shape] = f"too noisy: the spread of {figure.spread:.0%} is above {args.max_spread:.0%}"
            print(f"{shape:>10} {found[shape]}")
            continue
        limit = serving_rate(config, ceilings.card, model_format(args), fitting, isl, osl)
        share = figure.median / limit
        print(f"{shape:>10} {figure.median:>13.1f} {figure.spread:>7.0%} {fitting:>10.0f} {limit:>9.0f} {share:>6.0%}")
        found[shape] = {
            "output_tok_s": round(figure.median, 1),
            "spread": round(figure.spread, 3),
            "sequences": round(fitting),
            "limit": round(limit, 1),
            "share": round(share, 3),
        }
    return found
