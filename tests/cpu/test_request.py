"""Bad values in a request: a typed error that names the field, before anything is queued."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.config import Limits
from llama.errors import ContextLengthExceeded, InvalidRequest
from llama.request import RANGES, Request, SamplingParams, check_request

VOCAB, CONTEXT = 100, 32
NAN, INF = math.nan, math.inf

BAD_VALUES: dict[str, list[Any]] = {
    **{name: [low - 0.1, high + 0.1, NAN, INF, -INF, True, "0.5", None] for name, (low, high) in RANGES.items()},
    "temperature": [-0.1, 2.1, NAN, INF, -INF, 1e400, True, "1", None, [1]],
    "top_k": [-2, 1.0, True, "3", NAN, None, 2**31 + 1],
    "repetition_penalty": [0, -1.0, 10.5, NAN, INF, True, "1", None],
    "max_tokens": [-1, 1.0, True, "3", NAN, 2**31 + 1],
    "min_tokens": [-1, 1.0, True, "3", None, 2**31 + 1],
    "seed": [2**63, -(2**63) - 1, 2**64, 1.0, True, "1"],
    "logprobs": [-1, True, 1.0, "5"],
    "prompt_logprobs": [-1, True, 1.0, "5"],
    "stop": [[""], "", [b"a"], [None], [["a"]], 7, {"a": 1}, None],
    "stop_token_ids": [7, "ab", None, {1: 2}],
    "logit_bias": [{1: 101}, {1: -100.5}, {1: NAN}, {1: True}, {1: "2"}, [1], 7, None],
    "ignore_eos": [1, "yes", None],
}
# More than the default `Limits` allow: refused by the engine that gets the request.
TOO_MUCH: dict[str, list[Any]] = {
    "logprobs": [21],
    "prompt_logprobs": [21],
    "stop": [["a"] * 5, ["x" * 257]],
    "stop_token_ids": [list(range(129))],
    "logit_bias": [dict.fromkeys(range(1025), 0)],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD_VALUES.items() for v in values], ids=repr)
def test_a_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.limit
    assert str(caught.value).startswith(f"{field}=")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("field, value", [(f, v) for f, values in TOO_MUCH.items() for v in values], ids=repr)
def test_too_much_of_something_names_its_field(field: str, value: Any) -> None:
    """By an engine of these limits; one of wider limits takes it."""
    request = Request([[1]], SamplingParams(max_tokens=1, **{field: value}))
    with pytest.raises(InvalidRequest) as caught:
        check_request(request, 2000, CONTEXT, 1000, Limits())
    assert caught.value.field == field
    assert caught.value.limit
    assert str(caught.value).startswith(f"{field}=")
    assert len(str(caught.value)) < 300
    wide = Limits(logprobs=21, stop=5, stop_chars=257, stop_token_ids=129, logit_bias=1025)
    check_request(request, 2000, CONTEXT, 1000, wide)


@pytest.mark.parametrize("fields", [{"stop": "aa"}, {"stop": ["a", "b"]}, {"logprobs": 1}, {"logit_bias": {3: 1.0}}])
def test_narrow_limits_are_obeyed(fields: dict[str, Any]) -> None:
    limits = Limits(stop=1, stop_chars=1, logprobs=0, logit_bias=0)
    with pytest.raises(InvalidRequest) as caught:
        check_request(Request([[1]], SamplingParams(max_tokens=1, **fields)), VOCAB, CONTEXT, 1000, limits)
    assert caught.value.field in fields


def test_the_borders_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=0, min_p=0, top_k=0, presence_penalty=-2, frequency_penalty=-2)
    SamplingParams(temperature=2, top_p=1, min_p=1, top_k=2**31, presence_penalty=2, frequency_penalty=2)
    SamplingParams(repetition_penalty=10, max_tokens=0, logprobs=20, prompt_logprobs=0, seed=2**63 - 1)
    SamplingParams(repetition_penalty=1e-3, max_tokens=3, min_tokens=3, seed=-(2**63), logit_bias={0: -100, 1: 100.0})
    most = {"stop_token_ids": range(128), "logit_bias": dict.fromkeys(range(1024), 1), "logprobs": 20}
    params = SamplingParams(stop=["a", "b", "c", "d" * 256], max_tokens=1, **most)  # type: ignore[arg-type]
    check_request(Request([[1]], params), 2000, CONTEXT, 1000, Limits())


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens=3") as caught:
        SamplingParams(max_tokens=3, min_tokens=4)
    assert caught.value.field == "min_tokens"


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("temperature, greedy", [(0, True), (1e-300, True), (9.9e-5, True), (1e-4, False), (1, False)])
def test_a_tiny_temperature_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_params_cannot_be_changed_through_what_was_passed_in() -> None:
    """The request runs in another thread; what was checked is what is used."""
    bias, ids, stop = {1: 1.0}, [3], ["a"]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids, stop=stop)
    bias[1], ids[0], stop[0] = NAN, -1, ""
    assert (params.logit_bias[1], params.stop_token_ids[0], params.stop[0]) == (1.0, 3, "a")


def check(request: Request, max_cached: int = 1000) -> None:
    check_request(request, VOCAB, CONTEXT, max_cached, Limits())


def refused(request: Request, field: str, max_cached: int = 1000) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(request, max_cached)
    assert caught.value.field == field
    return caught.value


@pytest.mark.parametrize("n", [0, -1, 9, 2**31, True, 1.0, "3", None, 1e400])
def test_n(n: Any) -> None:
    refused(Request([[1]], SamplingParams(max_tokens=1), n=n), "n")
    check(Request([[1]], SamplingParams(max_tokens=1), n=8))


@pytest.mark.parametrize("field, value", [("params", None), ("params", {}), ("salt", 5), ("salt", None), ("chat", 1)])
def test_a_field_of_the_wrong_type(field: str, value: Any) -> None:
    """It would otherwise be found in the engine thread, where it would end the engine for everybody."""
    fields = {"params": SamplingParams(max_tokens=1)} | {field: value}
    refused(Request([[1]], **fields), field)


@pytest.mark.parametrize("prompts", [[1, 2], [None], ["text"], [b"ids"], [{1: 2}], [{1, 2}]])
def test_prompts_that_are_no_lists_of_ids(prompts: Any) -> None:
    refused(Request(prompts, SamplingParams(max_tokens=1)), "prompt")


def test_prompts_times_n() -> None:
    check(Request([[1]] * 64, SamplingParams(max_tokens=1)))
    assert refused(Request([[1]] * 65, SamplingParams(max_tokens=1)), "n").value == 65
    check(Request([[1]] * 8, SamplingParams(max_tokens=1), n=8))
    assert refused(Request([[1]] * 9, SamplingParams(max_tokens=1), n=8), "n").value == 72


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts(prompts: list[list[int]]) -> None:
    refused(Request(prompts, SamplingParams(max_tokens=1)), "prompt")


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**31, 2**63, 2**70, True, 1.0, "1", None, NAN])
def test_token_ids_out_of_range(token_id: Any) -> None:
    assert refused(Request([[1, token_id]], SamplingParams(max_tokens=1)), "prompt").value is token_id
    for field, value in (("stop_token_ids", [token_id]), ("logit_bias", {token_id: 1.0})):
        error = refused(Request([[1]], SamplingParams(max_tokens=1, **{field: value})), field)
        assert error.value is token_id
        assert str(VOCAB - 1) in str(error)


def test_the_context_border() -> None:
    check(Request([[1] * (CONTEXT - 1)], SamplingParams()))
    error = refused(Request([[1] * CONTEXT], SamplingParams(max_tokens=1)), "prompt")
    assert isinstance(error, ContextLengthExceeded)
    assert (error.value, error.limit_tokens) == (CONTEXT, CONTEXT - 1)
    assert f"{CONTEXT} tokens" in str(error)
    assert f"holds {CONTEXT - 1}" in str(error)


def test_only_scoring_a_prompt_may_fill_the_context() -> None:
    check(Request([[1] * CONTEXT], SamplingParams(max_tokens=0)))
    refused(Request([[1] * (CONTEXT + 1)], SamplingParams(max_tokens=0)), "prompt")


@pytest.mark.parametrize("max_tokens, needed", [(0, 10), (5, 15), (22, 32), (100, 32), (None, 32)])
def test_what_can_never_fit_the_pool_is_refused(max_tokens: int | None, needed: int) -> None:
    request = Request([[1] * 10], SamplingParams(max_tokens=max_tokens))
    check(request, max_cached=needed)
    error = refused(request, "prompt", max_cached=needed - 1)
    assert isinstance(error, ContextLengthExceeded)
    assert (error.value, error.limit_tokens) == (needed, needed - 1)
    assert "KV cache" in str(error)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.integers(), st.floats(), max_size=3), st.binary(max_size=3),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(BAD_VALUES)), anything, max_size=4))
def test_any_values_are_taken_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**fields)
        check(Request([[1, 2, 3]], params))
    except InvalidRequest as error:
        assert error.field in {*fields, "prompt"}
        return
    for name in RANGES:
        assert math.isfinite(getattr(params, name))
