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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch

from llama.config import DTYPES, EngineConfig
from llama.errors import CheckpointError, ConfigError, EngineError
from llama.setup import find_device
from llama_slots.weights.load import measure_load
from llama_slots.weights.plan import CARDS, FORMATS, plan_all, table
from llama_slots.weights.source import GGUF, HF, META, Source, named_model, open_source, random_source, sha256, shape_of
from llama_slots.weights.target import WriteError
from llama_slots.weights.verify import checks
from llama_slots.weights.write import write_checkpoint

PROGRAM = "python scripts/weights.py"
FORMS = {"hf": HF, "meta": META}
SHAPE_HELP = "7B, 13B, 70B, a folder, or a shape: dim=64,n_layers=2,n_heads=8,..."
Parser = argparse.ArgumentParser
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # what add_subparsers returns has no public name
# A command's report as plain data, with its "text" for people, and the exit code.
Outcome = tuple[dict[str, Any], int]


@dataclass(frozen=True)
class Output:
    """The folder to write. dtype None: the source's own. shards None: as many as the form is used to."""

    target: Path
    form: str
    dtype: str | None
    shards: int | None
    tokenizer: Path | None
    force: bool


@dataclass(frozen=True)
class Options:
    """The command line. run: the command, with its own options. source: the checkpoint that it reads."""

    command: str
    json: bool
    run: Callable[[], Outcome]
    source: str | None


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command; returns the exit code. program: as the command was called, for its help and errors."""
    options = parse(argv, program)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # names in files may be any text
    signal.signal(signal.SIGTERM, _terminated)
    try:
        report, code = options.run()
    except WriteError as error:
        return _failed(options, program, str(error), 3)
    except ConfigError as error:
        return _failed(options, program, str(error), 1 if options.source and Path(options.source).exists() else 2)
    except EngineError as error:
        return _failed(options, program, str(error), 1)
    except KeyboardInterrupt:
        return _failed(options, program, "interrupted; nothing was left behind", 130)
    text = report.pop("text")
    print(json.dumps(report) if options.json else text)
    return code


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _failed(options: Options, program: str, message: str, code: int) -> int:
    if options.json:
        print(json.dumps({"error": message, "exit_code": code}))
    else:
        print(f"{Path(program).name} {options.command}: {message}", file=sys.stderr)
    return code


def parse(argv: list[str] | None, program: str) -> Options:
    """The options of a command line. Ends the program with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        Path(program).name,
        description=str(__doc__).replace(PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_inspect, _add_verify, _add_convert, _add_plan, _add_random, _add_load):
        add(commands)
    given = parser.parse_args(argv)
    return Options(given.command, given.json, partial(given.run, given), getattr(given, "source", None))


# Each adds a command. `run` of its arguments calls the function below that has the command's name.


def _add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], Outcome], help: str) -> Parser:
    options = commands.add_parser(name, help=help)
    options.set_defaults(run=run)
    options.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return options


def _add_inspect(commands: Commands) -> None:
    options = _add_command(commands, "inspect", lambda a: inspect(a.source, not a.no_checksums), "what a checkpoint is")
    options.add_argument("source")
    options.add_argument("--no-checksums", action="store_true", help="do not read the files to their end")


def _add_verify(commands: Commands) -> None:
    options = _add_command(
        commands,
        "verify",
        lambda a: verify(a.source, not a.no_forward, _bars(a.json)),
        "whether a checkpoint is whole and answers",
    )
    options.add_argument("source")
    options.add_argument("--no-forward", action="store_true", help="do not load the model and ask it for a token")


def _add_convert(commands: Commands) -> None:
    options = _add_command(
        commands,
        "convert",
        lambda a: convert(a.source, _output(a), _bars(a.json)),
        "from any form to Hugging Face's or Meta's",
    )
    options.add_argument("source")
    _add_output(options)


def _add_plan(commands: Commands) -> None:
    options = _add_command(
        commands,
        "plan",
        lambda a: plan(a.model, a.card, a.slots, a.context, a.dtype or list(FORMATS)),
        "what fits on a card and how fast it could be",
    )
    options.add_argument("model", help=SHAPE_HELP)
    options.add_argument("--card", default="H200", help=", ".join(CARDS))
    options.add_argument("--slots", type=int, default=30)
    options.add_argument("--context", type=int, help="tokens of each slot (default: the model's own)")
    options.add_argument("--dtype", choices=FORMATS, action="append", help="default: all of them")


def _add_random(commands: Commands) -> None:
    options = _add_command(
        commands,
        "random",
        lambda a: make_random(a.model, a.seed, _output(a), _bars(a.json)),
        "random weights of an exact shape",
    )
    options.add_argument("model", help=SHAPE_HELP)
    _add_output(options)
    options.add_argument("--seed", type=int, default=0)


def _add_load(commands: Commands) -> None:
    options = _add_command(
        commands, "load", lambda a: load(a.source, a.dtype, a.device, a.rounds), "how fast a checkpoint loads"
    )
    options.add_argument("source")
    options.add_argument("--dtype", choices=DTYPES)
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=5)


def _add_output(options: Parser) -> None:
    options.add_argument("target", type=Path, help="the folder to make")
    options.add_argument("--to", choices=FORMS, default="hf", help="whose form (default: hf)")
    options.add_argument("--dtype", choices=DTYPES)
    options.add_argument("--shards", type=int, help="files to write (hf: of at most 5 GB; meta: 1)")
    options.add_argument("--tokenizer", type=Path, help="a tokenizer.model to put in")
    options.add_argument("--force", action="store_true", help="replace a checkpoint that is there")


def _output(given: argparse.Namespace) -> Output:
    return Output(given.target, FORMS[given.to], given.dtype, given.shards, given.tokenizer, given.force)


def _bars(as_json: bool) -> bool:
    return not as_json and sys.stderr.isatty()


def inspect(name: str, checksums: bool) -> Outcome:
    """What a checkpoint is; with the SHA-256 sums of its files where they are asked for."""
    source = open_source(name)
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
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path) if checksums else None}
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


def verify(name: str, forward: bool, progress: bool) -> Outcome:
    """Whether a checkpoint is whole. forward: load it and ask it for a token."""
    source = open_source(name)
    findings = checks(source, forward and source.kind != GGUF, progress)
    if source.kind == GGUF:
        findings["forward"] = (None, "GGUF is not run as it is; convert it first")
    good = all(passed is not False for passed, _ in findings.values())
    words = {True: "ok", False: "FAULT", None: "-"}
    lines = [f"{words[passed]:>6}  {check}: {text}" for check, (passed, text) in findings.items()]
    report = {
        "path": str(source.path),
        "good": good,
        "checks": {check: {"passed": passed, "text": text} for check, (passed, text) in findings.items()},
    }
    return {**report, "text": "\n".join(lines)}, 0 if good else 1


def convert(name: str, output: Output, progress: bool) -> Outcome:
    """Write a checkpoint in another form, dtype or number of files."""
    source = open_source(name, output.tokenizer)
    if source.problems:
        raise CheckpointError(source.path, source.problems)
    return _write(source, output, progress)


def make_random(model: str, seed: int, output: Output, progress: bool) -> Outcome:
    """Write random weights of an exact shape."""
    config = shape_of(model)
    source = random_source(replace(config, dtype=output.dtype or config.dtype), seed, output.tokenizer)
    return _write(source, output, progress)


def _write(source: Source, output: Output, progress: bool) -> Outcome:
    done = write_checkpoint(source, output.target, output.form, output.dtype, output.shards, output.force, progress)
    rate = done.nbytes / done.seconds / 1e9
    text = f"{done.target}: {done.form}, {done.nbytes / 1e9:.3f} GB in {done.seconds:.1f} s ({rate:.2f} GB/s)"
    if "tokenizer.model" not in source.companions:
        text += "\nno tokenizer.model was found: the engine will take token ids only (add one with --tokenizer)"
    report = {**asdict(done), "target": str(done.target), "gb_per_second": rate}
    return {**report, "text": text}, 0


def plan(model: str, card: str, slots: int, context: int | None, formats: list[str]) -> Outcome:
    """What fits on a card and how fast it could be, for each format of the weights."""
    config = shape_of(model)
    plans = plan_all(config, card, slots, context, formats)
    return {"model": model, "parameters": config.n_params, **plans, "text": table(plans, model)}, 0


def load(name: str, dtype_name: str | None, device_name: str, rounds: int) -> Outcome:
    """How fast a checkpoint loads, beside a plain copy of the same bytes."""
    source = open_source(name)
    if rounds < 1:
        raise ConfigError("rounds", rounds, "must be at least 1")
    device = find_device(EngineConfig(device=device_name).device)
    dtype = getattr(torch, dtype_name or source.config.dtype)
    speed = measure_load(source, dtype, device, rounds)
    ours, plain = (rate / 1e9 for rate in speed.rates)
    report = {
        "path": str(source.path), "bytes": speed.nbytes, "device": str(device),
        "dtype": str(dtype).removeprefix("torch."), "load_gb_per_second": ours, "copy_gb_per_second": plain,
        "share_of_copy": speed.share, "rounds": [(a.seconds, b.seconds) for a, b in speed.rounds],
        "most_disk_bytes_in_a_turn": speed.most_from_disk, "peak_host_bytes": speed.peak_host_bytes,
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
    }  # fmt: skip
    text = (
        f"load {ours:.2f} GB/s, plain copy {plain:.2f} GB/s: {speed.share:.0%} (median of {rounds} rounds); "
        f"peak host memory {speed.peak_host_bytes / 2**30:.2f} GiB for {speed.nbytes / 2**30:.2f} GiB of files"
    )
    if speed.most_from_disk > speed.nbytes / 100:
        text += (
            f"\n{speed.most_from_disk / 1e9:.2f} GB of one turn came from disk: the page cache and the weights do not "
            "both fit in this machine's memory, so these figures are the disk's as well"
        )
    return {**report, "text": text}, 0
