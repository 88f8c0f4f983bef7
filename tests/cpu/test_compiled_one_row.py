"""One-row steps through torch.compile: the plain path's tokens, whatever the blocks and the heads, and a way back."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from kernels.cpu.huge_pages import on_huge_pages, zeros_on_huge_pages
from kernels.cpu.packed_linear import pair_columns
from llama.batch import Batch, BlockTables, Step
from llama.cache import KVCache, plan_memory
from llama.config import EngineConfig, ModelConfig
from llama.cpu.one_row import OneRow
from llama.engine import Completion, Engine
from llama.errors import ConfigError
from llama.model import Transformer, random_parameters
from llama.request import Request, SamplingParams
from llama.scheduler import Plan
from llama.sequence import Sequence
from llama.setup import resolve

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


@pytest.mark.slow
def test_the_same_tokens_as_the_plain_path() -> None:
    assert_equal(answers(GROUPED, PROMPTS), answers(GROUPED, PROMPTS, compile=True))


@pytest.mark.slow
def test_shared_models(shared_file: Callable[[str], Path]) -> None:
    model = shared_file("models/stories260K-hf")  # tied embeddings
    assert_equal(answers(model, [[1]]), answers(model, [[1]], compile=True))


@torch.inference_mode()  # as the engine makes it
def filled_cache(model: ModelConfig) -> KVCache:
    """20 blocks of 16 tokens, the same numbers each time."""
    cache = KVCache.empty(model, 20, 16, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for tensor in cache.k + cache.v:
        tensor.normal_(generator=generator)
    return cache


def last_token(token_ids: list[int], table: list[int]) -> Step:
    """The step that computes the last of them, the others being in the cache."""
    seq = Sequence(Request([[1]], SamplingParams()), 0, token_ids, 1, 256, 0, frozenset())
    seq.num_computed, seq.block_table = len(token_ids) - 1, table
    return Step.of(Plan([seq], [len(token_ids) - 1], [1], [True]), BlockTables(), 16, None)


@pytest.mark.slow
@pytest.mark.parametrize("config", [GROUPED, replace(GROUPED, n_layers=8)], ids=["one call", "two calls"])
@torch.inference_mode()
def test_blocks_in_any_order_and_any_length(config: ModelConfig) -> None:
    """The rows before are read where they lie, or gathered; the new token's are written to their place."""
    parameters = random_parameters(config, torch.float32, torch.device("cpu"))
    model = Transformer(config, parameters, 256, False, keep_rows=True)
    caches = [filled_cache(config), filled_cache(config)]
    row = OneRow(model, caches[1])
    compiled = counters["stats"]["unique_graphs"]
    for n_tokens, table in ((3, [5]), (17, [9, 4]), (48, [7, 8, 9]), (40, [9, 3, 12]), (49, [3, 4, 5, 19])):
        if n_tokens == 40:
            assert counters["stats"]["unique_graphs"] == compiled, "a step had to wait for the compiler"
            torch.compiler.reset()  # as others may do; what is compiled then must not serve one length only
        step = last_token([2 + i for i in range(n_tokens)], table)
        assert row.serves(step)
        batch = Batch.of(step, step.logit_rows, torch.device("cpu"), None)
        wanted = model.logits(model.forward(batch, caches[0]))
        torch.testing.assert_close(row.run(step, None), wanted, atol=1e-5, rtol=0)
        for plain, other in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [GROUPED, replace(GROUPED, n_layers=5, tie_embeddings=True)])
def test_requests_do_not_wait_for_a_compiler(model: ModelConfig) -> None:
    """All that is compiled is compiled before the engine is there, whatever the lengths and wherever the blocks lie."""
    config = EngineConfig(device="cpu", dtype="float32", block_size=16, compile=True)
    with Engine(model, config, progress=False) as engine:
        compiled = counters["stats"]["unique_graphs"]
        for prompt in (*PROMPTS, [1, 7] * 40, PROMPTS[1]):
            engine.generate([prompt], PARAMS)
        assert counters["stats"]["unique_graphs"] == compiled > 0


@pytest.mark.parametrize("option", ["batch_invariant", "async_scheduling"])
def test_what_it_cannot_be_combined_with_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"compile=True: .* {option}=True"):
        EngineConfig(compile=True, **{option: True})  # type: ignore[arg-type]


def test_it_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.setup.find_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="compile=True: is for the CPU"):
        resolve(GROUPED, EngineConfig(compile=True))


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


def test_paired_columns_hold_every_number_of_a_bf16_matrix() -> None:
    weight = torch.randn(5, 12).bfloat16()
    weight[0, 0], weight[1, 7], weight[2, 5] = float("-inf"), -0.0, 1e-40  # a sign alone, and what bf16 has below 1e-38
    pairs = pair_columns(weight)
    left, right = (pairs << 16).view(torch.float32), (pairs & -65536).view(torch.float32)
    assert pairs.dtype == torch.int32
    assert torch.equal(torch.cat((left, right), 1).view(torch.int32), weight.float().view(torch.int32))


@pytest.mark.parametrize("shape", [(3, 5), (1024, 1024)])  # less than a large page, and more
def test_large_pages_hold_what_was_copied(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape)
    copy = on_huge_pages(tensor.t())
    assert copy.is_contiguous() and torch.equal(copy, tensor.t())
    assert copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("shape", [(3, 5), (2, 0, 4), (3, 1024, 1024)])
def test_zeros_on_huge_pages(shape: tuple[int, ...]) -> None:
    zeros = zeros_on_huge_pages(shape, torch.bfloat16)
    assert torch.equal(zeros, torch.zeros(shape, dtype=torch.bfloat16))
    zeros += 1  # they can be written
    assert zeros.is_contiguous() and bool((zeros == 1).all())


def test_large_pages_are_what_the_system_may_give() -> None:
    """Linux says of each mapping whether it may; not whether there were large pages left."""
    switch, maps = Path("/sys/kernel/mm/transparent_hugepage/enabled"), Path("/proc/self/smaps")
    if not switch.is_file() or "[never]" in switch.read_text() or "THPeligible" not in maps.read_text():
        pytest.skip("needs a Linux with transparent huge pages switched on")
    tensor = zeros_on_huge_pages((1 << 22,), torch.float32)
    eligible = None
    for line in maps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif line.startswith("THPeligible") and inside:
            eligible = line.split()[1]
    assert eligible == "1"


@pytest.mark.slow
def test_bf16_weights_are_rounded_no_more_than_on_the_plain_path() -> None:
    """Against the same weights in fp32: one-row steps keep fp32 between the multiplications."""
    parameters = random_parameters(GROUPED, torch.bfloat16, torch.device("cpu"))
    wide = {name: tensor.float() for name, tensor in parameters.items()}
    step = last_token([1, 17, 40, 12, 8], [1])
    with torch.inference_mode():
        exact = Transformer(GROUPED, wide, 256, False)
        fast = Transformer(GROUPED, parameters, 256, False, keep_rows=True)
        batch = Batch.of(step, step.logit_rows, torch.device("cpu"), None)
        expected = exact.logits(exact.forward(batch, filled_cache(GROUPED)))
        made = OneRow(fast, filled_cache(GROUPED)).run(step, None)
    assert (made - expected).abs().max() < 1e-4
