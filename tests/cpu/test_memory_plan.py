"""The memory plan is made and reported before anything is allocated; what cannot fit is refused with the figures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama.cache
from llama import Engine, EngineConfig, ModelConfig, SamplingParams
from llama.cache import GIB, KVCache, MemoryPlan, plan_memory
from llama.errors import ConfigError

CPU = torch.device("cpu")
SEVEN = ModelConfig.named("7B")
TINY = ModelConfig(32, 2, 4, 2, 8, 48, 61, max_seq_len=64, dtype="float32")


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes the machine seems to have."""
    return lambda n: monkeypatch.setattr(llama.cache, "available_memory", lambda device: n)


def plan(
    model: ModelConfig, max_seq_len: int | None = None, dtype: torch.dtype = torch.bfloat16, **options: object
) -> MemoryPlan:
    config = EngineConfig(**options)  # type: ignore[arg-type]
    return plan_memory(model, config, max_seq_len or model.max_seq_len, dtype, CPU)


def test_the_arithmetic_of_7b(free_memory: Callable[[int], None]) -> None:
    free_memory(64 * GIB)
    made = plan(SEVEN, block_size=64)
    assert made.weights == 2 * 6_738_415_616
    assert made.kv_block == 64 * 1_048_576, "a MiB per token: the CPU's cache holds fp32"
    card = plan_memory(SEVEN, EngineConfig(block_size=64), 4096, torch.bfloat16, torch.device("cuda"))
    assert card.kv_block == 64 * 524_288, "half a MiB per token"
    assert made.kv_cache == made.num_blocks * made.kv_block
    assert made.kv_tokens == (made.num_blocks - 1) * 64
    assert made.kv_tokens >= 4096
    assert made.weights + made.kv_cache + made.activations <= 64 * GIB
    assert "weights 12.55 GiB" in str(made)
    assert f"({made.num_blocks} blocks of 64 tokens)" in str(made)


def test_grouped_heads_need_less_cache(free_memory: Callable[[int], None]) -> None:
    free_memory(512 * GIB)
    assert plan(ModelConfig.named("70B"), block_size=16).kv_block == 16 * 2 * 80 * 1024 * 4


@pytest.mark.parametrize("name, gib", [("7B", 10), ("13B", 20), ("70B", 100), ("7B", 14)])
def test_what_cannot_fit_is_refused_with_the_figures(free_memory: Callable[[int], None], name: str, gib: int) -> None:
    """14 GiB hold 7B's weights, but not one whole sequence beside them."""
    free_memory(gib * GIB)
    model = ModelConfig.named(name)
    with pytest.raises(ConfigError) as caught:
        plan(model)
    assert caught.value.field == "model"
    for part in (f"weights {model.n_params * 2 / GIB:.2f}", "KV cache", f"{gib}.00 GiB are available"):
        assert part in str(caught.value)


def test_a_shorter_context_may_fit(free_memory: Callable[[int], None]) -> None:
    free_memory(14 * GIB)
    assert plan(SEVEN, max_seq_len=512, max_batch_tokens=256, max_batch_seqs=8).kv_tokens >= 512


def test_a_cache_that_holds_no_whole_sequence_is_refused(free_memory: Callable[[int], None]) -> None:
    free_memory(1 * GIB)
    block = plan(TINY, dtype=torch.float32, block_size=16).kv_block
    needed = 5 * block  # four blocks of 16 for 64 tokens, and the pad block
    assert plan(TINY, dtype=torch.float32, block_size=16, kv_memory=needed).num_blocks == 5
    with pytest.raises(ConfigError, match=f"one sequence of 64 tokens needs {needed} bytes") as caught:
        plan(TINY, dtype=torch.float32, block_size=16, kv_memory=needed - 1)
    assert (caught.value.field, caught.value.value) == ("kv_memory", needed - 1)


def test_more_cache_than_there_is_memory_is_refused(free_memory: Callable[[int], None]) -> None:
    free_memory(1 * GIB)
    with pytest.raises(ConfigError, match=r"1\.00 GiB are available"):
        plan(TINY, kv_memory=2 * GIB)


def test_the_plan_is_what_is_allocated() -> None:
    config = EngineConfig(device="cpu", block_size=16, kv_memory=1 << 20)
    with Engine(TINY, config, progress=False) as engine:
        made, cache = engine.memory_plan, engine._loop.runner.cache  # type: ignore[attr-defined]
        assert isinstance(cache, KVCache)
        assert sum(t.nbytes for t in (*cache.k, *cache.v)) == made.kv_cache <= 1 << 20
        assert engine.stats().blocks == made.num_blocks - 1
        assert made.weights == TINY.n_params * 4


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@needs_proc
def test_nothing_is_allocated_for_what_cannot_fit(free_memory: Callable[[int], None]) -> None:
    """The refusal comes from the description alone."""
    before = resident()
    free_memory(100 * GIB)
    with pytest.raises(ConfigError, match=r"100\.00 GiB are available"):
        Engine(ModelConfig.named("70B"), EngineConfig(device="cpu"), progress=False)
    assert resident() - before < 100 << 20


@pytest.mark.slow
@needs_proc
def test_seven_b_of_two_layers_in_bf16() -> None:
    """A real width on the CPU: 0.67 B random parameters. The plan is reported while nothing is allocated yet."""
    before = resident()
    reported: list[tuple[str, int]] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reported.append((record.getMessage(), resident() - before))

    log, watch = logging.getLogger("llama"), Watch()
    level = log.level
    log.addHandler(watch)
    log.setLevel(logging.INFO)
    model = replace(SEVEN, n_layers=2)
    options = EngineConfig(
        device="cpu", dtype="bfloat16", max_seq_len=128, kv_memory=16 << 20, max_batch_tokens=64, max_batch_seqs=8
    )
    try:
        with Engine(model, options, progress=False) as engine:
            message, used = reported[0]
            assert message == str(engine.memory_plan)
            assert "weights 1.24 GiB" in message
            assert used < 200 << 20 < GIB < resident() - before
            assert engine.memory_plan.weights == model.n_params * 2
            prompts = [[1, 15043, 29871], [1, *range(1000, 1020)]]
            params = [
                SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=1),
                SamplingParams(max_tokens=3, seed=1, ignore_eos=True, logprobs=1),
            ]
            first = engine.generate(prompts, params)
            assert [len(done.token_ids) for done in first] == [3, 3]
            assert all(-30 < token.logprob < 0 for done in first for token in done.logprobs)
            assert engine.stats().blocks_free == engine.stats().blocks
    finally:
        log.removeHandler(watch)
        log.setLevel(level)
