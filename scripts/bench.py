"""The one meter. Every figure is taken in one run beside what it is compared with; the last line is one JSON object.

    python scripts/bench.py overhead                 Python per step and per token, with a runner that computes nothing
    python scripts/bench.py latency  --shape 110M    batch-1 decode, beside transformers and the read bandwidth
    python scripts/bench.py offline  --shape 110M    64 prompts of mixed lengths, beside transformers' batched generate
    python scripts/bench.py invariance               what batch_invariant=True costs

--model DIR measures a real checkpoint instead of random weights of a shape. Runs of the two sides alternate; a figure
is the median of --rounds, its spread (max - min) / median is printed, and above --max-spread no ratio is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from llama.blocks import BlockPool
from llama.config import EngineConfig, ModelConfig
from llama.detokenizer import Detokenizer
from llama.engine import Engine
from llama.loop import EngineLoop
from llama.request import Request, SamplingParams
from llama.runner import StepResult
from llama.scheduler import Plan, Scheduler
from llama.sequence import Sequence
from llama.setup import find_model
from llama.stream import Mailbox
from llama.tokenizer import Tokenizer

try:
    import transformers
except ImportError:
    transformers = None  # type: ignore[assignment]

SHAPES = {
    "15M": ModelConfig(288, 6, 6, 6, 48, 768, 32000, max_seq_len=1024),
    "110M": ModelConfig(768, 12, 12, 12, 64, 2048, 32000, max_seq_len=1024),
    "1.1B": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, max_seq_len=2048),
    "7B": ModelConfig.named("7B"),
    "13B": ModelConfig.named("13B"),
    "70B": ModelConfig.named("70B"),
}


@dataclass
class Figure:
    """Repeated measurements of one thing."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return (max(self.values) - min(self.values)) / self.median


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    figures = {"overhead": overhead, "latency": latency, "offline": offline, "invariance": invariance}[args.what](args)
    machine = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({**machine, **figures}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "latency", "offline", "invariance"])
    parser.add_argument("--shape", choices=list(SHAPES), default="110M")
    parser.add_argument("--model", help="a checkpoint folder, instead of random weights of --shape")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="offline: how many prompts")
    parser.add_argument("--tokens", type=int, default=128, help="latency: tokens to decode")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="latency: length of the prompt")
    parser.add_argument("--max-spread", type=float, default=0.5, help="refuse to compare above this (max-min)/median")
    return parser.parse_args()


# overhead: no tensors at all


class FakeRunner:
    """Yields tokens from a fixed list; stands where the model would be."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.at = token_ids, 0

    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        tokens: list[int | None] = []
        for yields in plan.yields:
            self.at = (self.at + 1) % len(self.token_ids)
            tokens.append(self.token_ids[self.at] if yields else None)
        return lambda: StepResult(tokens, [None] * len(tokens))


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Scheduling, detokenizing, two stop strings and streaming out, all in one thread, per token and per step."""
    vocabulary = Tokenizer(find_model(args.model or "demo") / "tokenizer.model").vocabulary
    words = [i for i, text in enumerate(vocabulary.texts) if text is not None]
    picked = random.Random(0).choices(words, k=100_003)

    def once(n_seqs: int, n_tokens: int) -> tuple[float, float]:
        per_seq = -(-(n_tokens + 2) // 64)
        loop = EngineLoop(Scheduler(BlockPool(n_seqs * per_seq + 1, 64), 2048, 256), FakeRunner(picked), SimpleQueue())
        mailboxes = []
        for i in range(n_seqs):
            params = SamplingParams(max_tokens=n_tokens, stop=("\n\n\n\n", "#### end"))
            prompt = [1, words[i % len(words)]]
            mailboxes.append(Mailbox(1, None, lambda _: None))
            seq = Sequence(Request([prompt], params), 0, prompt, 2, 2 + n_tokens, i, frozenset([2]))
            text = Detokenizer(vocabulary, skip_first_mark=True, stop=tuple(params.stop))
            loop.add(mailboxes[-1], [(seq, text)])
        start, got = time.perf_counter(), 0
        while loop.scheduler.has_work:
            loop.step()
            for mailbox in mailboxes:
                while mailbox.deltas:
                    got += len(mailbox.deltas.popleft().token_ids)
        taken = time.perf_counter() - start
        return taken / got * 1e6, taken / loop.n_steps * 1e6

    once(8, 20)
    found: dict[str, Any] = {}
    print(f"{'sequences':>10} {'us/token':>9} {'us/step':>9} {'tokens/s':>10} {'spread':>7}")
    for n_seqs, n_tokens in ((1, 2000), (30, 400), (256, 100)):
        runs = [once(n_seqs, n_tokens) for _ in range(args.rounds)]
        token, step = Figure([run[0] for run in runs]), Figure([run[1] for run in runs])
        print(f"{n_seqs:>10} {token.median:>9.2f} {step.median:>9.0f} {1e6 / token.median:>10.0f} {token.spread:>6.0%}")
        found[f"us_per_token_{n_seqs}"] = round(token.median, 2)
        found[f"us_per_step_{n_seqs}"] = round(step.median, 1)
    found["tokens_per_s_256"] = round(1e6 / found["us_per_token_256"])
    return {"what": "overhead", **found}


# latency, offline: beside transformers


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Decode tokens per second of one sequence."""
    config = model_config(args)
    prompt = random_prompt(config, args.prompt_tokens, random.Random(1))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=args.tokens)
    with make_engine(args) as engine:

        def ours() -> float:
            stream = engine.submit(Request([prompt], params))
            first = next(stream)
            assert first.token_ids
            start = time.perf_counter()
            return sum(len(delta.token_ids) for delta in stream) / (time.perf_counter() - start)

        sides: dict[str, Callable[[], float]] = {"ours": ours}
        for attention in ("eager", "sdpa"):
            if peer := make_peer(args, attention):
                sides[f"transformers {attention}"] = partial(peer_decode, peer, prompt, args.tokens)
        figures = alternate(sides, args.rounds)
        bandwidth = read_bandwidth(args.device)
        per_token = streamed_bytes(config, args) + kv_bytes(config, args) * (args.prompt_tokens + args.tokens / 2)
    share = figures["ours"].median * per_token / bandwidth
    report(figures, "tok/s")
    print(
        f"bytes per token {per_token / 1e6:.1f} MB, read bandwidth {bandwidth / 1e9:.1f} GB/s, share of it {share:.0%}"
    )
    return {
        "what": "latency",
        "model": args.model or args.shape,
        "dtype": args.dtype,
        **ratios(figures, args.max_spread),
        "bandwidth_GB_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(share, 3),
    }


def offline(args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second of a batch of prompts of 8 to 64 tokens with outputs of 16 to 256 tokens."""
    config = model_config(args)
    dice = random.Random(2)
    prompts = [random_prompt(config, dice.randint(8, 64), dice) for _ in range(args.prompts)]
    longest = config.max_seq_len - 64
    lengths = [min(dice.randint(16, 256), longest) for _ in range(args.prompts)]
    each = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lengths]
    total = sum(lengths)
    with make_engine(args, slots=args.prompts, prefix_cache=False) as engine:

        def ours() -> float:
            start = time.perf_counter()
            assert sum(len(done.token_ids) for done in engine.generate(prompts, each)) == total
            return total / (time.perf_counter() - start)

        sides: dict[str, Callable[[], float]] = {"ours": ours}
        if peer := make_peer(args, "sdpa"):
            sides["transformers sdpa"] = lambda: peer_batch(peer, prompts, lengths)
        figures = alternate(sides, args.rounds)
    report(figures, "output tok/s")
    return {
        "what": "offline",
        "model": args.model or args.shape,
        "dtype": args.dtype,
        "prompts": args.prompts,
        **ratios(figures, args.max_spread),
    }


def invariance(args: argparse.Namespace) -> dict[str, Any]:
    """Batch-1 decode and a batch of prompts with and without batch_invariant."""
    config = model_config(args)
    dice = random.Random(3)
    prompt = random_prompt(config, args.prompt_tokens, dice)
    prompts = [random_prompt(config, dice.randint(8, 64), dice) for _ in range(args.prompts)]
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=64)
    found: dict[str, Any] = {"what": "invariance", "model": args.model or args.shape, "dtype": args.dtype}
    with (
        make_engine(args, slots=args.prompts, prefix_cache=False, batch_invariant=False) as fast,
        make_engine(args, slots=args.prompts, prefix_cache=False, batch_invariant=True) as exact,
    ):

        def rate(engine: Engine, batch: list[list[int]]) -> float:
            start = time.perf_counter()
            engine.generate(batch, params)
            return len(batch) * 64 / (time.perf_counter() - start)

        for name, batch in (("batch_1", [prompt]), (f"batch_{len(prompts)}", prompts)):
            figures = alternate(
                {"fast": partial(rate, fast, batch), "batch_invariant": partial(rate, exact, batch)}, args.rounds
            )
            print(name)
            report(figures, "tok/s")
            found[f"cost_{name}"] = round(1 - figures["batch_invariant"].median / figures["fast"].median, 3)
    return found


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_dir(find_model(args.model)) if args.model else SHAPES[args.shape]


def make_engine(args: argparse.Namespace, **options: Any) -> Engine:
    model = args.model or SHAPES[args.shape]
    return Engine(model, EngineConfig(device=args.device, dtype=args.dtype, **options), progress=False)


def random_prompt(config: ModelConfig, n: int, dice: random.Random) -> list[int]:
    return [1] + [dice.randrange(3, config.vocab_size) for _ in range(n - 1)]


def make_peer(args: argparse.Namespace, attention: str) -> Any:
    """transformers' LlamaForCausalLM of the same shape and dtype, or None where it is not installed."""
    if transformers is None:
        print("transformers is not installed: nothing to compare with", file=sys.stderr)
        return None
    dtype = getattr(torch, args.dtype)
    if args.model:
        folder = find_model(args.model)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    else:
        c = SHAPES[args.shape]
        config = transformers.LlamaConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            intermediate_size=c.ffn_dim,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.max_seq_len,
        )
        config._attn_implementation = attention
        model = transformers.LlamaForCausalLM(config).to(dtype)
    return model.to(args.device).eval()


@torch.inference_mode()
def peer_decode(peer: Any, prompt: list[int], n: int) -> float:
    """Tokens per second after the first, which is timed apart by generating it alone."""
    ids = torch.tensor([prompt], device=peer.device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def timed(n_new: int) -> float:
        start = time.perf_counter()
        peer.generate(ids, max_new_tokens=n_new, min_new_tokens=n_new, **options)
        return time.perf_counter() - start

    return (n - 1) / (timed(n) - timed(1))


@torch.inference_mode()
def peer_batch(peer: Any, prompts: list[list[int]], lengths: list[int]) -> float:
    """Batched generate: prompts padded on the left, every row run to the longest output; only what was asked counts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=peer.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=peer.device)
    start = time.perf_counter()
    peer.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(lengths),
        min_new_tokens=max(lengths),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return sum(lengths) / (time.perf_counter() - start)


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Figure]:
    """Measure the sides in turn, A B A B ..., after one warm-up each, so that a drifting machine meets both."""
    for run in sides.values():
        run()
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            values[name].append(run())
    return {name: Figure(found) for name, found in values.items()}


def report(figures: dict[str, Figure], unit: str) -> None:
    for name, figure in figures.items():
        ratio = figures["ours"].median / figure.median if "ours" in figures else 1.0
        beside = f"  ours is {ratio:.2f}x" if "ours" in figures and name != "ours" else ""
        print(f"{name:>20} {figure.median:>10.1f} {unit} (spread {figure.spread:.0%}){beside}")


def ratios(figures: dict[str, Figure], max_spread: float) -> dict[str, Any]:
    """ours and each peer, and ours over the best peer; no ratio when a side was too noisy to compare."""
    found: dict[str, Any] = {name.replace(" ", "_"): round(figure.median, 1) for name, figure in figures.items()}
    peers = [figure.median for name, figure in figures.items() if name != "ours"]
    noisy = [name for name, figure in figures.items() if figure.spread > max_spread]
    if noisy:
        print(f"too noisy to compare: {', '.join(noisy)}", file=sys.stderr)
    elif peers:
        found["ratio"] = round(figures["ours"].median / max(peers), 3)
    return found


def streamed_bytes(config: ModelConfig, args: argparse.Namespace) -> float:
    """Weights that one decoded token must read: all but the embedding table, which gives one row."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return (config.n_params - embedding) * getattr(torch, args.dtype).itemsize


def kv_bytes(config: ModelConfig, args: argparse.Namespace) -> float:
    """Bytes of K and V per cached token."""
    return 2 * config.n_layers * config.kv_dim * getattr(torch, args.dtype).itemsize


def read_bandwidth(device: str) -> float:
    """Bytes per second of a plain sum over 1 GiB of fp32, the best of 7."""
    data = torch.ones(1 << 28, device=device)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        float(data.sum())
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
