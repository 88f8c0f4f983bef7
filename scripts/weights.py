"""Look at, check, convert, plan and make checkpoints.

A checkpoint is a folder of Hugging Face's safetensors or of Meta's consolidated.NN.pth, a .gguf file, or "demo".
The source is never changed.

    python scripts/weights.py inspect MODEL                     what it is: shapes, dtypes, bytes, checksums
    python scripts/weights.py verify MODEL                      whether it is whole and answers
    python scripts/weights.py convert MODEL OUT --to meta --shards 2 --dtype bfloat16
    python scripts/weights.py plan 70B --card H200 --slots 30   what fits and how fast it could be; no GPU needed
    python scripts/weights.py random 7B OUT                     random weights of an exact shape, for benchmarks
    python scripts/weights.py load MODEL                        how fast it loads, beside a plain copy of the same bytes

Exit codes: 0 done; 1 the source is at fault; 2 the question makes no sense; 3 the target cannot be written;
130 interrupted. A conversion that did not end with 0 has left nothing that loads.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from weights_load import measure_load
from weights_plan import CARDS, FORMATS, plan_all, table
from weights_source import GGUF, HF, META, Source, named_model, open_source, random_source, sha256, shape_of
from weights_target import WriteError
from weights_verify import checks
from weights_write import Written, write_checkpoint

from llama.config import DTYPES, EngineConfig
from llama.errors import CheckpointError, ConfigError, EngineError
from llama.setup import find_device

FORMS = {"hf": HF, "meta": META}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # names in files may be any text
    signal.signal(signal.SIGTERM, _terminated)
    try:
        report, code = args.run(args)
    except WriteError as error:
        return _failed(args, str(error), 3)
    except ConfigError as error:
        return _failed(args, str(error), 1 if hasattr(args, "source") and Path(args.source).exists() else 2)
    except EngineError as error:
        return _failed(args, str(error), 1)
    except KeyboardInterrupt:
        return _failed(args, "interrupted; nothing was left behind", 130)
    text = report.pop("text")
    print(json.dumps(report) if args.json else text)
    return code


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if args.json:
        print(json.dumps({"error": message, "exit_code": code}))
    else:
        print(f"weights.py {args.command}: {message}", file=sys.stderr)
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="one JSON object instead of text")
        return made

    def output(made: argparse.ArgumentParser) -> None:
        made.add_argument("target", type=Path, help="the folder to make")
        made.add_argument("--to", choices=FORMS, default="hf", help="whose form (default: hf)")
        made.add_argument("--dtype", choices=DTYPES)
        made.add_argument("--shards", type=int, help="files to write (hf: of at most 5 GB; meta: 1)")
        made.add_argument("--tokenizer", type=Path, help="a tokenizer.model to put in")
        made.add_argument("--force", action="store_true", help="replace a checkpoint that is there")

    made = command("inspect", inspect, "what a checkpoint is")
    made.add_argument("source")
    made.add_argument("--no-checksums", action="store_true", help="do not read the files to their end")
    made = command("verify", verify, "whether a checkpoint is whole and answers")
    made.add_argument("source")
    made.add_argument("--no-forward", action="store_true", help="do not load the model and ask it for a token")
    made = command("convert", convert, "from any form to Hugging Face's or Meta's")
    made.add_argument("source")
    output(made)
    made = command("plan", plan, "what fits on a card and how fast it could be")
    made.add_argument("model", help="7B, 13B, 70B, a folder, or a shape: dim=64,n_layers=2,n_heads=8,...")
    made.add_argument("--card", default="H200", help=", ".join(CARDS))
    made.add_argument("--slots", type=int, default=30)
    made.add_argument("--context", type=int, help="tokens of each slot (default: the model's own)")
    made.add_argument("--dtype", choices=FORMATS, action="append", help="default: all of them")
    made = command("random", make_random, "random weights of an exact shape")
    made.add_argument("model", help="7B, 13B, 70B, a folder, or a shape: dim=64,n_layers=2,n_heads=8,...")
    output(made)
    made.add_argument("--seed", type=int, default=0)
    made = command("load", load, "how fast a checkpoint loads")
    made.add_argument("source")
    made.add_argument("--dtype", choices=DTYPES)
    made.add_argument("--device", default="cpu")
    made.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def inspect(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    source = open_source(args.source)
    named = named_model(source.config)
    dtypes = Counter[str]()
    for tensor in source.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    report: dict[str, Any] = {
        "path": str(source.path),
        "form": source.kind,
        "architecture": "LlamaForCausalLM",
        "named": f"Llama-2 {named}" if named else None,
        "parameters": source.config.n_params,
        "bytes": source.nbytes,
        "config": asdict(source.config),
        "dtypes": dict(dtypes),
        "tokenizer": "tokenizer.model" in source.companions,
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": None if args.no_checksums else sha256(path)}
            for path in source.files
        ],
        "tensors": {name: {"shape": t.shape, "dtype": t.dtype} for name, t in source.tensors.items()},
        "problems": source.problems,
    }
    c = source.config
    lines = [
        f"{source.path}: {source.kind}, {report['named'] or 'a Llama of its own shape'}",
        f"  {c.n_params:,} parameters, " + ", ".join(f"{n:,} bytes of {name}" for name, n in dtypes.items()),
        f"  dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads of {c.head_dim} ({c.n_kv_heads} for keys and values), "
        f"ffn_dim {c.ffn_dim}",
        f"  vocabulary {c.vocab_size}, context {c.max_seq_len}, rope theta {c.rope_theta:g}, eps {c.norm_eps:g}, "
        f"{'tied' if c.tie_embeddings else 'untied'} embeddings, {'a' if report['tokenizer'] else 'no'} tokenizer",
        *(f"  {file['name']}  {file['bytes']:,} bytes  {file['sha256'] or ''}" for file in report["files"]),
        *_shape_lines(source),
        *(f"  problem: {problem}" for problem in source.problems),
    ]
    return {**report, "text": "\n".join(lines)}, 1 if source.problems else 0


def _shape_lines(source: Source) -> list[str]:
    """One line for each kind of tensor, layers counted instead of listed."""
    kinds = Counter[tuple[str, tuple[int, ...], str]]()
    for name, tensor in source.tensors.items():
        words = ["N" if word.isdigit() else word for word in name.split(".")]
        kinds[".".join(words), tensor.shape, tensor.dtype] += 1
    return [f"  {n:>4} x {name}  {list(shape)} {dtype}" for (name, shape, dtype), n in kinds.items()]


def verify(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    source = open_source(args.source)
    found = checks(source, forward=not args.no_forward and source.kind != GGUF, progress=_bars(args))
    if source.kind == GGUF:
        found["forward"] = (None, "GGUF is not run as it is; convert it first")
    good = all(passed is not False for passed, _ in found.values())
    words = {True: "ok", False: "FAULT", None: "-"}
    lines = [f"{words[passed]:>6}  {name}: {text}" for name, (passed, text) in found.items()]
    report = {
        "path": str(source.path),
        "good": good,
        "checks": {n: {"passed": p, "text": t} for n, (p, t) in found.items()},
    }
    return {**report, "text": "\n".join(lines)}, 0 if good else 1


def convert(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    source = open_source(args.source, args.tokenizer)
    if source.problems:
        raise CheckpointError(source.path, source.problems)
    return _written(_write(args, source), source)


def make_random(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    config = shape_of(args.model)
    source = random_source(replace(config, dtype=args.dtype or config.dtype), args.seed, args.tokenizer)
    return _written(_write(args, source), source)


def _write(args: argparse.Namespace, source: Source) -> Written:
    return write_checkpoint(source, args.target, FORMS[args.to], args.dtype, args.shards, args.force, _bars(args))


def _written(done: Written, source: Source) -> tuple[dict[str, Any], int]:
    rate = done.nbytes / done.seconds / 1e9
    text = f"{done.target}: {done.form}, {done.nbytes / 1e9:.3f} GB in {done.seconds:.1f} s ({rate:.2f} GB/s)"
    if "tokenizer.model" not in source.companions:
        text += "\nno tokenizer.model was found: the engine will take token ids only (add one with --tokenizer)"
    report = {**asdict(done), "target": str(done.target), "gb_per_second": rate}
    return {**report, "text": text}, 0


def plan(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    config = shape_of(args.model)
    found = plan_all(config, args.card, args.slots, args.context, args.dtype or list(FORMATS))
    return {"model": args.model, "parameters": config.n_params, **found, "text": table(found, args.model)}, 0


def load(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    source = open_source(args.source)
    if args.rounds < 1:
        raise ConfigError("rounds", args.rounds, "must be at least 1")
    device = find_device(EngineConfig(device=args.device).device)
    dtype = getattr(torch, args.dtype or source.config.dtype)
    found = measure_load(source, dtype, device, args.rounds)
    ours, plain = (rate / 1e9 for rate in found.rates)
    report = {
        "path": str(source.path), "bytes": found.nbytes, "device": str(device),
        "dtype": str(dtype).removeprefix("torch."), "load_gb_per_second": ours, "copy_gb_per_second": plain,
        "share_of_copy": found.share, "rounds": [(a.seconds, b.seconds) for a, b in found.rounds],
        "most_disk_bytes_in_a_turn": found.most_from_disk, "peak_host_bytes": found.peak_host_bytes,
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
    }  # fmt: skip
    text = (
        f"load {ours:.2f} GB/s, plain copy {plain:.2f} GB/s: {found.share:.0%} (median of {args.rounds} rounds); "
        f"peak host memory {found.peak_host_bytes / 2**30:.2f} GiB for {found.nbytes / 2**30:.2f} GiB of files"
    )
    if found.most_from_disk > found.nbytes / 100:
        text += (
            f"\n{found.most_from_disk / 1e9:.2f} GB of one turn came from disk: the page cache and the weights do not "
            "both fit in this machine's memory, so these figures are the disk's as well"
        )
    return {**report, "text": text}, 0


def _bars(args: argparse.Namespace) -> bool:
    return not args.json and sys.stderr.isatty()


if __name__ == "__main__":
    sys.exit(main())
