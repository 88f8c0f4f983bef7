"""Every honoured parameter, on a running engine: each test would fail if the parameter did nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_cases import MESSAGES, PROMPT, error_of, write_model

import api
from api.arguments import TABLE, Action

EOS = 2


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Iterator[api.Client]:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer_file)
    with api.Client(folder, aliases=["small"], block_size=16) as client:
        yield client


class Ask:
    """Requests to one endpoint; what they have in common can be read the same way."""

    def __init__(self, client: api.Client, endpoint: str) -> None:
        self.endpoint = endpoint
        self._create: Any = client.chat.completions.create if endpoint == "chat" else client.completions.create

    def __call__(self, **fields: Any) -> Any:
        base = {"messages": MESSAGES} if self.endpoint == "chat" else {"prompt": PROMPT}
        return self._create(**{**base, "max_tokens": 12, **fields})

    def ids(self, **fields: Any) -> list[int]:
        """The generated token ids of choice 0."""
        return self(**fields).choices[0].token_ids

    def error(self, **fields: Any) -> api.APIError:
        return error_of(self, **fields)


@pytest.fixture(params=["chat", "completions"])
def ask(request: pytest.FixtureRequest, client: api.Client) -> Ask:
    return Ask(client, request.param)


@pytest.fixture
def chat(client: api.Client) -> Ask:
    return Ask(client, "chat")


@pytest.fixture
def complete(client: api.Client) -> Ask:
    return Ask(client, "completions")


def text(choice: Any) -> str:
    return choice.message.content if hasattr(choice, "message") else choice.text


def test_every_honoured_row_has_a_test_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    honoured = {row.name for rows in TABLE.values() for row in rows.values() if row.action is Action.HONOURED}
    assert honoured <= tested


def test_model(ask: Ask) -> None:
    assert {ask(model=name).model for name in ("tiny", "small", None)} == {"tiny"}
    error = ask.error(model="gpt-4")
    assert (error.status_code, error.code, error.param) == (404, "model_not_found", "model")


def test_messages(chat: Ask) -> None:
    other = [{"role": "user", "content": "Who put out the lamp?"}]
    assert chat(temperature=0).usage.prompt_tokens != chat(temperature=0, messages=other).usage.prompt_tokens
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "How far is it "}, {"type": "text", "text": "to the hill?"}],
        }
    ]
    assert chat.ids(temperature=0, messages=parts) == chat.ids(temperature=0)
    answer = chat(temperature=0).choices[0].message
    follow_up = [*MESSAGES, answer, {"role": "user", "content": "And back?"}]
    assert chat(messages=follow_up).usage.prompt_tokens > chat().usage.prompt_tokens


def test_prompt(complete: Ask, client: api.Client) -> None:
    ids = client.tokenize(PROMPT).tokens
    answer = complete.ids(temperature=0)
    for prompt in (ids, [PROMPT], [ids]):
        assert complete.ids(prompt=prompt, temperature=0) == answer
    both = complete(prompt=["the lamp", PROMPT], temperature=0, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.token_ids == answer for choice in both.choices] == [False, False, True, True]
    assert both.usage.prompt_tokens == len(ids) + client.tokenize("the lamp").count
    assert complete(prompt="").usage.prompt_tokens == 1, "BOS alone"


def test_max_tokens(ask: Ask) -> None:
    answer = ask(max_tokens=3, ignore_eos=True)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    answer = ask(max_tokens=1_000_000, ignore_eos=True)
    assert answer.usage.total_tokens == 256, "cut to the context"
    assert answer.choices[0].finish_reason == "length"
    if ask.endpoint == "completions":
        assert ask(max_tokens=None, ignore_eos=True).usage.completion_tokens == 16
    else:
        assert ask(max_tokens=None, ignore_eos=True).usage.total_tokens == 256


def test_max_completion_tokens(chat: Ask) -> None:
    assert chat(max_tokens=None, max_completion_tokens=3, ignore_eos=True).usage.completion_tokens == 3


def test_temperature(ask: Ask) -> None:
    greedy = ask.ids(temperature=0, seed=1)
    assert ask.ids(temperature=0, seed=2) == ask.ids(temperature=5e-5, top_p=0.3) == greedy
    assert ask.ids(temperature=2, seed=1) != greedy


def test_top_p(ask: Ask) -> None:
    assert ask.ids(temperature=2, top_p=0, seed=1) == ask.ids(temperature=0) != ask.ids(temperature=2, seed=1)


def test_n(ask: Ask) -> None:
    answer = ask(n=8, seed=3, temperature=2)
    drawn = [choice.token_ids for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert len({tuple(ids) for ids in drawn}) == 8
    assert [choice.token_ids for choice in ask(n=8, seed=3, temperature=2).choices] == drawn
    assert [choice.token_ids for choice in ask(n=3, seed=3, temperature=2).choices] == drawn[:3]
    assert ask(n=1, seed=3, temperature=2).choices[0].token_ids == drawn[0]
    assert answer.usage.completion_tokens == sum(map(len, drawn))
    assert answer.usage.prompt_tokens == ask().usage.prompt_tokens, "each prompt is counted once"


def test_best_of(complete: Ask) -> None:
    every = complete(n=6, seed=4, temperature=1.5, logprobs=0)
    mean = {tuple(c.token_ids): sum(c.logprobs.token_logprobs) / len(c.token_ids) for c in every.choices}
    ranked = sorted(mean, key=lambda ids: -mean[ids])
    best = complete(n=2, best_of=6, seed=4, temperature=1.5)
    assert [tuple(choice.token_ids) for choice in best.choices] == ranked[:2]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None, "not asked for"
    assert best.usage.completion_tokens == every.usage.completion_tokens, "every candidate is counted"


def test_seed(ask: Ask) -> None:
    one = ask.ids(seed=1, temperature=2)
    assert ask.ids(seed=1, temperature=2) == one
    assert len({tuple(ask.ids(seed=seed, temperature=2)) for seed in (1, 2, -1, (1 << 63) - 1, -(1 << 63))}) == 5
    assert ask.ids(temperature=2) != ask.ids(temperature=2), "a fresh one each time"


def test_stop(ask: Ask) -> None:
    whole = ask(temperature=0)
    full = text(whole.choices[0])
    cut = full[len(full) // 2 : len(full) // 2 + 3]
    for stop in (cut, ["never there", cut]):
        answer = ask(temperature=0, stop=stop)
        assert text(answer.choices[0]) == full[: full.index(cut)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens <= whole.usage.completion_tokens
    assert text(ask(temperature=0, stop=[]).choices[0]) == full


def n_distinct(ask: Ask, **fields: Any) -> int:
    """Different tokens in ten answers drawn from six tokens."""
    bias = {str(70 + i): 30 for i in range(6)}
    return sum(len(set(ask.ids(seed=seed, logit_bias=bias, **fields))) for seed in range(10))


def test_presence_penalty(ask: Ask) -> None:
    assert n_distinct(ask, presence_penalty=-2) < n_distinct(ask) < n_distinct(ask, presence_penalty=2)


def test_frequency_penalty(ask: Ask) -> None:
    assert n_distinct(ask, frequency_penalty=-2) < n_distinct(ask) < n_distinct(ask, frequency_penalty=2)


def test_repetition_penalty(ask: Ask) -> None:
    assert n_distinct(ask, repetition_penalty=0.9) < n_distinct(ask) < n_distinct(ask, repetition_penalty=1.1)


def test_logit_bias(ask: Ask) -> None:
    assert ask.ids(logit_bias={"70": 100}, temperature=2) == [70] * 12
    assert ask.ids(logit_bias={70: 100}) == [70] * 12
    greedy = ask.ids(temperature=0)
    assert greedy[0] not in ask.ids(temperature=0, logit_bias={str(greedy[0]): -100})


def test_logprobs(ask: Ask) -> None:
    with_, without = ask(temperature=0, logprobs=True if ask.endpoint == "chat" else 0), ask(temperature=0)
    assert without.choices[0].logprobs is None
    assert with_.choices[0].token_ids == without.choices[0].token_ids
    if ask.endpoint == "chat":
        entries = with_.choices[0].logprobs.content
        assert [entry.top_logprobs for entry in entries] == [[]] * len(entries)
    else:
        entries = with_.choices[0].logprobs.tokens
        assert with_.choices[0].logprobs.top_logprobs is None
        assert [
            len(top) for top in ask(temperature=2, logprobs=5).choices[0].logprobs.top_logprobs if len(top) < 5
        ] == []
    assert len(entries) == with_.usage.completion_tokens


def test_top_logprobs(chat: Ask) -> None:
    for count in (0, 1, 20):
        content = chat(temperature=2, logprobs=True, top_logprobs=count).choices[0].logprobs.content
        for entry in content:
            assert len(entry.top_logprobs) == count
            values = [top.logprob for top in entry.top_logprobs]
            assert values == sorted(values, reverse=True)
            chosen = [top.logprob for top in entry.top_logprobs if top.token == entry.token]
            assert chosen in ([], [entry.logprob])


def test_echo(complete: Ask, client: api.Client) -> None:
    answer, echoed = complete(temperature=0), complete(temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + answer.choices[0].text
    ids = client.tokenize(PROMPT).tokens
    by_ids = complete(prompt=ids, temperature=0, echo=True)
    assert by_ids.choices[0].text == PROMPT + answer.choices[0].text
    scored = complete(echo=True, max_tokens=0, logprobs=2)
    assert scored.choices[0].text == PROMPT
    assert len(scored.choices[0].logprobs.tokens) == len(ids)
    assert (scored.usage.completion_tokens, scored.choices[0].finish_reason) == (0, "length")


def test_stream(ask: Ask) -> None:
    chunks = list(ask(temperature=0, stream=True))  # at least one: a reader that comes late finds them merged
    assert chunks[-1].choices[0].finish_reason is not None
    joined = "".join(c.choices[0].delta.content or "" if ask.endpoint == "chat" else c.choices[0].text for c in chunks)
    assert joined == text(ask(temperature=0, stream=False).choices[0])


def test_stream_options(ask: Ask) -> None:
    without = list(ask(temperature=0, stream=True))
    with_ = list(ask(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert all("usage" not in chunk for chunk in without)
    assert all(chunk["usage"] is None for chunk in with_[:-1])
    assert with_[-1].choices == []
    assert with_[-1].usage.total_tokens == ask(temperature=0).usage.total_tokens


def test_response_format(chat: Ask) -> None:
    assert chat(response_format={"type": "text"}, strict=True).choices
    assert chat.error(response_format={"type": "json_object"}).param == "response_format"


def test_modalities(chat: Ask) -> None:
    assert chat(modalities=["text"], strict=True).choices
    assert chat.error(modalities=["text", "audio"]).param == "modalities"


def test_suffix(complete: Ask) -> None:
    assert complete(suffix="", strict=True).choices
    assert complete.error(suffix="the end").param == "suffix"


def test_top_k(ask: Ask) -> None:
    greedy = ask.ids(temperature=0)
    assert ask.ids(temperature=2, seed=1, top_k=1) == greedy
    drawn = ask.ids(temperature=2, seed=1)
    assert drawn != greedy
    assert ask.ids(temperature=2, seed=1, top_k=0) == ask.ids(temperature=2, seed=1, top_k=-1) == drawn


def test_min_p(ask: Ask) -> None:
    assert ask.ids(temperature=2, seed=1, min_p=1) == ask.ids(temperature=0) != ask.ids(temperature=2, seed=1)


def test_ignore_eos(ask: Ask) -> None:
    ends = ask(logit_bias={str(EOS): 100})
    assert (ends.choices[0].token_ids, ends.choices[0].finish_reason) == ([EOS], "stop")
    assert text(ends.choices[0]) == ""
    assert ends.usage.completion_tokens == 1
    goes_on = ask(logit_bias={str(EOS): 100}, ignore_eos=True)
    assert (goes_on.choices[0].token_ids, goes_on.choices[0].finish_reason) == ([EOS] * 12, "length")


def test_min_tokens(ask: Ask) -> None:
    answer = ask(logit_bias={str(EOS): 100}, min_tokens=5)
    assert answer.choices[0].token_ids.index(EOS) == 5
    assert ask(logit_bias={"70": 100}, stop_token_ids=[70], min_tokens=5).usage.completion_tokens == 6


def test_stop_token_ids(ask: Ask) -> None:
    answer = ask(logit_bias={"70": 100}, stop_token_ids=[70])
    assert (answer.choices[0].token_ids, answer.choices[0].finish_reason) == ([70], "stop")
    assert text(answer.choices[0]) == "", "its text is not shown"
    assert ask(logit_bias={"70": 100}, stop_token_ids=[70], ignore_eos=True).choices[0].finish_reason == "stop"


def test_return_token_ids(ask: Ask) -> None:
    silent, told = ask(temperature=0), ask(temperature=0, return_token_ids=True)
    assert "token_ids" not in silent.to_json()
    choice = told.to_dict()["choices"][0]
    assert choice["token_ids"] == silent.choices[0].token_ids == told.choices[0].token_ids
    place = told.to_dict() if ask.endpoint == "chat" else choice
    assert place["prompt_token_ids"] == silent.choices[0].prompt_token_ids
    assert len(place["prompt_token_ids"]) == told.usage.prompt_tokens


def test_explain(ask: Ask) -> None:
    assert "explain" not in ask()
    answer = ask(explain=True, temperature=2, n=2)
    told = answer["explain"]
    assert ask(seed=told.seed, temperature=2).choices[0].token_ids == answer.choices[0].token_ids
    assert sum(step.tokens for step in told.steps) >= answer.usage.completion_tokens
    assert all(1 <= step.tokens <= step.batch_tokens and step.batch_sequences >= 1 for step in told.steps)
    assert 0 < told.prefill_ms <= told.first_token_ms <= told.total_ms
    assert told.preemptions == 0
    last = list(ask(explain=True, stream=True, seed=5, stream_options={"include_usage": True}))[-1]
    assert (last.choices, last.explain.seed) == ([], 5)
    assert "explain" in list(ask(explain=True, stream=True))[-1]


def test_strict(ask: Ask) -> None:
    assert ask(user="me", colour=1).ignored_parameters == ["colour", "user"]
    assert ask.error(user="me", strict=True).code == "unknown_parameter"
    assert "ignored_parameters" not in ask(user=None, strict=True)


def test_add_special_tokens(complete: Ask) -> None:
    with_, without = complete(), complete(add_special_tokens=False)
    assert with_.usage.prompt_tokens == without.usage.prompt_tokens + 1
    assert with_.choices[0].prompt_token_ids == [1, *without.choices[0].prompt_token_ids]
    assert complete.error(prompt="", add_special_tokens=False).param == "prompt"


def test_parse_special(complete: Ask) -> None:
    spelled = f"<s>{PROMPT}</s>"
    parsed = complete(prompt=spelled).choices[0].prompt_token_ids
    assert parsed == [*complete().choices[0].prompt_token_ids, EOS], "one BOS, not two"
    assert not {1, EOS} & set(complete(prompt=spelled, parse_special=False).choices[0].prompt_token_ids[1:])
