"""What a request may say, and what becomes of it: one table, a row for each argument of OpenAI's two endpoints.

An argument is honoured; or ignored, which the answer tells; or refused, where a caller would rely on it. `read` sorts
the fields of a request by the table; /openapi.json and docs/parameters.md are made from it. Tokenizes nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from api.checks import (
    BOOLEAN,
    MAX_INTEGER,
    STRING,
    Biases,
    ByEndpoint,
    Context,
    Endpoint,
    Integer,
    Kind,
    Messages,
    Number,
    Only,
    Prompts,
    ResponseFormat,
    StopStrings,
    StreamOptions,
    TokenIds,
    asks_nothing,
    missing,
)
from api.errors import BadRequestError, bad_value
from llama.config import Limits
from llama.errors import InvalidRequest
from llama.request import RANGES, SamplingParams

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")
SAFE_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


class Action(StrEnum):
    """What becomes of an argument."""

    HONOURED = "honoured"
    IGNORED = "ignored, and told"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """An argument. kind: what the value may be; None: anything.

    note: for docs/parameters.md; "{maximum}" and the like stand for the numbers of the kind's schema.
    silent: values that ask for nothing; an ignored argument is not told for them.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    default: str = "none"
    kind: Kind | None = None
    note: str = ""
    action: Action = Action.HONOURED
    silent: tuple[Any, ...] = ()


@dataclass
class Arguments:
    """A request, checked. prompts: one item each, text or ids. messages: as given, checked by the chat format later.

    ignored: names of what was accepted and not acted on. logprobs: None, or how many alternatives per token.
    """

    endpoint: Endpoint
    params: SamplingParams
    model: str | None = None
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)
    n: int = 1
    best_of: int = 1
    echo: bool = False
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    explain: bool = False
    add_special_tokens: bool = True
    parse_special: bool = True
    ignored: list[str] = field(default_factory=list)


BOTH, CHAT, COMPLETIONS = ENDPOINTS, ENDPOINTS[:1], ENDPOINTS[1:]
IGNORED, REFUSED = Action.IGNORED, Action.REFUSED
RANGE = "{minimum} to {maximum}"
# Zero tokens make sense where the prompt is echoed and scored.
MAX_TOKENS = ByEndpoint(chat=Integer(1, MAX_INTEGER), completions=Integer(0, MAX_INTEGER))
REPETITION = Number(*RANGES["repetition_penalty"], above=True)
LOGPROBS = ByEndpoint(chat=BOOLEAN, completions=Integer(0, "completion_logprobs"))
NO_FORCED_TOOLS = Only(("none", "auto"), "Tools cannot be required: this model makes no tool calls.", or_nothing=False)
NO_INFILLING = Only((), "'suffix' is not supported by this model.")
TEXT_ONLY = Only((["text"],), "Only the modality 'text' is supported by this model.")

OPENAI: tuple[Row, ...] = (
    Row("model", BOTH, "none", STRING, "served name or alias; may be left out in process"),
    Row("messages", CHAT, "required", Messages(), "text only; system, then user and assistant in turn"),
    Row("prompt", COMPLETIONS, "required", Prompts(), "text, ids, or a list of either"),
    Row("max_tokens", BOTH, "chat: rest of the context; completions: 16", MAX_TOKENS, "cut to the context"),
    Row("max_completion_tokens", CHAT, "none", MAX_TOKENS, "the same; both given must be equal"),
    Row("temperature", BOTH, "1", Number(*RANGES["temperature"]), f"{RANGE}; below 0.0001 is greedy"),
    Row("top_p", BOTH, "1", Number(*RANGES["top_p"]), f"{RANGE}; the token that crosses it stays in"),
    Row("n", BOTH, "1", Integer(1, "n"), f"{RANGE}; choice j is the same for any n"),
    Row("best_of", COMPLETIONS, "n", Integer(1, "n"), "n to {maximum}, by mean logprob; not with stream"),
    Row("seed", BOTH, "fresh", Integer(-(1 << 63), (1 << 63) - 1), "64 bits; decides every draw"),
    Row("stop", BOTH, "none", StopStrings(), "up to {maxItems} strings of {minLength} to {maxLength} characters"),
    Row("presence_penalty", BOTH, "0", Number(*RANGES["presence_penalty"]), f"{RANGE}, on generated tokens"),
    Row("frequency_penalty", BOTH, "0", Number(*RANGES["frequency_penalty"]), f"{RANGE}, on generated tokens"),
    Row("logit_bias", BOTH, "none", Biases(), "token id to {minimum}..{maximum}, up to {maxProperties:,} of them"),
    Row("logprobs", BOTH, "chat: false; completions: none", LOGPROBS, f"chat: boolean; completions: {RANGE}"),
    Row("top_logprobs", CHAT, "0", Integer(0, "logprobs"), f"{RANGE}; needs logprobs"),
    Row("echo", COMPLETIONS, "false", BOOLEAN, "with logprobs: those of the prompt too"),
    Row("stream", BOTH, "false", BOOLEAN, "chunks as they come"),
    Row("stream_options", BOTH, "none", StreamOptions(), "include_usage; other keys are ignored, and told"),
    Row("response_format", CHAT, "text", ResponseFormat(), "text; JSON is refused without the extra `guided`"),
    Row("suffix", COMPLETIONS, "none", NO_INFILLING, "the model cannot fill in", action=REFUSED),
    Row("tools", CHAT, note="the model makes no tool calls", action=IGNORED),
    Row("functions", CHAT, note="the model makes no tool calls", action=IGNORED),
    Row("parallel_tool_calls", CHAT, note="the model makes no tool calls", action=IGNORED, silent=(True,)),
    Row("tool_choice", CHAT, "none", NO_FORCED_TOOLS, "none, auto; anything else is refused", action=IGNORED),
    Row("function_call", CHAT, "none", NO_FORCED_TOOLS, "none, auto; anything else is refused", action=IGNORED),
    Row("modalities", CHAT, "text", TEXT_ONLY, "text; anything else is refused"),
    Row("audio", CHAT, action=IGNORED),
    Row("user", BOTH, action=IGNORED),
    Row("metadata", CHAT, action=IGNORED),
    Row("store", CHAT, "false", note="nothing is stored", action=IGNORED),
    Row("moderation", CHAT, action=IGNORED),
    Row("prediction", CHAT, action=IGNORED),
    Row("service_tier", CHAT, "auto", action=IGNORED, silent=("auto", "default")),
    Row("safety_identifier", CHAT, action=IGNORED),
    Row("prompt_cache_key", CHAT, note="equal prompt starts are found without it", action=IGNORED),
    Row("prompt_cache_retention", CHAT, action=IGNORED),
    Row("prompt_cache_options", CHAT, action=IGNORED),
    Row("reasoning_effort", CHAT, action=IGNORED, silent=("none",)),
    Row("verbosity", CHAT, "medium", action=IGNORED, silent=("medium",)),
    Row("web_search_options", CHAT, action=IGNORED),
)

EXTENSIONS: tuple[Row, ...] = (
    Row("top_k", BOTH, "-1", Integer(-1, MAX_INTEGER), "-1 or 0: off; else only the k best"),
    Row("min_p", BOTH, "0", Number(*RANGES["min_p"]), f"{RANGE}, relative to the best token"),
    Row(
        "repetition_penalty",
        BOTH,
        "1",
        Number(*RANGES["repetition_penalty"], above=True),
        "up to {maximum}, on prompt and generated tokens",
    ),
    Row("ignore_eos", BOTH, "false", BOOLEAN, "EOS does not end the answer"),
    Row("min_tokens", BOTH, "0", Integer(0, MAX_INTEGER), "until then nothing but max_tokens ends it"),
    Row("stop_token_ids", BOTH, "none", TokenIds(), "up to {maxItems} ids that end it"),
    Row("return_token_ids", BOTH, "false", BOOLEAN, "adds token_ids and prompt_token_ids"),
    Row("explain", BOTH, "false", BOOLEAN, "adds times, steps and counts of this request"),
    Row("strict", BOTH, "false", BOOLEAN, "refuse what would be ignored"),
    Row("add_special_tokens", COMPLETIONS, "true", BOOLEAN, "a BOS in front of a text prompt"),
    Row("parse_special", COMPLETIONS, "true", BOOLEAN, "`<s>` and `</s>` in a text prompt are control tokens"),
)

UNKNOWN = Row("any other", BOTH, action=IGNORED)
TABLE: dict[Endpoint, dict[str, Row]] = {
    endpoint: {row.name: row for row in (*OPENAI, *EXTENSIONS) if endpoint in row.endpoints} for endpoint in ENDPOINTS
}
# Arguments that the engine, or `Arguments`, takes as they are, under the same name.
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingParams) if any(f.name in rows for rows in TABLE.values()))
AS_GIVEN = ("model", "messages", "echo", "stream", "return_token_ids", "explain", "add_special_tokens", "parse_special")


def read(
    endpoint: Endpoint, fields: Mapping[str, Any], *, vocab_size: int, limits: Limits, strict: bool = False
) -> Arguments:
    """The request that `fields` make. Raises BadRequestError, naming the field, before anything is allocated."""
    context = Context(endpoint, limits, vocab_size)
    if len(fields) > limits.fields:
        raise BadRequestError(f"A request has at most {limits.fields} fields, not {len(fields)}.")
    given: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in fields.items():
        if value is None:
            continue
        row = TABLE[endpoint].get(name, UNKNOWN)
        checked = row.kind.check(name, value, context) if row.kind else value
        if row.action is Action.HONOURED:
            given[name] = checked
        elif row.action is Action.IGNORED and not asks_nothing(value) and value not in row.silent:
            ignored.append(str(name))
    ignored += _ignored_inside(given)
    if ignored and (strict or given.get("strict")):
        raise _unknown(ignored[0])
    told = sorted({name for name in ignored if SAFE_NAME.fullmatch(name)})[: limits.reported_names]
    return _collect(endpoint, given, limits, told)


def _ignored_inside(given: Mapping[str, Any]) -> list[str]:
    """Names of what is ignored inside messages and stream_options."""
    known = {"role", "content", "tool_calls", "function_call", "tool_call_id"}
    pairs = [(k, v) for message in given.get("messages", []) for k, v in message.items() if k not in known]
    pairs += [(k, v) for k, v in given.get("stream_options", {}).items() if k != "include_usage"]
    return list(dict.fromkeys(str(name) for name, value in pairs if not asks_nothing(value)))


def _unknown(name: str) -> BadRequestError:
    safe = name if SAFE_NAME.fullmatch(name) else None
    shown = f"'{safe}'" if safe else "A field with an unusual name"
    message = f"{shown} would be ignored, and the request (or this service) is strict."
    return BadRequestError(message, param=safe, code="unknown_parameter")


def _collect(endpoint: Endpoint, given: dict[str, Any], limits: Limits, ignored: list[str]) -> Arguments:
    """The rules between fields, and what follows from several of them."""
    required = "messages" if endpoint == "chat" else "prompt"
    if required not in given:
        raise missing(required)
    n, stream = given.get("n", 1), given.get("stream", False)
    best_of = given.get("best_of", n)
    if best_of < n:
        raise bad_value("best_of", best_of, f"must be at least n={n}")
    if stream and best_of > n:
        raise BadRequestError("'best_of' above n cannot be streamed.", param="best_of")
    count = len(given.get("prompt", [None])) * best_of
    if count > limits.sequences:
        param = "best_of" if best_of > n else "n"
        raise bad_value(param, best_of, f"prompts x {param} may be at most {limits.sequences}, not {count}")
    if "stream_options" in given and not stream:
        raise BadRequestError("'stream_options' needs stream=true.", param="stream_options")
    logprobs = _logprobs(endpoint, given)
    return Arguments(
        endpoint=endpoint,
        params=_sampling(endpoint, given, logprobs, ranked=best_of > n),
        prompts=given.get("prompt", []),
        n=n,
        best_of=best_of,
        logprobs=logprobs,
        include_usage=bool(given.get("stream_options", {}).get("include_usage")),
        ignored=ignored,
        **{name: given[name] for name in AS_GIVEN if name in given},
    )


def _logprobs(endpoint: Endpoint, given: Mapping[str, Any]) -> int | None:
    """How many alternatives per token; None: no logprobs at all."""
    if endpoint == "completions":
        return given.get("logprobs")
    top = given.get("top_logprobs", 0)
    if given.get("logprobs"):
        return top
    if top:
        raise BadRequestError("'top_logprobs' needs logprobs=true.", param="top_logprobs")
    return None


def _max_tokens(endpoint: Endpoint, given: Mapping[str, Any]) -> int | None:
    both = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(both) == 2 and both[0] != both[1]:
        message = "'max_tokens' and 'max_completion_tokens' mean the same here, and differ."
        raise BadRequestError(message, param="max_completion_tokens")
    if not both:
        return 16 if endpoint == "completions" else None
    if both[0] == 0 and not given.get("echo"):
        raise bad_value("max_tokens", 0, "must be at least 1, or echo=true")
    return both[0]


def _sampling(endpoint: Endpoint, given: Mapping[str, Any], logprobs: int | None, ranked: bool) -> SamplingParams:
    """ranked: the sequences are compared by their logprobs, whether or not these are told."""
    params = {name: given[name] for name in SAMPLING if name in given}
    params["max_tokens"] = _max_tokens(endpoint, given)
    params["top_k"] = given.get("top_k") or -1
    params["logprobs"] = 0 if ranked and logprobs is None else logprobs
    params["prompt_logprobs"] = logprobs if given.get("echo") else None
    try:
        return SamplingParams(**params)
    except InvalidRequest as error:
        raise bad_value(error.field, error.value, error.limit) from error
