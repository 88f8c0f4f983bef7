"""The engines that are compared, behind one interface: ours, and transformers.

Decoding is greedy and ignores end tokens, so every side computes exactly the tokens that were asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.model import BenchModel, greedy, make_engine
from llama.config import ModelConfig
from llama.engine import Engine
from llama.request import Request
from llama.slots import Slots
from llama_slots.extras import pip_command

try:
    import transformers
except ImportError:
    transformers = None  # type: ignore[assignment]


class Side(Protocol):
    """An engine with its weights in memory. All rates are tokens per second."""

    name: str

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens, from the call to the first new token in hand."""

    def decode(self, prompt: list[int], n: int) -> float:
        """New tokens of one sequence, n of them, timed from the first one on."""

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        """New tokens of requests that all wait at the start, lengths[i] of prompt i, at_once of them in flight; the
        time for the prompts included."""

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        """The n tokens after the prompt."""


class Ours:
    name = "ours"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        stream = self.engine.submit(Request([prompt], greedy(1)))
        assert next(stream).token_ids
        return len(prompt) / (time.perf_counter() - start)

    def decode(self, prompt: list[int], n: int) -> float:
        stream = self.engine.submit(Request([prompt], greedy(n)))
        got = len(next(stream).token_ids)
        start = time.perf_counter()
        rest = sum(len(delta.token_ids) for delta in stream)
        seconds = time.perf_counter() - start
        assert got + rest == n
        return rest / seconds

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        slots = Slots(at_once)  # the engine may have more
        start = time.perf_counter()
        streams = [
            self.engine.submit(Request([prompt], greedy(n)), seat=slots.acquire(wait=True))
            for prompt, n in zip(prompts, lengths, strict=True)
        ]
        counts = [sum(len(delta.token_ids) for delta in stream) for stream in streams]
        seconds = time.perf_counter() - start
        assert counts == lengths
        return sum(lengths) / seconds

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self.engine.generate([prompt], greedy(n))[0].token_ids


def our_sides(
    model: BenchModel,
    slots: int,
    max_seq_len: int,
    source: Path | ModelConfig | None = None,
    prefix_cache: bool = False,
) -> list[Side]:
    """`make_engine` as a side, for a process of its own."""
    torch.set_num_threads(model.threads)
    return [Ours(make_engine(model, slots, max_seq_len, source, prefix_cache))]


def transformers_missing() -> str | None:
    """Why transformers cannot be a side, or None."""
    return None if transformers is not None else f"is not installed: {pip_command('bench')}"


def transformers_facts() -> dict[str, str] | None:
    """The version that its figures depend on."""
    return None if transformers is None else {"version": transformers.__version__}


def transformers_sides(folder: Path, dtype: str, device: str, threads: int, ways: Sequence[str]) -> list[Side]:
    """A side for each way of attention ("eager", "sdpa"), sharing the folder's weights."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(torch.device(device)).eval()
    return [Transformers(model, way) for way in ways]


class Clock:
    """The streamer of `generate`: notes when the first new token came."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, _: object) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt itself is the first call
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


class Transformers:
    """attention: "eager" or "sdpa"; two sides may share one model."""

    def __init__(self, model: Any, attention: str) -> None:
        self.name = f"transformers {attention}"
        self.model, self.attention = model, attention

    def prefill(self, prompt: list[int]) -> float:
        self._switch()
        start = time.perf_counter()
        self._generate([prompt], 1)
        return len(prompt) / (time.perf_counter() - start)

    def decode(self, prompt: list[int], n: int) -> float:
        clock = Clock()
        self._switch()
        self._generate([prompt], n, clock)
        return (n - 1) / (time.perf_counter() - clock.first)

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        """One `generate` for each `at_once` prompts, in order, padded on the left. It runs every row to the longest
        output of its batch; only the tokens asked for count."""
        self._switch()
        start = time.perf_counter()
        for first in range(0, len(prompts), at_once):
            part = slice(first, first + at_once)
            self._generate(prompts[part], max(lengths[part]))
        return sum(lengths) / (time.perf_counter() - start)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        self._switch()
        return self._generate([prompt], n)[0][len(prompt) :]

    def _switch(self) -> None:
        """Not part of any measurement."""
        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], n: int, clock: Clock | None = None) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        rows = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            streamer=clock,
        )
        return rows.tolist()
