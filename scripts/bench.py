"""Run a benchmark. It takes every figure beside what it is compared with; the last line is one JSON object.

    python scripts/bench.py overhead                   Python per step and per token, the runner computing nothing
    python scripts/bench.py latency    --shape 110M    one request alone: TTFT, prefill and decode, beside transformers
    python scripts/bench.py offline    --shape 110M    64 prompts of mixed lengths, beside transformers' generate
    python scripts/bench.py throughput --shape 110M    fixed lengths in and out, all queued at once, beside the limit
    python scripts/bench.py slots      --shape 110M    all slots busy: time between tokens, and to the first
    python scripts/bench.py serve                      streams over HTTP beside in process, refusals, a replayed trace
    python scripts/bench.py prefix     --shape 110M    what the prefix cache costs and brings
    python scripts/bench.py compare    --shape 110M    the same weights and prompts through ours and the peers
    python scripts/bench.py invariance                 what batch_invariant=True costs
    python scripts/bench.py kernels                    each kernel beside the card's ceilings and torch
    python scripts/bench.py idle --device cuda         how long the card waits between decode steps
    python scripts/bench.py ceilings                   what the machine reaches at most
    python scripts/bench.py all --device cuda          every one that makes sense there, into a file of benchmarks/

--model DIR measures a real checkpoint instead of random weights of a shape. Runs of the sides alternate; a figure is
the median of --rounds, a ratio the median of the rounds' ratios. The reason is printed instead where the rounds
differ too much (--max-spread). There is no ratio where a peer is missing, or where its tokens differ from ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

import torch

from benchmarks.machine import machine_facts
from llama.errors import EngineError
from llama_slots.extras import needs

# Each is a module benchmarks.SUBJECT with add_arguments(parser) and run(args) -> figures. Only the one asked for is
# imported: `kernels` must run where the packages that `serve` needs are not installed.
SUBJECTS = (
    *("overhead", "latency", "offline", "throughput", "serve", "slots", "prefix", "compare", "invariance", "kernels"),
    *("idle", "ceilings", "all"),
)


def main(argv: list[str]) -> int:
    """Run one subject; returns the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    try:
        figures = args.run(args)
    except EngineError as error:
        print(f"bench.py {args.what}: {error}", file=sys.stderr)
        return 1
    command = " ".join(["bench.py", *argv])
    print(json.dumps({"command": command, **machine_facts(), "what": args.what, **figures}))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The subject comes first, and brings its own options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SUBJECTS)
    what = parser.parse_args(argv[:1]).what
    try:
        subject = importlib.import_module(f"benchmarks.{what}")
    except ModuleNotFoundError as error:
        parser.exit(1, f"bench.py {what}: {needs(error.name or str(error))}\n")
    parser = argparse.ArgumentParser(
        prog=f"bench.py {what}", description=subject.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of one operation")
    parser.set_defaults(run=subject.run, what=what)
    return parser.parse_args(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
