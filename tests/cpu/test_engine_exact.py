"""Trained models against stored answers: however a request is batched, chunked, cached or sent back, it is the same.

With batch_invariant=True "the same" means equal bits of every logprob. The stored answers come from another program.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llama import Completion, Engine, EngineConfig, SamplingParams
from llama.loop import EngineLoop

SharedFile = Callable[[str], Path]
MODELS = ("stories260K", "babyllama361")
MODES = pytest.mark.parametrize("exact", [False, True], ids=["fast", "batch-invariant"])
GREEDY = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, logprobs=3)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Closing an engine collects garbage; what the imports brought along need not be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Case:
    """One model: its folder, its stored answers, and what it answers one prompt at a time.

    ahead: whether steps are launched before the one before is read; `alone` is without.
    """

    folder: Path
    vectors: dict[str, Any]
    alone: dict[bool, list[Completion]]
    ahead: bool = False

    @property
    def prompts(self) -> list[list[int]]:
        return [entry["prompt_ids"] for entry in self.vectors["greedy"]]

    def engine(self, exact: bool, **options: Any) -> Engine:
        options = {"kv_memory": 8 << 20, **options}
        config = EngineConfig(device="cpu", batch_invariant=exact, async_scheduling=self.ahead, **options)
        return Engine(self.folder, config, progress=False)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, shared_file: SharedFile) -> Case:
    folder = shared_file(f"models/{request.param}-hf")
    case = Case(folder, json.loads(shared_file(f"vectors/{request.param}_greedy.json").read_text()), {})
    for exact in (False, True):
        with case.engine(exact, block_size=64, prefix_cache=False) as engine:
            case.alone[exact] = [engine.generate([prompt], GREEDY)[0] for prompt in case.prompts]
    return case


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def case(request: pytest.FixtureRequest, model: Case) -> Case:
    return replace(model, ahead=request.param)


def check(case: Case, exact: bool, done: list[Completion]) -> None:
    """Tokens as stored, logprobs as stored within 1e-4; the very bits of the run alone in batch-invariant mode."""
    assert len(done) == len(case.vectors["greedy"])
    for answer, entry, alone in zip(done, case.vectors["greedy"], case.alone[exact], strict=True):
        assert answer.token_ids == entry["greedy_ids"]
        logprobs = [token.logprob for token in answer.logprobs]
        assert logprobs[:20] == pytest.approx(entry["logprobs_first20"], abs=1e-4)
        assert math.fsum(logprobs) == pytest.approx(entry["sum_logprob"], abs=2e-3)
        assert answer.text == alone.text
        if exact:
            assert answer.logprobs == alone.logprobs


@MODES
def test_one_at_a_time(case: Case, exact: bool) -> None:
    with case.engine(exact, block_size=64, prefix_cache=False) as engine:
        done = [engine.generate([prompt], GREEDY)[0] for prompt in case.prompts]
    check(case, exact, done)
    texts = [answer.text for answer in done]
    assert texts[0] == case.vectors["greedy"][0]["text"]
    if "llama2c_expected_200" in case.vectors:
        assert texts[0] == case.vectors["llama2c_expected_200"]


@MODES
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16},
        {"block_size": 16, "max_batch_tokens": 1},
        {"block_size": 64, "max_batch_tokens": 7},
        {"block_size": 64, "max_batch_tokens": 64, "prefix_cache": False, "max_batch_seqs": 4},
    ],
    ids=str,
)
def test_all_together(case: Case, exact: bool, options: dict[str, Any]) -> None:
    with case.engine(exact, **options) as engine:
        check(case, exact, engine.generate(case.prompts, GREEDY))


@MODES
def test_the_second_run_hits_the_prefix_cache(case: Case, exact: bool) -> None:
    block_size = 4  # most of the prompts are shorter than 16 tokens
    with case.engine(exact, block_size=block_size) as engine:
        check(case, exact, engine.generate(case.prompts, GREEDY))
        before = engine.stats().prefix_hits
        check(case, exact, engine.generate(case.prompts, GREEDY))
        expected = sum((len(prompt) - 1) // block_size * block_size for prompt in case.prompts)
        assert engine.stats().prefix_hits - before == expected > 0


@MODES
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_conversation_that_goes_on_finds_its_own_tokens(case: Case, exact: bool, block_size: int) -> None:
    """The first answer's tokens become part of the second prompt; what was computed while decoding is read back."""
    rest = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True, logprobs=3)
    with case.engine(exact, block_size=block_size) as engine:
        engine.generate(case.prompts, replace(GREEDY, max_tokens=120))
        before = engine.stats().prefix_hits
        longer = [answer.prompt_ids + answer.token_ids[:120] for answer in case.alone[exact]]
        done = engine.generate(longer, rest)
        assert engine.stats().prefix_hits - before >= len(longer) * 64
        for answer, alone in zip(done, case.alone[exact], strict=True):
            assert answer.token_ids == alone.token_ids[120:]
            if exact:
                assert answer.logprobs == alone.logprobs[120:]


@MODES
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preemption_every_third_step(case: Case, exact: bool, prefix_cache: bool) -> None:
    def on_step(loop: EngineLoop) -> None:
        loop.scheduler.check()
        if loop.n_steps % 3 == 2:
            loop.scheduler.preempt_youngest()

    with case.engine(exact, block_size=16, prefix_cache=prefix_cache) as engine:
        engine._loop.on_step = on_step
        check(case, exact, engine.generate(case.prompts, GREEDY))
        assert engine.stats().preemptions > 50


@MODES
def test_a_pool_too_small_for_all(case: Case, exact: bool) -> None:
    """Room for one sequence of full length and a little more: the scheduler itself sends sequences back."""
    with case.engine(exact, block_size=16) as probe:
        block, longest = probe.memory_plan.kv_block, probe.max_seq_len
    with case.engine(exact, block_size=16, kv_memory=block * (longest // 16 + 4)) as engine:
        engine._loop.on_step = lambda loop: loop.scheduler.check()
        check(case, exact, engine.generate(case.prompts, GREEDY))
        assert engine.stats().preemptions > 0


# --- scoring given text -----------------------------------------------------------------------------------------


@MODES
def test_teacher_forced_log_likelihood(case: Case, exact: bool) -> None:
    """Whole stories scored as prompts, whole and in chunks of 7 and 64, several at once."""
    entries = case.vectors["teacher_forced_tinystories_sample"]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    stories = [entry["ids"] for entry in entries]
    scored = []
    for budget in (7, 64, 2048):
        with case.engine(exact, block_size=16, max_batch_tokens=budget) as engine:
            scored.append(engine.generate(stories, params))
    for done in scored:
        for answer, entry in zip(done, entries, strict=True):
            assert answer.token_ids == []
            assert answer.prompt_logprobs is not None
            assert [token.token_id for token in answer.prompt_logprobs] == entry["ids"][1:]
            nll = -math.fsum(token.logprob for token in answer.prompt_logprobs) / entry["n"]
            assert nll == pytest.approx(entry["nll_per_tok"], abs=1e-4)
    if exact:
        assert scored[0] == scored[1] == scored[2]


@MODES
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_position(shared_file: SharedFile, name: str, exact: bool) -> None:
    """The 20 best of each position against float64 logits."""
    with safe_open(shared_file(f"vectors/{name}_logits.safetensors"), "pt") as file:
        ids = file.get_tensor("ids").flatten().tolist()
        logits = file.get_tensor("logits_fp64").double().reshape(len(ids), -1)
    expected = logits - logits.logsumexp(-1, keepdim=True)
    config = EngineConfig(device="cpu", batch_invariant=exact, block_size=16, max_batch_tokens=10, kv_memory=8 << 20)
    with Engine(shared_file(f"models/{name}-hf"), config, progress=False) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=20, logprobs=20)
        answer = engine.generate([ids], params)[0]
    assert answer.prompt_logprobs is not None
    reports = [*answer.prompt_logprobs, answer.logprobs[0]]
    assert len(reports) == len(ids)
    for row, report in zip(expected, reports, strict=True):
        best = torch.tensor([token for token, _ in report.top])
        values = torch.tensor([value for _, value in report.top], dtype=torch.float64)
        assert (row[best] - values).abs().max() < 1e-4
        assert (row.topk(20).values - values).abs().max() < 1e-4
        assert abs(row[report.token_id].item() - report.logprob) < 1e-4


def test_sampled_answers_too(case: Case) -> None:
    """A seeded draw has the same tokens and the same bits in any company."""
    params = [
        SamplingParams(max_tokens=60, temperature=1.0, top_p=0.9, seed=i, ignore_eos=True, logprobs=2)
        for i in range(len(case.prompts))
    ]
    with case.engine(True, block_size=64, prefix_cache=False) as engine:
        alone = [engine.generate([p], one)[0] for p, one in zip(case.prompts, params, strict=True)]
    with case.engine(True, block_size=16, max_batch_tokens=7) as engine:
        together = engine.generate(case.prompts * 2, params * 2)
    assert together == alone * 2
    assert len({tuple(answer.token_ids) for answer in alone}) == len(alone)
