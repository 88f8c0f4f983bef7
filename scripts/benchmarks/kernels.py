"""Each kernel on this card, beside the ceilings measured in the same run and torch's own operation.

    python scripts/bench.py kernels               a table for people, and one JSON object on the last line
    python scripts/bench.py kernels --model 70B
    python scripts/bench.py kernels --tune        try tiles, and write the fastest into kernels/tiles.json

GB/s counts what must move once; a share is of the ceiling that binds (copy or matmul). "exact" is batch_invariant=True,
"fast" is without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from benchmarks.gpu_timer import Call, Ceilings, Timer, copies, measure_ceilings, time_on_card
from kernels.launch import HAS_TRITON
from kernels.tiles import TABLE
from llama.batch import Batch
from llama.cache import KVCache
from llama.config import ModelConfig
from llama.model import Transformer, parameter_shapes

if HAS_TRITON:
    import triton

    from benchmarks.tune_tiles import tune

BF16 = torch.bfloat16
FEW_ROWS, MANY_ROWS = (1, 4, 8, 16, 32, 64), (512, 2048)
DECODE = tuple((r, n) for r, n in product((1, 16, 64), (512, 4096, 32768)) if r * n <= 1 << 19)
PREFILL = (1024, 2048, 4096)
BLOCK_SIZE = 64
STEP_ROWS, STEP_LENGTH = 1, 4096


def linear_bytes(rows: int, n: int, k: int) -> int:
    """What x [rows, k] @ weight [n, k].T must move in 16 bits: the weight, x and the result."""
    return 2 * (n * k + rows * (n + k))


def linear_flop(rows: int, n: int, k: int) -> int:
    return 2 * rows * n * k


def decode_bytes(config: ModelConfig, rows: int, length: int) -> int:
    """K and V of so many tokens per sequence, in 16 bits, of one layer."""
    return 2 * 2 * rows * length * config.kv_dim


def prefill_flop(config: ModelConfig, length: int) -> int:
    """q @ k.T and p @ v, causal: half of 4 length^2 head_dim per head."""
    return 2 * length * length * config.n_heads * config.head_dim


@dataclass(frozen=True)
class Line:
    """One measured kernel. rate: GB/s or TFLOP/s; share: of the ceiling; torch: torch's time over ours."""

    name: str
    microseconds: float
    rate: float
    unit: str
    share: float
    torch: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=["7B", "13B", "70B"], default="7B", help="whose shapes to measure")
    parser.add_argument("--tune", action="store_true", help="try tiles instead, and write the fastest")
    parser.add_argument(
        "--max-drift",
        type=float,
        default=0.1,
        help="refuse figures if a ceiling moved by more meanwhile (default: 0.1)",
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="--tune: the table to write (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ends the command where there is no CUDA device."""
    if not (HAS_TRITON and torch.cuda.is_available()):
        raise SystemExit("bench kernels: needs triton and a CUDA device, and found none")
    torch.manual_seed(0)
    card = {"model": args.model, "card": torch.cuda.get_device_name(), "triton": triton.__version__}
    if args.tune:
        tuned = tune(ModelConfig.named(args.model), time_on_card, torch.device("cuda"), args.table)
        return {**card, "table": str(args.table), "tiles": tuned}
    return card | measure(ModelConfig.named(args.model), torch.device("cuda"), args.max_drift)


def measure(config: ModelConfig, device: torch.device, max_drift: float) -> dict[str, Any]:
    """Print the table and return its figures; no figures where a ceiling moved by more than max_drift."""
    with torch.inference_mode():
        bench = Bench(config, measure_ceilings(time_on_card, device), time_on_card, device)
        bench.all()
        room = torch.cuda.mem_get_info()[0] // 2
        step = bench.step(max(1, min(config.n_layers, room // layer_bytes(config))))
        ended = measure_ceilings(time_on_card, device)
    report = {"ceilings": asdict(bench.ceilings)}
    if reason := moved(bench.ceilings, ended, max_drift):
        print(f"none of this is a figure: {reason}")
        return {**report, "refused": reason}
    return {**report, "kernels": [asdict(line) for line in bench.lines], "step": step}


def moved(before: Ceilings, after: Ceilings, max_drift: float) -> str | None:
    """Why the card was not the same at the end of the run as at its beginning, or None."""
    changes = {name: asdict(after)[name] / rate - 1 for name, rate in asdict(before).items()}
    name = max(changes, key=lambda ceiling: abs(changes[ceiling]))
    if abs(changes[name]) <= max_drift:
        return None
    return f"too noisy: the ceiling of {name} moved by {changes[name]:+.0%} meanwhile, more than {max_drift:.0%}"


def layer_bytes(config: ModelConfig) -> int:
    """Of one layer's weights, in 16 bits."""
    return sum(2 * n * k for n, k in linear_shapes(config).values())


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[n, k] of a layer's weights."""
    return {
        "qkv": (config.q_dim + 2 * config.kv_dim, config.dim),
        "o": (config.dim, config.q_dim),
        "gate_up": (2 * config.ffn_dim, config.dim),
        "down": (config.dim, config.ffn_dim),
    }


class Bench:
    """Measures with `timer`, prints a line per kernel and keeps it in `lines`."""

    def __init__(self, config: ModelConfig, ceilings: Ceilings, timer: Timer, device: torch.device) -> None:
        self.config, self.ceilings, self.timer, self.device = config, ceilings, timer, device
        self.lines: list[Line] = []
        print(
            f"copy {ceilings.copy:.0f} GB/s, read {ceilings.read:.0f} GB/s, bf16 matmul {ceilings.matmul:.0f} TFLOP/s"
        )

    def all(self) -> None:
        self.linear()
        self.decode()
        self.prefill()
        self.rows()
        self.sampling()

    def moves(self, name: str, n_bytes: float, ours: Sequence[Call], theirs: Sequence[Call] = ()) -> None:
        """A kernel bound by memory."""
        self._add(name, ours, theirs, n_bytes / 1e9, "GB/s", self.ceilings.copy)

    def computes(self, name: str, flop: float, ours: Sequence[Call], theirs: Sequence[Call] = ()) -> None:
        """A kernel bound by arithmetic."""
        self._add(name, ours, theirs, flop / 1e12, "TFLOP/s", self.ceilings.matmul)

    def _add(
        self, name: str, ours: Sequence[Call], theirs: Sequence[Call], work: float, unit: str, ceiling: float
    ) -> None:
        time, *other = self.timer([ours, theirs] if theirs else [ours])
        against = other[0] / time if other else None
        line = Line(name, time * 1e6, work / time, unit, work / time / ceiling, against)
        self.lines.append(line)
        beside = f"  torch {against:5.2f}x our time" if against else ""
        print(f"{name:40} {line.microseconds:10.1f} us {line.rate:9.1f} {unit:8} {line.share:5.0%}{beside}", flush=True)

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=BF16, device=self.device)

    def linear(self) -> None:
        shapes = linear_shapes(self.config) | {"lm_head": (self.config.vocab_size, self.config.dim)}
        for name, (n, k) in shapes.items():
            weights = [kernels.pack_weight(self._randn(n, k)) for _ in copies(2 * n * k)]
            for rows, exact in product(FEW_ROWS + MANY_ROWS, (True, False)):
                x = self._randn(rows, k)
                ours = [partial(kernels.linear, x, w, batch_invariant=exact) for w in weights]
                theirs = [partial(torch.matmul, x, w.data.T) for w in weights]
                label = f"linear {name} {rows} {'exact' if exact else 'fast'}"
                if rows in FEW_ROWS:
                    self.moves(label, linear_bytes(rows, n, k), ours, theirs)
                else:
                    self.computes(label, linear_flop(rows, n, k), ours, theirs)

    def decode(self) -> None:
        config = self.config
        for rows, length in DECODE:
            n_bytes = decode_bytes(config, rows, length)
            ours = [self._paged([1] * rows, length) for _ in copies(n_bytes)]
            q = self._randn(rows, config.n_heads, 1, config.head_dim)
            shape = (rows, config.n_kv_heads, length, config.head_dim)
            plain = [(self._randn(*shape), self._randn(*shape)) for _ in ours]
            theirs = [partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True) for k, v in plain]
            self.moves(f"decode attention {rows} x {length}", n_bytes, ours, theirs)

    def prefill(self) -> None:
        config = self.config
        for length in PREFILL:
            q, k, v = (
                self._randn(1, n, length, config.head_dim)
                for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)
            )
            sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            ours = [self._paged([length], length) for _ in range(4)]
            self.computes(f"prefill attention {length}", prefill_flop(config, length), ours, [sdpa])

    def _paged(self, n_queries: list[int], length: int) -> Call:
        """Attention of sequences of one length over shuffled blocks."""
        config, blocks = self.config, length // BLOCK_SIZE
        shape = (len(n_queries) * blocks, BLOCK_SIZE, config.n_kv_heads, config.head_dim)
        k, v = self._randn(*shape), self._randn(*shape)
        tables = np.random.default_rng(0).permutation(len(k)).astype(np.int32).reshape(len(n_queries), blocks)
        starts = np.concatenate(([0], np.cumsum(n_queries))).astype(np.int32)
        lengths = np.full(len(n_queries), length, np.int32)
        plan = kernels.plan_attention(starts, lengths, tables, BLOCK_SIZE, self.device)
        q = self._randn(sum(n_queries), config.n_heads, config.head_dim)
        return partial(kernels.paged_attention, q, k, v, plan, config.head_dim**-0.5)

    def rows(self) -> None:
        """The kernels that only pass over rows."""
        config = self.config
        norm, heads = self._randn(config.dim), config.n_heads + 2 * config.n_kv_heads
        table = kernels.rope_table(config.head_dim, 4096, 1e4, 1.0, self.device)
        for rows in (1, 64, 2048):
            size = 2 * rows * config.dim
            pairs = [(self._randn(rows, config.dim), self._randn(rows, config.dim)) for _ in copies(4 * size)]
            ours = [partial(kernels.rms_norm, x, norm, 1e-5, r) for x, r in pairs]
            theirs = [partial(plain_rms_norm, x, norm, r) for x, r in pairs]
            self.moves(f"rms_norm + residual {rows}", 4 * size, ours, theirs)

            size = 6 * rows * config.ffn_dim
            gates = [self._randn(rows, 2 * config.ffn_dim) for _ in copies(size)]
            swiglu, plain = ([partial(f, g) for g in gates] for f in (kernels.swiglu, plain_swiglu))
            self.moves(f"swiglu {rows}", size, swiglu, plain)

            k, v = (self._randn(128, BLOCK_SIZE, config.n_kv_heads, config.head_dim) for _ in range(2))
            at = torch.randperm(4096, device=self.device)[:rows]
            size = 4 * rows * heads * config.head_dim
            inputs = [self._randn(rows, heads * config.head_dim) for _ in copies(size)]
            rope = [partial(kernels.rope_write, x, table, at, at, k, v, config.n_heads) for x in inputs]
            self.moves(f"rope_write {rows}", size, rope)

    def sampling(self) -> None:
        for rows in (1, 30):
            logits = [torch.randn(rows, self.config.vocab_size, device=self.device) * 3 for _ in range(8)]
            n_bytes = 4 * rows * self.config.vocab_size
            ids, half = (torch.full((rows,), value, device=self.device) for value in (0, 0.5))
            filters = kernels.Filters.alike(rows, self.device, temperature=0)
            greedy = [partial(kernels.sample, x, filters, half) for x in logits]
            self.moves(f"sample greedy {rows}", n_bytes, greedy, [partial(torch.argmax, x, -1) for x in logits])
            filters = kernels.Filters.alike(rows, self.device, top_k=50, top_p=0.9, min_p=0.05)
            drawn = [partial(kernels.sample, x, filters, half) for x in logits]
            self.moves(f"sample top-k top-p {rows}", n_bytes, drawn, [partial(torch.sort, x, -1) for x in logits])
            top = [partial(kernels.token_logprobs, x, ids, 5) for x in logits]
            self.moves(f"token_logprobs 5 {rows}", n_bytes, top, [partial(torch.log_softmax, x, -1) for x in logits])

    def step(self, n_layers: int) -> dict[str, float]:
        """A whole decode step of one sequence, beside the sum of its kernels as measured alone before."""
        config = replace(self.config, n_layers=n_layers)
        weights = {name: self._randn(*shape) * 0.02 for name, shape in parameter_shapes(config).items()}
        model = Transformer(config, weights, STEP_LENGTH, True)
        blocks = STEP_LENGTH // BLOCK_SIZE
        cache = KVCache.empty(config, blocks, BLOCK_SIZE, BF16, self.device)
        starts, lengths = np.array([0, 1], np.int32), np.array([STEP_LENGTH], np.int32)
        tables = np.arange(blocks, dtype=np.int32)[None]
        plan = kernels.plan_attention(starts, lengths, tables, BLOCK_SIZE, self.device)
        token = torch.full((1,), 5, device=self.device)
        last = torch.full((1,), STEP_LENGTH - 1, device=self.device)
        batch = Batch(token, last, last, plan, torch.zeros(1, dtype=torch.int64, device=self.device))
        (time,) = self.timer([[lambda: model.logits(model.forward(batch, cache))]])
        took = {line.name: line.microseconds for line in self.lines}
        layer = 2 * took["rms_norm + residual 1"] + took["rope_write 1"] + took["swiglu 1"]
        layer += took[f"decode attention {STEP_ROWS} x {STEP_LENGTH}"]
        layer += sum(took[f"linear {name} 1 exact"] for name in linear_shapes(config))
        total = n_layers * layer + took["linear lm_head 1 exact"]
        report = {"layers": n_layers, "microseconds": time * 1e6, "kernels": total, "ratio": time * 1e6 / total}
        print(f"decode step, {n_layers} layers: {time * 1e6:.0f} us, {report['ratio']:.3f}x the sum of its kernels")
        return report


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + residual, weight.shape, weight, 1e-5)


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
