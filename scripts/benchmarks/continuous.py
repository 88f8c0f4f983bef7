"""transformers' continuous batching, a peer of its own: requests join its batch and leave it while it runs.

With few unlike requests in flight it is faster than `generate` in batches. Written against transformers 5.24.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model import BenchModel
from benchmarks.peers import Peer
from benchmarks.remote import RemoteSides
from benchmarks.sides import Side, transformers_missing

try:
    import transformers
except ImportError:
    transformers = None  # type: ignore[assignment]

_PAGE = 32  # tokens
_STEP_TOKENS = 512  # of a step, at most


def continuous_peer(model: BenchModel, folder: Path) -> Peer:
    def start(dtype: str, n_seqs: int, context: int) -> RemoteSides:
        return RemoteSides(continuous_sides, folder, dtype, model.threads, context)

    subjects = ["batch8", "batch32", "mixed8", "mixed32"]
    return Peer("transformers-continuous", continuous_missing(model.device), start, only=subjects)


def continuous_missing(device: str) -> str | None:
    """Why it cannot be a side, or None."""
    if device != "cpu":
        return "is measured on the CPU only"
    if (why := transformers_missing()) is not None:
        return why
    return None if hasattr(transformers, "ContinuousBatchingConfig") else "transformers is too old for it"


def continuous_sides(folder: Path, dtype: str, threads: int, context: int) -> list[Side]:
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil, twice a start
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return [Continuous(model.eval(), context)]


class Continuous:
    """context: tokens of one sequence. Eager attention: with 32 in flight faster than sdpa, with 8 equal."""

    name = "transformers-continuous eager"

    def __init__(self, model: Any, context: int) -> None:
        self._model, self._context = model, context
        self._greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def batch(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> float:
        return sum(lengths) / self._run(prompts, lengths, at_once)[1]

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self._run([prompt], [n], 1)[0][0]

    def prefill(self, prompt: list[int]) -> float:
        raise NotImplementedError("it is measured in batches only")

    def decode(self, prompt: list[int], n: int) -> float:
        raise NotImplementedError("it is measured in batches only")

    def _run(self, prompts: list[list[int]], lengths: list[int], at_once: int) -> tuple[list[list[int]], float]:
        """New tokens of each, and the seconds for all; starting and stopping its thread is not part of them."""
        options = transformers.ContinuousBatchingConfig(
            max_requests_per_batch=at_once,
            page_size=_PAGE,
            num_blocks=at_once * -(-self._context // _PAGE),
            max_batch_tokens=_STEP_TOKENS,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        manager = self._model.init_continuous_batching(self._greedy, options)
        manager.start()
        try:
            start = time.perf_counter()
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
            tokens: dict[str, list[int]] = {}
            while len(tokens) < len(names):
                result = manager.get_result(timeout=600)
                if result is None or result.error:
                    raise RuntimeError(f"transformers' continuous batching: {result.error if result else 'no answer'}")
                if result.is_finished():
                    tokens[result.request_id] = result.generated_tokens
            seconds = time.perf_counter() - start
        finally:
            manager.stop(block=True)
        assert [len(tokens[name]) for name in names] == lengths
        return [tokens[name] for name in names], seconds
