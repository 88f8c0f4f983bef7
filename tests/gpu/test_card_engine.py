"""The engine on a card: exact tokens, batch invariance, graphs against eager steps, memory given back.

Needs torch, triton, numpy, safetensors, sentencepiece, tqdm and pytest alone:
`PYTHONPATH=. python -m pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama.config import EngineConfig, ModelConfig
from llama.engine import Completion, Engine
from llama.request import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Real layer shapes, few layers: every kernel sees the sizes it was made for.
SMALL_7B = dataclasses.replace(ModelConfig.named("7B"), n_layers=2, max_seq_len=1024)
SMALL_70B = dataclasses.replace(ModelConfig.named("70B"), n_layers=1, max_seq_len=1024)


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[tuple[list[int], list[float]]]:
    def bits(done: Completion) -> tuple[list[int], list[float]]:
        return done.token_ids, [report.logprob for report in done.logprobs]

    return [bits(done) for done in engine.generate(prompts, params)]


def some_prompts(n: int, vocab_size: int, longest: int = 200) -> list[list[int]]:
    dice = random.Random(7)
    return [[1] + [dice.randrange(3, vocab_size) for _ in range(dice.randint(2, longest))] for _ in range(n)]


@pytest.mark.parametrize("name", ["babyllama361", "stories260K"])
def test_greedy_vectors(name: str, shared_file: Callable[[str], Path]) -> None:
    vectors = json.loads(shared_file(f"vectors/{name}_greedy.json").read_text())["greedy"]
    config = EngineConfig(device="cuda", dtype="float32", kv_memory=1 << 28)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=len(v["greedy_ids"])) for v in vectors]
    with Engine(shared_file(f"models/{name}-hf"), config, progress=False) as engine:
        done = engine.generate([vector["prompt_ids"] for vector in vectors], params)
    for completion, vector in zip(done, vectors, strict=True):
        assert completion.token_ids == vector["greedy_ids"]


@pytest.mark.parametrize("config", [SMALL_7B, SMALL_70B], ids=["7B", "70B"])
@pytest.mark.parametrize("max_batch_tokens", [64, 2048])
def test_the_same_bits_alone_and_in_a_batch(config: ModelConfig, max_batch_tokens: int) -> None:
    prompts = some_prompts(30, config.vocab_size)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=24, logprobs=0)
    options = EngineConfig(device="cuda", kv_memory=4 << 30, max_batch_tokens=max_batch_tokens)
    with Engine(config, options, progress=False) as engine:
        alone = [answers(engine, [prompt], params)[0] for prompt in prompts[:6]]
        together = answers(engine, prompts, params)
        again = answers(engine, prompts, params)  # from the prefix cache
        assert engine.stats().prefix_hits > 0
    assert together[:6] == alone
    assert again == together


@pytest.mark.parametrize("max_batch_tokens", [96, 2048])
def test_graphs_give_the_bits_of_eager_steps(max_batch_tokens: int) -> None:
    """The smaller budget cuts the prompts, and their pieces go by graphs as well."""
    prompts = some_prompts(5, SMALL_7B.vocab_size)
    params = SamplingParams(temperature=0.7, seed=3, ignore_eos=True, max_tokens=24, logprobs=0)
    found = []
    for cuda_graphs in (True, False):
        options = EngineConfig(
            device="cuda", kv_memory=4 << 30, cuda_graphs=cuda_graphs, max_batch_tokens=max_batch_tokens
        )
        with Engine(SMALL_7B, options, progress=False) as engine:
            found.append(answers(engine, prompts, params))
    assert found[0] == found[1]


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_one_step_ahead_gives_the_bits_of_steps_in_turn(cuda_graphs: bool) -> None:
    """Prompts cut into chunks among decodes; 128 stop ids, noticed a step late when ahead."""
    prompts = some_prompts(40, SMALL_7B.vocab_size)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, logprobs=1, stop_token_ids=list(range(3, 131)))
    found = []
    for ahead in (True, False):
        options = EngineConfig(
            device="cuda", kv_memory=4 << 30, max_batch_tokens=96, cuda_graphs=cuda_graphs, async_scheduling=ahead
        )
        with Engine(SMALL_7B, options, progress=False) as engine:
            found.append(answers(engine, prompts, params))
    assert found[0] == found[1]


def test_close_gives_the_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        with Engine(SMALL_7B, EngineConfig(device="cuda", kv_memory=4 << 30), progress=False) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
            assert torch.cuda.memory_reserved() > before + (4 << 30)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= before + (64 << 20)
