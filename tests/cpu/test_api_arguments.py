"""The table of arguments: complete, every row does what it says, and no request whatever gets past it unchecked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import api
from api.arguments import ENDPOINTS, EXTENSIONS, OPENAI, TABLE, Action, Arguments, Row
from api.checks import Context, Endpoint, Integer, Number
from api.request import read
from llama.config import Limits
from llama.request import RANGES

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from parameter_table import markdown_table

VOCAB = 400
HUGE = 10**5000  # too long to be printed


def ask(endpoint: Endpoint, strictly: bool = False, **fields: Any) -> Arguments:
    base = {"messages": [{"role": "user", "content": "Hi"}]} if endpoint == "chat" else {"prompt": "Hi"}
    return read(endpoint, {**base, **fields}, vocab_size=VOCAB, limits=Limits(), strict=strictly)


def refusal(endpoint: Endpoint, strictly: bool = False, **fields: Any) -> api.BadRequestError:
    with pytest.raises(api.BadRequestError) as caught:
        ask(endpoint, strictly, **fields)
    assert caught.value.status_code == 400
    assert caught.value.type == "invalid_request_error"
    json.dumps(caught.value.to_dict())
    return caught.value


def test_openai_rows_are_the_specification(shared_file: Callable[[str], Path]) -> None:
    yaml = pytest.importorskip("yaml")
    text = shared_file("openai/openapi.yaml").read_text(encoding="utf-8")
    schemas = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]["schemas"]

    def properties(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return properties(schemas[schema["$ref"].rpartition("/")[2]])
        names = set(schema.get("properties", {}))
        for part in schema.get("allOf", []):
            names |= properties(part)
        return names

    extensions = {row.name for row in EXTENSIONS}
    for endpoint, name in (("chat", "CreateChatCompletionRequest"), ("completions", "CreateCompletionRequest")):
        assert TABLE[endpoint].keys() - extensions == properties(schemas[name])  # type: ignore[index]


def test_size_of_the_table() -> None:
    """As many parameters as OpenAI documents (2026-08), and ours."""
    extensions = {row.name for row in EXTENSIONS}
    assert len(TABLE["chat"].keys() - extensions) == 37
    assert len(TABLE["completions"].keys() - extensions) == 18
    assert len(OPENAI) + len(EXTENSIONS) == len({row.name for row in (*OPENAI, *EXTENSIONS)})


def test_markdown_has_every_row() -> None:
    lines = markdown_table((*OPENAI, *EXTENSIONS)).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [row.name for row in (*OPENAI, *EXTENSIONS)]
    assert {line.count("|") for line in lines} == {6}


# Honoured: what is read, and what is refused. Where a value lands in the engine is tested in test_api_effects.py.

NOT_A_NUMBER = ["3", [], {}, True, math.nan, math.inf, -math.inf]
NOT_AN_INTEGER = ["3", [1], True, 1.0, math.nan, HUGE, -HUGE]
NOT_A_BOOLEAN = [0, 1, "true", [True], 1.0]

BAD: dict[str, list[Any]] = {
    **{name: [*NOT_A_NUMBER, low - 0.1, high + 0.1] for name, (low, high) in RANGES.items()},
    "max_tokens": [*NOT_AN_INTEGER, 0, -1, 1 << 32],
    "temperature": [*NOT_A_NUMBER, -0.1, 2.1, HUGE, 1e400],
    "n": [*NOT_AN_INTEGER, 0, -1, 9, 1 << 31],
    "seed": [*NOT_AN_INTEGER, 1 << 63, -(1 << 63) - 1, 1 << 64],
    "stop": [1, {}, True, "", ["a", ""], ["a"] * 5, [1], "x" * 257, ["\ud800"], [None]],
    "logit_bias": [
        *([], "5", 5, True),
        *({"-1": 1}, {str(VOCAB): 1}, {VOCAB: 1}, {"x": 1}, {"1.0": 1}, {"01": 1}, {" 1": 1}, {True: 1}, {"٣": 1}),
        *({"9" * 5000: 1}, {HUGE: 1}, {1 << 63: 1}, {"5": 101}, {"5": math.nan}, {"5": "1"}, {"5": True}, {"5": None}),
        *({"5": 1, 5: 1}, {str(i): 1 for i in range(1025)}),
    ],
    "stream": NOT_A_BOOLEAN,
    "top_k": [*NOT_AN_INTEGER, -2, 1 << 32],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1, 10.1],
    "ignore_eos": NOT_A_BOOLEAN,
    "min_tokens": [*NOT_AN_INTEGER, -1, 1 << 32],
    "stop_token_ids": ["5", 5, {}, [VOCAB], [-1], [True], [1.0], ["5"], [1 << 63], [1] * 129],
    "return_token_ids": NOT_A_BOOLEAN,
    "explain": NOT_A_BOOLEAN,
    "strict": NOT_A_BOOLEAN,
    "model": [5, True, ["demo"]],
}
BAD_CHAT: dict[str, list[Any]] = {
    "messages": [[], "Hi", {}, 5, [5], ["Hi"], [None], [{"content": "x"}], [{"role": 5, "content": "x"}]],
    "max_completion_tokens": [*NOT_AN_INTEGER, 0, -1],
    "logprobs": [*NOT_A_BOOLEAN, 5],
    "top_logprobs": [*NOT_AN_INTEGER, -1, 21, 5],  # 5: without logprobs
    "response_format": ["text", 5, {"type": "xml"}, {"type": "json_object"}, {"type": "json_schema"}],
    "modalities": [["audio"], ["text", "audio"], "audio", 5],
    "stream_options": [{"include_usage": True}, {}],  # without stream
    "tool_choice": ["required", "any", {"type": "function", "function": {"name": "f"}}, 5],
    "function_call": [{"name": "f"}, "f", 5],
}
BAD_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [
        *(5, True, {}, [], [[]], [["a"]], ["a", 5], [5, "a"], [5, [6]], [[5], 6], [[5], "a"]),
        *([True], [1.0], [VOCAB], [-1], [1 << 63], [HUGE], [None], [[1], [VOCAB]], ["a"] * 65, [[1]] * 65),
    ],
    "logprobs": [*NOT_AN_INTEGER, -1, 6],
    "echo": NOT_A_BOOLEAN,
    "best_of": [*NOT_AN_INTEGER, 0, -1, 9],
    "suffix": ["x", 5],
    "add_special_tokens": NOT_A_BOOLEAN,
    "parse_special": NOT_A_BOOLEAN,
}


def cases() -> list[Any]:
    made = [("chat", n, v) for n, values in (BAD | BAD_CHAT).items() for v in values]
    made += [("completions", n, v) for n, values in (BAD | BAD_COMPLETIONS).items() for v in values]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{i}") for i, case in enumerate(made)]


@pytest.mark.parametrize(("endpoint", "name", "value"), cases())
def test_bad_values_are_refused_by_name(endpoint: Endpoint, name: str, value: Any) -> None:
    if (endpoint, name, value) == ("completions", "max_tokens", 0):
        assert ask(endpoint, max_tokens=0, echo=True).params.max_tokens == 0
    assert (refusal(endpoint, **{name: value}).param or "").startswith(name)


RANGED = [(e, row) for e in ENDPOINTS for row in TABLE[e].values() if isinstance(row.kind, Integer | Number)]


@pytest.mark.parametrize(("endpoint", "row"), RANGED, ids=lambda case: getattr(case, "name", case))
def test_the_schema_has_the_bounds_of_the_check(endpoint: Endpoint, row: Row) -> None:
    context = Context(endpoint, Limits(n=3, logprobs=7), VOCAB)
    schema = row.kind.schema(context)  # type: ignore[union-attr]
    step = 1 if schema["type"] == "integer" else 0.01
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]
    passing = [high, low if "minimum" in schema else low + step]
    for value in passing:
        assert row.kind.check(row.name, value, context) == value  # type: ignore[union-attr]
    for value in (high + step, low - step if "minimum" in schema else low):
        with pytest.raises(api.BadRequestError, match=f"'{row.name}'"):
            row.kind.check(row.name, value, context)  # type: ignore[union-attr]


def test_lower_limits_are_obeyed() -> None:
    limits = Limits(n=2, stop=1, stop_chars=3, stop_token_ids=1, logit_bias=1, logprobs=2, completion_logprobs=1)
    base = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    for endpoint, name, value in [
        ("chat", "n", 3),
        ("chat", "stop", ["a", "b"]),
        ("chat", "stop", "abcd"),
        ("chat", "stop_token_ids", [5, 6]),
        ("chat", "logit_bias", {"5": 1, "6": 1}),
        ("completions", "logprobs", 2),
        ("chat", "top_logprobs", 3),
    ]:
        with pytest.raises(api.BadRequestError) as caught:
            read(endpoint, {**base, name: value}, vocab_size=VOCAB, limits=limits)  # type: ignore[arg-type]
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("chat", {"stop": [str(i) for i in range(8)]}),
        ("chat", {"stop": "x" * 300}),
        ("chat", {"stop_token_ids": list(range(200))}),
        ("chat", {"logit_bias": {str(i): 1 for i in range(1100)}}),
        ("chat", {"logprobs": True, "top_logprobs": 30}),
        ("completions", {"logprobs": 30}),
    ],
    ids=lambda case: case if isinstance(case, str) else next(iter(case)),
)
def test_higher_limits_are_obeyed(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    limits = Limits(stop=8, stop_chars=300, stop_token_ids=200, logit_bias=1100, logprobs=30, completion_logprobs=30)
    base = {"messages": [{"role": "user", "content": "Hi"}]} if endpoint == "chat" else {"prompt": "Hi"}
    assert read(endpoint, {**base, **fields}, vocab_size=2000, limits=limits).params


def test_every_checked_row_has_bad_values() -> None:
    for endpoint, bad in (("chat", BAD | BAD_CHAT), ("completions", BAD | BAD_COMPLETIONS)):
        checked = {row.name for row in TABLE[endpoint].values() if row.kind}  # type: ignore[index]
        assert checked - bad.keys() == ({"stream_options"} if endpoint == "completions" else set())


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_null_is_absent(endpoint: Endpoint) -> None:
    needed = {"messages", "prompt"}
    assert ask(endpoint, **{name: None for name in TABLE[endpoint] if name not in needed}) == ask(endpoint)
    assert refusal(endpoint, **dict.fromkeys(needed)).code == "missing_required_parameter"


def test_codes() -> None:
    assert refusal("chat", n="1").code == "invalid_type"
    assert refusal("chat", n=9).code == "invalid_value"
    assert refusal("chat", response_format={"type": "json_object"}).code == "unsupported_value"
    assert refusal("chat", strict=True, user="me").code == "unknown_parameter"
    assert refusal("chat", messages=[{"role": "user"}]).param == "messages[0].content"


def test_defaults() -> None:
    chat, completion = ask("chat"), ask("completions")
    assert (chat.params.max_tokens, completion.params.max_tokens) == (None, 16)
    for arguments in (chat, completion):
        params = arguments.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1, -1, 0)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
        assert (arguments.n, arguments.best_of, params.seed, arguments.logprobs) == (1, 1, None, None)
        assert not (arguments.stream or arguments.echo or arguments.explain or arguments.return_token_ids)
        assert arguments.ignored == []


@pytest.mark.parametrize(
    ("endpoint", "param", "fields"),
    [
        ("chat", "max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
        ("chat", "top_logprobs", {"logprobs": False, "top_logprobs": 1}),
        ("chat", "stream_options", {"stream": False, "stream_options": {}}),
        ("chat", "min_tokens", {"max_tokens": 3, "min_tokens": 4}),
        ("completions", "min_tokens", {"min_tokens": 17}),
        ("completions", "best_of", {"n": 3, "best_of": 2}),
        ("completions", "best_of", {"stream": True, "best_of": 2}),
        ("completions", "n", {"prompt": ["a"] * 9, "n": 8}),
        ("completions", "best_of", {"prompt": ["a"] * 9, "n": 2, "best_of": 8}),
        ("chat", "stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("chat", "messages[0].tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}),
        ("chat", "messages[0].content[0].type", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("chat", "messages[1].content", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}),
        ("chat", "messages", {"messages": [{"role": "user", "content": "x"}] * 1025}),
    ],
)
def test_rules_between_fields(endpoint: Endpoint, param: str, fields: dict[str, Any]) -> None:
    assert refusal(endpoint, **fields).param == param


def test_rules_that_pass() -> None:
    assert ask("chat", max_tokens=3, max_completion_tokens=3).params.max_tokens == 3
    assert ask("completions", prompt=["a"] * 8, n=8).n == 8
    assert ask("completions", stream=True, best_of=2, n=2).best_of == 2
    assert ask("completions", suffix="").ignored == []
    assert ask("chat", response_format={"type": "text"}, modalities=["text"]).ignored == []


# Ignored, and told. --------------------------------------------------------------------------------------------------

IGNORED = {name: row for name, row in (TABLE["chat"] | TABLE["completions"]).items() if row.action is Action.IGNORED}
ASKING: dict[str, Any] = {"tool_choice": "auto", "function_call": "none", "parallel_tool_calls": 5, "store": True}


@pytest.mark.parametrize("name", IGNORED)
def test_ignored_ones_are_told_or_strictly_refused(name: str) -> None:
    for endpoint in IGNORED[name].endpoints:
        value = ASKING.get(name, "something")
        assert ask(endpoint, **{name: value}).ignored == [name]
        for error in (refusal(endpoint, True, **{name: value}), refusal(endpoint, **{name: value, "strict": True})):
            assert (error.param, error.code) == (name, "unknown_parameter")
        for silent in (None, *IGNORED[name].silent, *(() if name in ASKING else (False, [], {}, ""))):
            assert ask(endpoint, True, **{name: silent}).ignored == []


def test_silent_values_are_those_of_the_contract() -> None:
    silent = {name: row.silent for name, row in IGNORED.items() if row.silent}
    assert silent == {
        "parallel_tool_calls": (True,),
        "service_tier": ("auto", "default"),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }
    assert ask("chat", store=False).ignored == []


def test_unknown_fields() -> None:
    assert ask("chat", foo=1, bar="x", baz=None, empty=[]).ignored == ["bar", "foo"]
    assert ask("chat", echo=True, suffix="x").ignored == ["echo", "suffix"], "fields of the other endpoint"
    assert ask("completions", **{"x\r\nSet-Cookie": 1, "Upper": 1, "9a": 1, "a" * 65: 1, "": 1}).ignored == []
    assert len(ask("chat", **{f"field_{i}": 1 for i in range(60)}).ignored) == 32
    assert refusal("chat", **{f"field_{i}": 1 for i in range(200)}).param is None
    assert refusal("chat", True, **{"x\r\nSet-Cookie": 1}).param is None
    assert read("completions", {"prompt": "x", 5: 1}, vocab_size=9, limits=Limits()).ignored == []  # type: ignore[dict-item]


def test_ignored_inside_other_fields() -> None:
    options = {"include_usage": True, "include_obfuscation": True, "other": 1, "nothing": None}
    assert ask("chat", stream=True, stream_options=options).ignored == ["include_obfuscation", "other"]
    assert ask("chat", stream=True, stream_options={"include_obfuscation": False}).ignored == []
    message = {"role": "user", "content": "x", "name": "me", "refusal": None, "annotations": []}
    assert ask("chat", messages=[message]).ignored == ["name"]


# No request gets past it unchecked. ----------------------------------------------------------------------------------

NAMES = sorted(TABLE["chat"].keys() | TABLE["completions"].keys() | {"foo", "X", ""})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(1 << 63), math.nan])
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=4), max_leaves=6
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["chat", "completions"]), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_any_fields_are_read_or_refused(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    base = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
    try:
        arguments = read(endpoint, {**base, **fields}, vocab_size=VOCAB, limits=Limits())
    except api.BadRequestError as error:
        assert error.param
        assert len(json.dumps(error.to_dict())) < 1000
    else:
        assert 1 <= arguments.n <= arguments.best_of <= 8
        assert all(name not in arguments.params.__dict__ for name in arguments.ignored)
