"""One-row steps through torch.compile: the plain path's tokens, whatever the blocks and the heads, and a way back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama.batch import Batch
from llama.cache import KVCache, plan_memory
from llama.compiled import CompiledRow
from llama.config import EngineConfig, ModelConfig
from llama.engine import Completion, Engine
from llama.errors import ConfigError
from llama.model import Transformer, random_parameters
from llama.request import Request, SamplingParams
from llama.scheduler import Plan
from llama.sequence import Sequence
from llama.setup import decide

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

GROUPED = ModelConfig(64, 3, 8, 2, 8, 172, 300, max_seq_len=256)  # head_dim 8, four query heads to a key head
PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
PROMPTS = [[1, 17, 40], [1, 5, 9, 200, 33, 12, 8, 77, 21, 90]]


def answers(model: ModelConfig | Path, prompts: list[list[int]], **options: object) -> list[Completion]:
    """One after the other, so that each runs alone."""
    config = EngineConfig(device="cpu", dtype="float32", block_size=16, **options)  # type: ignore[arg-type]
    with Engine(model, config, progress=False) as engine:
        assert (engine.setup.config.compile) == bool(options.get("compile"))
        return [engine.generate([prompt], PARAMS)[0] for prompt in prompts]


def assert_equal(plain: list[Completion], compiled: list[Completion]) -> None:
    for one, other in zip(plain, compiled, strict=True):
        assert one.token_ids == other.token_ids
        gap = max(abs(a.logprob - b.logprob) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        assert gap < 1e-4


def test_the_same_tokens_as_the_plain_path() -> None:
    assert_equal(answers(GROUPED, PROMPTS), answers(GROUPED, PROMPTS, compile=True))


def test_shared_models(shared_file: Callable[[str], Path]) -> None:
    model = shared_file("models/stories260K-hf")  # tied embeddings
    assert_equal(answers(model, [[1]]), answers(model, [[1]], compile=True))


@torch.inference_mode()
def test_blocks_in_any_order_and_any_length() -> None:
    """The rows before are read where they lie, or gathered; the new token's are written to their place."""
    parameters = random_parameters(GROUPED, torch.float32, torch.device("cpu"))
    model = Transformer(GROUPED, parameters, 256, False, keep_rows=True)
    caches = [KVCache.empty(GROUPED, 20, 16, torch.float32, torch.device("cpu")) for _ in range(2)]
    for plain, other in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
        other.copy_(plain.normal_())
    row = CompiledRow(model, caches[1])
    for n_tokens, table in ((3, [5]), (17, [9, 4]), (48, [7, 8, 9]), (40, [9, 3, 12]), (49, [3, 4, 5, 19])):
        seq = Sequence(Request([[1]], SamplingParams()), 0, [2 + i for i in range(n_tokens)], 1, 256, 0, frozenset())
        seq.num_computed, seq.block_table = n_tokens - 1, table
        plan = Plan([seq], [n_tokens - 1], [1], [True])
        assert row.serves(plan)
        batch = Batch.from_plan(plan, [0], 16, torch.device("cpu"))
        wanted = model.logits(model.forward(batch, caches[0]))
        torch.testing.assert_close(row.run(plan), wanted, atol=1e-5, rtol=0)
        for plain, other in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", ["batch_invariant", "steps_ahead"])
def test_what_it_cannot_be_combined_with_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"compile=True: .* {option}=True"):
        EngineConfig(compile=True, **{option: True})  # type: ignore[arg-type]


def test_it_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.setup.find_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="compile=True: is for the CPU"):
        decide(GROUPED, EngineConfig(compile=True))


def test_the_memory_plan_counts_both_layouts() -> None:
    once, twice = (
        plan_memory(GROUPED, EngineConfig(compile=compiled), 256, torch.float32, torch.device("cpu")).weights
        for compiled in (False, True)
    )
    assert twice == 2 * once


def test_without_a_compiler_it_says_so_and_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no compiler\nand a long story")

    plain = answers(GROUPED, PROMPTS)
    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level(logging.WARNING, "llama"):
        assert_equal(plain, answers(GROUPED, PROMPTS, compile=True))
    assert "torch.compile failed, steps run operator by operator: no compiler" in caplog.text
