"""What a request may say, and what becomes of it: one table, a row for each argument of OpenAI's two endpoints.

An argument is honoured; or ignored, which the answer tells; or refused, where a caller would rely on it. `api.request`
sorts the fields of a request by the table; /openapi.json and docs/parameters.md are made from it.
"""

from __future__ import annotations

import dataclasses
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
)
from llama.request import RANGES, SamplingParams

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")


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
    Row("repetition_penalty", BOTH, "1", REPETITION, "up to {maximum}, on prompt and generated tokens"),
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
