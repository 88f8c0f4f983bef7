"""Each kernel on this card, beside the ceilings measured in the same run and torch's own operation.

    python scripts/bench.py kernels               a table for people, and one JSON object on the last line
    python scripts/bench.py kernels --model 70B
    python scripts/bench.py kernels --tune        the best tile per row count, as lines for kernels/tiles.py

Times are medians of CUDA-graph replays on random data; a graph walks through enough copies of its inputs that no run
finds them in the L2 cache. GB/s counts what must move once; a share is of the ceiling that binds (copy or matmul).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton

import kernels
from kernels.matmul import launch_matmul
from kernels.tiles import MatmulTile
from llama.config import NAMED, ModelConfig
from llama.errors import ConfigError

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
COLD_BYTES = 256 << 20  # several times the L2 of any card
FEW_ROWS, MANY_ROWS = (1, 4, 8, 16, 32, 64), (512, 2048, 8192)
Call = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """One measured kernel. rate: GB/s or TFLOP/s; share: of the ceiling; torch: torch's time over ours."""

    name: str
    microseconds: float
    rate: float
    unit: str
    share: float
    torch: float | None


@dataclass(frozen=True)
class Ceilings:
    copy: float  # GB/s, read and written
    read: float  # GB/s
    matmul: float  # TFLOP/s, bf16


def seconds(calls: Sequence[Call], replays: int = 30) -> float:
    """The median time of one call, over replays of a graph of all of them."""
    for call in calls:
        call()  # compiled, and every buffer touched, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(found[replays // 3 :])


def copies(n_bytes: int) -> range:
    """How many copies of an input make it cold every time; at least four, so that a graph is not one short kernel."""
    return range(max(4, min(64, -(-COLD_BYTES // n_bytes))))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=BF16, device=CUDA)


def measure_ceilings() -> Ceilings:
    source = torch.randn(1 << 28, device=CUDA)
    target = torch.empty_like(source)
    a, b = randn(8192, 8192), randn(8192, 8192)
    return Ceilings(
        copy=2 * source.nbytes / seconds([lambda: target.copy_(source)] * 4) / 1e9,
        read=source.nbytes / seconds([lambda: source.sum()] * 4) / 1e9,
        matmul=2 * 8192**3 / seconds([lambda: a @ b] * 4) / 1e12,
    )


class Bench:
    def __init__(self, config: ModelConfig, ceilings: Ceilings) -> None:
        self.config, self.ceilings, self.lines = config, ceilings, list[Line]()

    def moves(self, name: str, n_bytes: float, ours: Sequence[Call], theirs: Sequence[Call]) -> None:
        """A kernel bound by memory."""
        self._add(name, ours, theirs, n_bytes / 1e9, "GB/s", self.ceilings.copy)

    def computes(self, name: str, flop: float, ours: Sequence[Call], theirs: Sequence[Call]) -> None:
        """A kernel bound by arithmetic."""
        self._add(name, ours, theirs, flop / 1e12, "TFLOP/s", self.ceilings.matmul)

    def _add(
        self, name: str, ours: Sequence[Call], theirs: Sequence[Call], work: float, unit: str, ceiling: float
    ) -> None:
        time = seconds(ours)
        against = seconds(theirs) / time if theirs else None
        line = Line(name, time * 1e6, work / time, unit, work / time / ceiling, against)
        self.lines.append(line)
        beside = f"  torch {against:5.2f}x our time" if against else ""
        print(f"{name:40} {line.microseconds:10.1f} us {line.rate:9.1f} {unit:8} {line.share:5.0%}{beside}", flush=True)

    def linear(self) -> None:
        config = self.config
        shapes = {
            "qkv": (config.q_dim + 2 * config.kv_dim, config.dim),
            "o": (config.dim, config.q_dim),
            "gate_up": (2 * config.ffn_dim, config.dim),
            "down": (config.dim, config.ffn_dim),
        }
        for (name, (n, k)), invariant in product(shapes.items(), (True, False)):
            weights = [kernels.pack_weight(randn(n, k)) for _ in copies(2 * n * k)]
            mode = "" if invariant else " fast"
            for rows in FEW_ROWS + MANY_ROWS:
                x = randn(rows, k)
                ours = [partial(kernels.linear, x, w, batch_invariant=invariant) for w in weights]
                theirs = [partial(torch.matmul, x, w.data.T) for w in weights]
                if rows in FEW_ROWS:
                    self.moves(f"linear {name} {rows}{mode}", 2 * (n * k + rows * (n + k)), ours, theirs)
                else:
                    self.computes(f"linear {name} {rows}{mode}", 2 * rows * n * k, ours, theirs)

    def attention(self) -> None:
        heads, kv_heads, d = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        for rows, length in ((1, 512), (1, 4096), (16, 4096), (64, 4096), (8, 32768)):
            n_bytes = 4 * rows * length * kv_heads * d
            made = [self._paged([1] * rows, length) for _ in copies(n_bytes)]
            plain = [(randn(rows, kv_heads, length, d), randn(rows, kv_heads, length, d)) for _ in made]
            q = randn(rows, heads, 1, d)
            theirs = [partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True) for k, v in plain]
            self.moves(f"decode attention {rows} x {length}", n_bytes, made, theirs)
        for length in (1024, 4096, 8192):
            made = [self._paged([length], length) for _ in range(4)]
            q, k, v = (randn(1, n, length, d) for n in (heads, kv_heads, kv_heads))
            flop = 2 * length * length * heads * d  # causal: half of 4 n^2 d
            sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            self.computes(f"prefill attention {length}", flop, made, [sdpa] * 4)

    def _paged(self, n_queries: list[int], length: int) -> Call:
        config, block_size = self.config, 64
        blocks = length // block_size
        k, v = (randn(len(n_queries) * blocks, block_size, config.n_kv_heads, config.head_dim) for _ in range(2))
        tables = np.random.default_rng(0).permutation(len(k)).astype(np.int32).reshape(len(n_queries), blocks)
        starts = np.concatenate(([0], np.cumsum(n_queries))).astype(np.int32)
        plan = kernels.plan_attention(starts, np.full(len(n_queries), length, np.int32), tables, block_size, CUDA)
        q = randn(sum(n_queries), config.n_heads, config.head_dim)
        return lambda: kernels.paged_attention(q, k, v, plan, config.head_dim**-0.5)

    def rows(self) -> None:
        config = self.config
        norm, table = randn(config.dim), kernels.rope_table(config.head_dim, 4096, 1e4, 1.0, CUDA)
        heads = config.n_heads + 2 * config.n_kv_heads
        for rows in (1, 64, 2048):
            size = 2 * rows * config.dim
            pairs = [(randn(rows, config.dim), randn(rows, config.dim)) for _ in copies(4 * size)]
            ours = [partial(kernels.rms_norm, x, norm, 1e-5, r) for x, r in pairs]
            theirs = [partial(plain_rms_norm, x, norm, r) for x, r in pairs]
            self.moves(f"rms_norm + residual {rows}", 4 * size, ours, theirs)

            gates = [randn(rows, 2 * config.ffn_dim) for _ in copies(6 * rows * config.ffn_dim)]
            swiglu, plain = ([partial(f, g) for g in gates] for f in (kernels.swiglu, plain_swiglu))
            self.moves(f"swiglu {rows}", 6 * rows * config.ffn_dim, swiglu, plain)

            k, v = (randn(128, 64, config.n_kv_heads, config.head_dim) for _ in range(2))
            at = torch.randperm(4096, device=CUDA)[:rows]
            inputs = [randn(rows, heads * config.head_dim) for _ in copies(4 * rows * heads * config.head_dim)]
            rope = [partial(kernels.rope_write, x, table, at, at, k, v, config.n_heads) for x in inputs]
            self.moves(f"rope_write {rows}", 4 * rows * heads * config.head_dim, rope, [])

    def sampling(self) -> None:
        for rows in (1, 30):
            logits = [torch.randn(rows, self.config.vocab_size, device=CUDA) * 3 for _ in range(8)]
            n_bytes = logits[0].nbytes
            column = partial(torch.full, (rows,), device=CUDA)
            off, half = column(0), column(0.5)
            greedy = [partial(kernels.sample, x, off * 0.0, off, half, half, half) for x in logits]
            self.moves(f"sample greedy {rows}", n_bytes, greedy, [partial(torch.argmax, x, -1) for x in logits])
            settings = (column(1.0), column(50), column(0.9), column(0.05), half)
            drawn = [partial(kernels.sample, x, *settings) for x in logits]
            self.moves(f"sample top-k top-p {rows}", n_bytes, drawn, [partial(torch.sort, x, -1) for x in logits])
            top = [partial(kernels.token_logprobs, x, off, 5) for x in logits]
            self.moves(f"token_logprobs 5 {rows}", n_bytes, top, [partial(torch.log_softmax, x, -1) for x in logits])


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + residual, weight.shape, weight, 1e-5)


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def tune(config: ModelConfig) -> None:
    """The best tile of the few-rows table, for a narrow and a wide weight."""
    for (n, k), rows in product(((config.dim, config.dim), (2 * config.ffn_dim, config.dim)), (4, 16, 32, 64)):
        weights = [kernels.pack_weight(randn(n, k)) for _ in copies(2 * n * k)]
        x, out = randn(rows, k), torch.empty(rows, n, dtype=BF16, device=CUDA)
        best: tuple[float, MatmulTile] | None = None
        for block_n, block_k, stages, warps in product((16, 32, 64, 128), (64, 128, 256), (3, 4, 5, 6), (2, 4, 8)):
            tile = MatmulTile(max(16, rows), block_n, block_k, stages, warps)
            if block_n < 8 * warps or 2 * stages * block_k * (tile.block_m + block_n) > 200 << 10:
                continue
            try:
                time = seconds([partial(launch_matmul, x, w, out, tile, 1) for w in weights], 9)
            except triton.runtime.errors.OutOfResources:
                continue
            best = min(best or (time, tile), (time, tile), key=lambda found: found[0])
        assert best is not None
        rate = 2 * n * k / best[0] / 1e9
        print(f"rows <= {rows:2} n {n:6}: {best[1]}  {best[0] * 1e6:.1f} us, {rate:.0f} GB/s", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(NAMED), default="7B", help="whose shapes to measure")
    parser.add_argument("--tune", action="store_true", help="search the tiles for few rows instead")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ConfigError("device", "cpu", "the kernels are measured on a CUDA device, and there is none")
    config = ModelConfig.named(args.model)
    torch.manual_seed(0)
    if args.tune:
        tune(config)
        return {"tuned": args.model}
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings.copy:.0f} GB/s, read {ceilings.read:.0f} GB/s, ", end="")
    print(f"bf16 matmul {ceilings.matmul:.0f} TFLOP/s; torch {torch.__version__}, triton {triton.__version__}")
    bench = Bench(config, ceilings)
    with torch.inference_mode():
        bench.linear()
        bench.attention()
        bench.rows()
        bench.sampling()
    return {
        "card": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "ceilings": asdict(ceilings),
        "kernels": [asdict(line) for line in bench.lines],
    }
