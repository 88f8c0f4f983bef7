"""Everything that makes sense on a device, one command after the other, each in a process of its own.

The output of each goes into one file, benchmarks/MACHINE-DATE.md, as soon as it ends. A later command that fails or
takes too long loses nothing; it is a section with its reason. Random weights are written once, for all commands.
Pictures lie beside the file, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card_peers import CardPeers, add_card_peer_arguments
from benchmarks.machine import ROOT
from benchmarks.roofline_plot import Drawing

BENCH = ROOT / "scripts" / "bench.py"
CARD = "--device cuda --dtype bfloat16"
SMALL, LARGE = "--shape 110M --dtype", "--shape 1.1B --dtype bfloat16"
FULL = f"throughput {CARD} --shape 7B --requests fit --shapes"
LONG = ("128/2048", "500/2000", "2048/2048")
WEIGHTS = "weights"  # a folder of the commands' own


@dataclass(frozen=True)
class Command:
    """One line for bench.py. weights: it has peers, and shares random weights with others. plot: it draws."""

    name: str
    line: str
    weights: bool = False
    plot: bool = False

    @property
    def subject(self) -> str:
        return self.line.split()[0]


# The goals are those of one card with 7B, 13B and 70B; lengths are chosen so that no command needs ten minutes.
PLANS = {
    "cpu": (
        Command("overhead", "overhead"),
        Command("compare-110M-bf16", f"compare {SMALL} bfloat16 --compile --tokens 64", True, True),
        Command("compare-110M-fp32", f"compare {SMALL} float32 --compile --tokens 48", True, True),
        Command("latency-110M", f"latency {SMALL} bfloat16 --compile --tokens 64 --ttft 128 512", True, True),
        Command("prefix", f"prefix {SMALL} bfloat16 --prompts 8"),
        Command("slots", f"slots {SMALL} bfloat16 --slots 8 --requests 24 --prompt-tokens 64 --tokens 32 --rounds 3"),
        Command("throughput", f"throughput {SMALL} bfloat16 --requests 16 --scale 0.05", False, True),
        Command("offline", f"offline {SMALL} bfloat16 --prompts 16 --rounds 3", True),
        Command("invariance", f"invariance {SMALL} bfloat16 --prompts 16 --rounds 3"),
        Command("serve", "serve --parts overhead refusals load --rounds 3"),
        Command("compare-1.1B", f"compare {LARGE} --compile --tokens 16 --subjects decode batch8 prefill", True, True),
        Command(
            "mixed-110M", f"compare {SMALL} bfloat16 --compile --tokens 64 --rounds 3 --subjects mixed8", True, True
        ),
    ),
    "cuda": (
        Command("overhead", "overhead"),
        Command("latency-7B", f"latency {CARD} --shape 7B --prompt-tokens 128 --tokens 128", True, True),
        Command("slots-7B", f"slots {CARD} --shape 7B --rounds 3"),
        Command("idle-7B", f"idle {CARD} --shape 7B"),
        Command("latency-13B", f"latency {CARD} --shape 13B --prompt-tokens 128 --no-peers", False, True),
        Command("latency-70B", f"latency {CARD} --shape 70B --prompt-tokens 128 --tokens 64 --no-peers", False, True),
        Command("throughput-7B", f"{FULL} 128/128 1000/1000 2048/128", False, True),
        *(Command(f"throughput-7B-{shape.replace('/', '-')}", f"{FULL} {shape}", False, True) for shape in LONG),
        Command("kernels-7B", "kernels --model 7B"),
        Command("compare-7B", f"compare {CARD} --shape 7B --tokens 64 --rounds 3", True, True),
        Command("mixed-7B", f"compare {CARD} --shape 7B --tokens 64 --rounds 3 --subjects mixed8 mixed32", True, True),
        Command("prefix-7B", f"prefix {CARD} --shape 7B --prompts 16"),
        Command("invariance-7B", f"invariance {CARD} --shape 7B --rounds 3"),
        Command("serve", "serve --parts overhead refusals --rounds 3"),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """said: its output without the last line. figures: its last line; empty when it failed, and error says why."""

    said: str
    figures: dict[str, Any]
    seconds: float
    error: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(PLANS), default="cpu")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="subjects or names of commands; default: all")
    parser.add_argument("--list", action="store_true", help="print the commands and measure nothing")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of one command (default: 600)")
    parser.add_argument("--minutes", type=float, default=30, help="of all commands together (default: 30)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default: benchmarks/MACHINE-DATE.md")
    add_card_peer_arguments(parser)


@dataclass(frozen=True)
class Options:
    """limit: seconds of one command. minutes: of all. out None: a file named after machine and date."""

    device: str
    subjects: list[str] | None
    limit: float
    minutes: float
    out: Path | None
    peers: CardPeers


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.list:
        return list_commands(chosen(args.device, args.subjects))
    options = Options(args.device, args.subjects, args.limit, args.minutes, args.out, CardPeers.of(args))
    return measure(options)


def list_commands(commands: list[Command]) -> dict[str, Any]:
    for command in commands:
        print(f"python scripts/bench.py {command.line}")
    return {"commands": len(commands)}


def measure(options: Options) -> dict[str, Any]:
    """The names of what was measured, what failed and why, and the file."""
    commands = chosen(options.device, options.subjects)
    if options.out is not None:
        check_new(options.out)
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        dtype = "bfloat16" if options.device == "cuda" else "float32"
        line = f"ceilings --device {options.device} --dtype {dtype}"
        ceilings = execute(line, Path(scratch), options.limit)
        if ceilings.error is not None:
            raise SystemExit(f"bench all: the machine's ceilings cannot be measured: {ceilings.error}")
        out = options.out or default_file(options.device, ceilings.figures)
        check_new(out)
        out.write_text(heading(ceilings.figures) + section("ceilings", line, ceilings, []))
        failed: dict[str, str] = {}
        for command in commands:
            outcome = run_command(command, options, Path(scratch), end)
            pictures = [keep(path, out) for path in sorted(Path(scratch).glob("*.png"))]
            with out.open("a") as file:
                file.write(section(command.name, command.line, outcome, pictures))
            if outcome.error is not None:
                failed[command.name] = outcome.error
    done = [command.name for command in commands if command.name not in failed]
    print(f"{len(done)} of {len(commands)} commands measured; {out}")
    return {"out": str(out), "measured": done, "failed": failed}


def chosen(device: str, subjects: list[str] | None) -> list[Command]:
    """The device's commands of these subjects or names; None: all. Ends the program at a name that is none."""
    plan = PLANS[device]
    if subjects is None:
        return list(plan)
    known = {command.subject for command in plan} | {command.name for command in plan}
    if strange := [name for name in subjects if name not in known]:
        raise SystemExit(f"bench all: {strange[0]!r} is nothing for {device}; there are {', '.join(sorted(known))}")
    return [command for command in plan if {command.subject, command.name} & set(subjects)]


def run_command(command: Command, options: Options, scratch: Path, end: float) -> Outcome:
    """Run a command in the time that is left, and print its output."""
    left = end - time.monotonic()
    print(f"\n== {command.name}: bench.py {command.line}", flush=True)
    if left < 1:
        outcome = Outcome("", {}, 0.0, f"not run: the {options.minutes:g} minutes are over")
    else:
        extra = f" --keep-weights {WEIGHTS}" if command.weights else ""
        extra += f" --plot {command.name}.png" if command.plot and Drawing is not None else ""
        extra += peer_options(options.peers) if command.subject == "compare" else ""
        outcome = execute(command.line + extra, scratch, min(options.limit, left))
    print(outcome.said if outcome.error is None else f"{outcome.said}failed: {outcome.error}", flush=True)
    return outcome


def peer_options(peers: CardPeers) -> str:
    """The peers that run only where the command line names them."""
    given = f" --gpt-fast {shlex.quote(str(peers.gpt_fast.resolve()))}" if peers.gpt_fast else ""
    return given + (" --vllm" if peers.vllm else "")


def execute(line: str, folder: Path, limit: float) -> Outcome:
    """Run bench.py in a folder for at most `limit` seconds; then all its processes are killed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, str(BENCH), *shlex.split(line)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, complaints = process.communicate(timeout=limit)
            error = None if process.returncode == 0 else last_line(complaints) or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            error = f"stopped after {limit:.0f} seconds"
    seconds = time.monotonic() - started
    if error is not None:
        return Outcome(said, {}, seconds, error)
    table, _, figures = said.rstrip("\n").rpartition("\n")
    return Outcome(table + "\n", json.loads(figures), seconds)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def default_file(device: str, facts: dict[str, Any]) -> Path:
    """benchmarks/h200-2026-12-01.md, or cpu-2026-12-01.md."""
    name = facts["card"].removeprefix("NVIDIA ") if device == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / f"{slug}-{facts['date']}.md"


def check_new(out: Path) -> None:
    """Ends the program where the file cannot be written, before anything is measured."""
    if out.exists():
        raise SystemExit(f"bench all: {out} exists; --out names another file")
    if not out.parent.is_dir():
        raise SystemExit(f"bench all: there is no folder {out.parent}")


def keep(picture: Path, out: Path) -> str:
    """Move a picture beside the file; its name there."""
    name = f"{out.stem}-{picture.name}"
    shutil.move(picture, out.with_name(name))
    return name


def heading(facts: dict[str, Any]) -> str:
    """What the figures were taken on."""
    machine = facts["card"] or f"{facts['cpu']}, {facts['threads']} threads"
    about = f"torch {facts['torch']}, Python {facts['python']}, commit {facts['commit'] or 'unknown'}"
    return f"# {machine}, {facts['date']}\n\n{facts['cpu']}, {facts['threads']} threads; {about}.\n"


def section(name: str, line: str, outcome: Outcome, pictures: list[str]) -> str:
    """One command in Markdown: how it was called, what it said, its picture, and its JSON line."""
    parts = [f"## {name}", f"`python scripts/bench.py {line}` ({outcome.seconds:.0f} s)"]
    if outcome.error is not None:
        parts.append(f"**No figures: {outcome.error}**")
    if outcome.said.strip():
        parts.append(f"```text\n{outcome.said.rstrip()}\n```")
    parts += [f"![{name}]({picture})" for picture in pictures]
    if outcome.figures:
        # The command as anybody may call it, without the folders of this run.
        parts.append(f"```json\n{json.dumps(outcome.figures | {'command': f'bench.py {line}'})}\n```")
    return "\n" + "\n\n".join(parts) + "\n"
