"""Against transformers on a trained model: echo scores, penalties and biases are the formulas of the contract."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import api

STORY = "Once upon a time, there was a little girl named Lily. She loved to play in the park."


@pytest.fixture(scope="module")
def folder(shared_file: Callable[[str], Path]) -> Path:
    return shared_file("models/babyllama361-hf")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[api.Client]:
    with api.Client(folder, block_size=16) as client:
        yield client


@pytest.fixture(scope="module")
def logits_of(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    """Logits [position, vocabulary] of token ids, by transformers in fp32."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float()

    return logits


def test_echo_and_logprobs_are_teacher_forced_ones(
    client: api.Client, logits_of: Callable[[list[int]], torch.Tensor]
) -> None:
    tokens = client.tokenize(STORY)
    for max_tokens in (0, 20):
        answer = client.completions.create(
            prompt=STORY, max_tokens=max_tokens, echo=True, logprobs=5, temperature=0, ignore_eos=True
        )
        choice = answer.choices[0]
        ids = tokens.tokens + choice.token_ids
        expected = torch.log_softmax(logits_of(ids), -1)
        values = choice.logprobs.token_logprobs
        assert len(values) == len(ids) == answer.usage.total_tokens
        for i, value in enumerate(values[1:], 1):
            assert value == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-4)
        names = client.tokenize(STORY, return_token_strs=True).token_strs
        assert choice.logprobs.tokens[: len(names or [])] == names
        for i, top in enumerate(choice.logprobs.top_logprobs[1:], 1):
            best = torch.topk(expected[i - 1], 5).values.tolist()
            assert sorted(top.values(), reverse=True)[:5] == pytest.approx(best, abs=1e-4)
        assert choice.text.startswith(STORY)


def test_chat_logprobs_are_raw_ones(client: api.Client, logits_of: Callable[[list[int]], torch.Tensor]) -> None:
    """Of the logits before bias, penalties and temperature."""
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Tell me."}],
        max_tokens=12,
        logprobs=True,
        top_logprobs=20,
        seed=1,
        temperature=1.7,
        presence_penalty=1,
        logit_bias={"260": 3},
    )
    choice = answer.choices[0]
    n_prompt = len(choice.prompt_token_ids)
    expected = torch.log_softmax(logits_of(choice.prompt_token_ids + choice.token_ids), -1)
    for i, entry in enumerate(choice.logprobs.content):
        row = expected[n_prompt + i - 1]
        assert entry.logprob == pytest.approx(float(row[choice.token_ids[i]]), abs=1e-4)
        best = torch.topk(row, 20).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)


PENALTIES: list[dict[str, Any]] = [
    {"presence_penalty": 2},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 1.3},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.9, "frequency_penalty": 0.8, "repetition_penalty": 1.2, "logit_bias": {"300": 4, "310": -9}},
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=range(len(PENALTIES)))
def test_penalties_are_the_formula(
    client: api.Client, logits_of: Callable[[list[int]], torch.Tensor], penalties: dict[str, Any]
) -> None:
    """Greedy under a penalty takes, at every place, the best of the logits changed by hand."""
    answer = client.completions.create(prompt=STORY, max_tokens=60, temperature=0, ignore_eos=True, **penalties)
    plain = client.completions.create(prompt=STORY, max_tokens=60, temperature=0, ignore_eos=True)
    choice = answer.choices[0]
    assert choice.token_ids != plain.choices[0].token_ids
    prompt, generated = choice.prompt_token_ids, choice.token_ids
    raw = logits_of(prompt + generated)
    for i, chosen in enumerate(generated):
        logits = raw[len(prompt) + i - 1].clone()
        for token, bias in penalties.get("logit_bias", {}).items():
            logits[int(token)] += bias
        repetition = penalties.get("repetition_penalty", 1.0)
        for token in set(prompt + generated[:i]):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token, count in Counter(generated[:i]).items():
            logits[token] -= penalties.get("presence_penalty", 0) + penalties.get("frequency_penalty", 0) * count
        assert float(logits.max() - logits[chosen]) < 1e-3, i


def test_seeded_draws_follow_the_distribution(
    client: api.Client, logits_of: Callable[[list[int]], torch.Tensor]
) -> None:
    """400 first tokens of different seeds, against the probabilities at temperature 1.5: chi-squared."""
    ids = client.tokenize("Once upon").tokens
    probabilities = torch.softmax(logits_of(ids)[-1] / 1.5, -1)
    counts: Counter[int] = Counter()
    for seed in range(50):
        answer = client.completions.create(prompt=ids, n=8, seed=seed, temperature=1.5, max_tokens=1)
        counts.update(choice.token_ids[0] for choice in answer.choices)
    likely = [i for i in range(len(probabilities)) if probabilities[i] * 400 >= 5]
    rest = 400 * (1 - float(probabilities[likely].sum()))
    cells = [(counts[i], 400 * float(probabilities[i])) for i in likely]
    cells.append((400 - sum(n for n, _ in cells), rest))
    chi = sum((n - e) ** 2 / e for n, e in cells if e > 1)
    freedom = len(cells) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 4
