"""Steps of several rows through torch.compile: the plain path's logits and cache, for any mix of decodes and
prompts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import llama.cpu.executor
from llama.batch import Batch, BlockTables, LastStep, Step
from llama.cache import KVCache
from llama.config import EngineConfig, ModelConfig
from llama.cpu.many_rows import ManyRows
from llama.cpu.one_row import OneRow
from llama.engine import Completion, Engine
from llama.model import Transformer, random_parameters
from llama.request import Request, SamplingParams
from llama.scheduler import Plan
from llama.sequence import Sequence

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

CPU = torch.device("cpu")
GROUPED = ModelConfig(64, 3, 8, 2, 8, 172, 300, max_seq_len=256)  # head_dim 8, four query heads to a key head
WIDE = ModelConfig(384, 4, 6, 6, 64, 1024, 2100, max_seq_len=256)  # some matrices packed by oneDNN, some not
N_BLOCKS = 80

# For each sequence: tokens in the cache, tokens to compute, and whether the last of them yields one.
Work = list[tuple[int, int, bool]]
works = st.lists(
    st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 40)), st.booleans()), min_size=1, max_size=8
).filter(lambda work: sum(count for _, count, _ in work) > 1 and any(yields for *_, yields in work))


@dataclass
class Both:
    """The plain path and the compiled one, each with a cache of the same numbers."""

    model: Transformer
    plain: KVCache
    compiled: KVCache
    batch: ManyRows


@cache
def both(config: ModelConfig, dtype: torch.dtype = torch.float32, size: int = 16) -> Both:
    with torch.inference_mode():  # as the engine does
        model = Transformer(config, random_parameters(config, dtype, CPU), 256, False)
        plain, compiled = (KVCache.empty(config, N_BLOCKS * 16 // size, size, torch.float32, CPU) for _ in range(2))
        batch = ManyRows(model, compiled)
        assert not compiled.whole.any(), "compiling must leave the cache as it was"
        return Both(model, plain, compiled, batch)


def step_of(work: Work, size: int = 16, n_blocks: int = N_BLOCKS) -> Step:
    """Blocks in any order, each used once, of a cache of so many blocks of 16 tokens."""
    dice = np.random.default_rng(len(work))
    order = (1 + dice.permutation(n_blocks * 16 // size - 1)).tolist()
    plan = Plan()
    for first, count, yields in work:
        ids = dice.integers(3, 300, first + count).tolist()
        seq = Sequence(Request([[1]], SamplingParams()), 0, ids, 1, 256, 0, frozenset())
        n = -(-len(ids) // size)
        seq.num_computed, seq.block_table, order = first, order[:n], order[n:]
        plan.add(seq, first, count, yields)
    return Step.of(plan, BlockTables(), size, None)


def fill(pair: Both, step: Step) -> None:
    """Random keys and values where the sequences have some, NaN everywhere else but in block 0."""
    known = [
        seq.block_table[at // pair.plain.block_size] * pair.plain.block_size + at % pair.plain.block_size
        for seq, first in zip(step.plan.seqs, step.plan.firsts, strict=True)
        for at in range(first)
    ]
    for kept in (pair.plain, pair.compiled):
        kept.whole[:, :, 1:] = float("nan")
        rows = kept.whole.flatten(2, 3)
        rows[:, :, known] = torch.randn(rows[:, :, known].shape, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def check(pair: Both, work: Work) -> None:
    size = pair.plain.block_size
    step = step_of(work, size)
    assert all(len(seq.block_table) * size >= len(seq.token_ids) for seq in step.plan.seqs), "more than the cache holds"
    fill(pair, step)
    batch = Batch.of(step, step.logit_rows, CPU, None)
    expected = pair.model.logits(pair.model.forward(batch, pair.plain))
    torch.testing.assert_close(pair.batch.run(step, None), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pair.compiled.whole, pair.plain.whole, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(work=works)
def test_any_plan_is_the_plain_path(work: Work) -> None:
    pair = both(GROUPED)
    compiled = counters["stats"]["unique_graphs"]
    check(pair, work)
    assert counters["stats"]["unique_graphs"] == compiled, "a step had to wait for the compiler"


TWELVE = ModelConfig(96, 1, 12, 12, 8, 172, 300, max_seq_len=256)  # heads that do not fill vector registers


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, size",
    [
        (replace(GROUPED, n_layers=8), 16),
        (replace(GROUPED, tie_embeddings=True), 1),
        (TWELVE, 64),
        (TWELVE, 2),
        (WIDE, 16),
    ],
    ids=[
        "two calls",
        "one matrix at both ends, blocks of 1",
        "12 heads, blocks of 64",
        "12 heads of 2",
        "oneDNN's layout",
    ],
)
def test_models(config: ModelConfig, size: int) -> None:
    pair = both(config, size=size)
    if config is WIDE and torch.backends.mkldnn.is_available():
        block = pair.model.blocks[0]
        assert pair.model.lm_head.blocked and block.gate_up_proj.blocked and not block.o_proj.blocked
    check(pair, [(30, 1, True), (0, 5, True), (17, 1, True), (3, 20, False)])
    check(pair, [(0, 2, True)])


def test_loops_shared_by_threads() -> None:
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            check(both(GROUPED), [(30, 1, True), (0, 5, True), (17, 1, True), (3, 20, False)] * 2)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_nan_stays_with_its_sequence() -> None:
    pair, step = both(GROUPED), step_of([(30, 1, True), (0, 5, True), (17, 1, True)])
    fill(pair, step)
    expected = pair.batch.run(step, None)
    pair.compiled.whole[:, :, step.plan.seqs[0].block_table[1]] = float("nan")
    found = pair.batch.run(step, None)
    assert found[0].isnan().all() and torch.equal(found[1:], expected[1:])


@pytest.mark.slow
def test_16_bits_are_rounded_no_more_than_on_the_plain_path() -> None:
    """Against the same weights in fp32."""
    parameters = random_parameters(WIDE, torch.bfloat16, CPU)
    wide = Transformer(WIDE, {name: tensor.float() for name, tensor in parameters.items()}, 256, False)
    pair, step = both(WIDE, torch.bfloat16), step_of([(30, 1, True), (0, 5, True), (17, 1, True)])
    outcomes = []
    with torch.inference_mode():
        batch = Batch.of(step, step.logit_rows, CPU, None)
        for model in (wide, pair.model):
            fill(pair, step)
            outcomes.append(model.logits(model.forward(batch, pair.plain)))
        outcomes.append(pair.batch.run(step, None))
    exact, plain, compiled = outcomes
    assert (compiled - exact).abs().max() <= 1.1 * (plain - exact).abs().max()


def test_after_others_have_reset_the_compiler() -> None:
    """It compiles for the sizes that come then, and must not take later ones for the same."""
    pair = both(replace(GROUPED, n_layers=8))
    torch.compiler.reset()
    for work in ([(5, 1, True)] * 2, [(5, 1, True)] * 3, [(40, 1, True), (3, 9, True)], [(90, 1, True)] * 5):
        check(pair, work)


@pytest.mark.parametrize(
    "work, served",
    [
        ([(30, 1, True)], False),  # one row: `OneRow`'s
        ([(30, 1, False), (9, 4, False)], False),  # no token comes of it
        ([(0, 120, True)], True),
        ([(0, 121, True)], False),  # prompts like that are quicker on the plain path
        ([(200, 1, True)] * 40, True),
        ([(200, 41, True), (1, 1, True)], False),
        ([(0, 100, True), (10_000, 1, True)], True),
        ([(0, 100, True), (16_000, 1, True)], False),  # each of the 101 would put a thousand blocks together
        ([(65_535, 1, True), (1, 1, True)], True),
        ([(65_536, 1, True), (1, 1, True)], False),  # would be compiled for anew
    ],
)
def test_which_steps_it_serves(work: Work, served: bool) -> None:
    assert both(GROUPED).batch.serves(step_of(work, n_blocks=5000)) == served


def test_a_token_that_is_not_known_yet() -> None:
    plan = step_of([(30, 1, True), (8, 1, True)]).plan
    plan.firsts[1] += 1
    step = Step.of(plan, BlockTables(), 16, LastStep(torch.tensor([5, 6]), plan.seqs))
    assert not both(GROUPED).batch.serves(step)


PROMPTS = [[1, 17, 40], [1, 5, 9, 200, 33, 12, 8, 77, 21, 90], [1], [1, 7] * 70]
PARAMS = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0) for n in (40, 30, 35, 25)]


def answers(model: ModelConfig | Path, params: list[SamplingParams] = PARAMS, **options: object) -> list[Completion]:
    """All in flight at once."""
    config = EngineConfig(device="cpu", dtype="float32", block_size=16, **options)  # type: ignore[arg-type]
    with Engine(model, config, progress=False) as engine:
        compiled = counters["stats"]["unique_graphs"]
        found = engine.generate(PROMPTS, params)
        assert counters["stats"]["unique_graphs"] == compiled, "a request had to wait for the compiler"
        return found


def served(monkeypatch: pytest.MonkeyPatch, kind: Any = ManyRows) -> list[Plan]:
    """The plans that the compiled functions get from now on."""
    plans: list[Plan] = []
    run = kind.run

    def note(self: Any, step: Step, last: LastStep | None) -> Any:
        plans.append(step.plan)
        return run(self, step, last)

    monkeypatch.setattr(kind, "run", note)
    return plans


def assert_equal(plain: list[Completion], compiled: list[Completion]) -> None:
    for one, other in zip(plain, compiled, strict=True):
        assert one.token_ids == other.token_ids
        ours, theirs = (list(done.logprobs) + list(done.prompt_logprobs or []) for done in (one, other))
        assert max(abs(a.logprob - b.logprob) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_same_answers_in_a_batch(monkeypatch: pytest.MonkeyPatch, shared_file: Callable[[str], Path]) -> None:
    model = shared_file("models/stories260K-hf")
    plain, plans = answers(model), served(monkeypatch)
    assert_equal(plain, answers(model, compile=True))
    assert len(plans) >= 20  # 34 when all begin together: neither the longest prompt nor the last one alone


def test_small_budgets_and_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside sequences that decode."""
    plain, plans = answers(GROUPED, max_batch_tokens=20), served(monkeypatch)
    assert_equal(plain, answers(GROUPED, max_batch_tokens=20, compile=True))
    assert any(max(plan.counts) > 1 and min(plan.counts) == 1 for plan in plans)


def test_logprobs_of_a_prompt_come_from_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [replace(one, prompt_logprobs=1) for one in PARAMS]
    plain, plans = answers(GROUPED, params), served(monkeypatch)
    assert_equal(plain, answers(GROUPED, params, compile=True))
    assert all(one.prompt_logprobs for one, prompt in zip(plain, PROMPTS, strict=True) if len(prompt) > 1)
    assert plans and all(max(plan.counts) == 1 for plan in plans)


def test_preempted_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache too small for all at once: some are computed again from their first token."""
    memory = 17 * 2 * GROUPED.n_layers * 16 * GROUPED.kv_dim * 4
    plain, plans = answers(GROUPED), served(monkeypatch)
    assert_equal(plain, answers(GROUPED, compile=True, kv_memory=memory))
    assert any(seq.preemptions for plan in plans for seq in plan.seqs)


def test_steps_that_fail_are_run_on_the_plain_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: what failed is not asked again."""
    plain, calls = answers(GROUPED), []

    def fail(self: ManyRows, step: Step, last: LastStep | None) -> torch.Tensor:
        calls.append(step)
        raise RuntimeError("the compiler is gone")

    monkeypatch.setattr(ManyRows, "run", fail)
    with caplog.at_level(logging.WARNING, "llama"):
        assert_equal(plain, answers(GROUPED, compile=True))
    assert len(calls) == 1 and "operator by operator" in caplog.text and "the compiler is gone" in caplog.text


@pytest.mark.parametrize("missing, kept", [("ManyRows", "row"), ("OneRow", "batch")])
def test_one_is_kept_when_the_other_cannot_be_compiled(
    missing: str, kept: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(f"no {missing}")

    monkeypatch.setattr(llama.cpu.executor, missing, fail)
    plans = {"row": served(monkeypatch, OneRow), "batch": served(monkeypatch)}
    with caplog.at_level(logging.WARNING, "llama"):
        answers(GROUPED, compile=True)
    assert f"no {missing}" in caplog.text
    assert [name for name, found in plans.items() if found] == [kept]
