"""What a request may say, and what becomes of it: one table, a row for each argument of OpenAI's two endpoints.

An argument is honoured; or ignored, which the answer then tells; or refused, when dropping it would break what the
caller expects. `read` sorts the fields of a request by the table, and checks every value before anything is allocated.
Knows nothing of threads, slots or text: prompts and messages are tokenized later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from api import checks
from api.checks import MAX_INTEGER, Check, Context, Endpoint, asks_nothing, boolean, integer, missing, number
from api.errors import BadRequestError, bad_value
from llama.config import Limits
from llama.errors import InvalidRequest
from llama.request import SamplingParams

ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completions")
SAFE_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


class Action(StrEnum):
    """What becomes of an argument."""

    HONOURED = "honoured"
    IGNORED = "ignored, and told"
    REFUSED = "refused"


@dataclass(frozen=True)
class Argument:
    """A row of the table. check: for honoured and refused ones. silent: values that ask for nothing, so never told."""

    name: str
    endpoints: tuple[Endpoint, ...]
    action: Action
    default: str
    note: str
    check: Check | None = None
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
H, R, X = Action.HONOURED, Action.IGNORED, Action.REFUSED

OPENAI: tuple[Argument, ...] = (
    Argument("model", BOTH, H, "none", "served name or alias; may be left out in process", checks.string),
    Argument(
        "messages", CHAT, H, "required", "text only; system, then user and assistant in turn", checks.message_list
    ),
    Argument("prompt", COMPLETIONS, H, "required", "text, ids, or a list of either", checks.prompts),
    Argument(
        "max_tokens", BOTH, H, "chat: rest of the context; completions: 16", "cut to the context", checks.max_tokens
    ),
    Argument("max_completion_tokens", CHAT, H, "none", "the same; both given must be equal", checks.max_tokens),
    Argument("temperature", BOTH, H, "1", "0 to 2; below 0.0001 is greedy", number(0, 2)),
    Argument("top_p", BOTH, H, "1", "0 to 1; the token that crosses it stays in", number(0, 1)),
    Argument("n", BOTH, H, "1", "1 to 8; choice j is the same for any n", integer(1, "n")),
    Argument("best_of", COMPLETIONS, H, "n", "n to 8, by mean logprob; not with stream", integer(1, "n")),
    Argument("seed", BOTH, H, "fresh", "64 bits; decides every draw", integer(-(1 << 63), (1 << 63) - 1)),
    Argument("stop", BOTH, H, "none", "up to 4 strings of 1 to 256 characters", checks.stop_strings),
    Argument("presence_penalty", BOTH, H, "0", "-2 to 2, on generated tokens", number(-2, 2)),
    Argument("frequency_penalty", BOTH, H, "0", "-2 to 2, on generated tokens", number(-2, 2)),
    Argument("logit_bias", BOTH, H, "none", "token id to -100..100, up to 1,024 of them", checks.biases),
    Argument(
        "logprobs", BOTH, H, "chat: false; completions: none", "chat: boolean; completions: 0 to 5", checks.logprobs
    ),
    Argument("top_logprobs", CHAT, H, "0", "0 to 20; needs logprobs", integer(0, "logprobs")),
    Argument("echo", COMPLETIONS, H, "false", "with logprobs: those of the prompt too", boolean),
    Argument("stream", BOTH, H, "false", "chunks as they come", boolean),
    Argument(
        "stream_options", BOTH, H, "none", "include_usage; other keys are ignored, and told", checks.stream_options
    ),
    Argument(
        "response_format", CHAT, H, "text", "text; JSON is refused without the extra `guided`", checks.response_format
    ),
    Argument("suffix", COMPLETIONS, X, "none", "the model cannot fill in", checks.nothing),
    Argument("tools", CHAT, R, "none", "the model makes no tool calls"),
    Argument("functions", CHAT, R, "none", "the model makes no tool calls"),
    Argument("parallel_tool_calls", CHAT, R, "none", "the model makes no tool calls", silent=(True,)),
    Argument("tool_choice", CHAT, R, "none", "none, auto; anything else is refused", checks.free_choice),
    Argument("function_call", CHAT, R, "none", "none, auto; anything else is refused", checks.free_choice),
    Argument("modalities", CHAT, H, "text", "text; anything else is refused", checks.text_only),
    Argument("audio", CHAT, R, "none", ""),
    Argument("user", BOTH, R, "none", ""),
    Argument("metadata", CHAT, R, "none", ""),
    Argument("store", CHAT, R, "false", "nothing is stored"),
    Argument("moderation", CHAT, R, "none", ""),
    Argument("prediction", CHAT, R, "none", ""),
    Argument("service_tier", CHAT, R, "auto", "", silent=("auto", "default")),
    Argument("safety_identifier", CHAT, R, "none", ""),
    Argument("prompt_cache_key", CHAT, R, "none", "equal prompt starts are found without it"),
    Argument("prompt_cache_retention", CHAT, R, "none", ""),
    Argument("prompt_cache_options", CHAT, R, "none", ""),
    Argument("reasoning_effort", CHAT, R, "none", "", silent=("none",)),
    Argument("verbosity", CHAT, R, "medium", "", silent=("medium",)),
    Argument("web_search_options", CHAT, R, "none", ""),
)

EXTENSIONS: tuple[Argument, ...] = (
    Argument("top_k", BOTH, H, "-1", "-1 or 0: off; else only the k best", integer(-1, MAX_INTEGER)),
    Argument("min_p", BOTH, H, "0", "0 to 1, relative to the best token", number(0, 1)),
    Argument("repetition_penalty", BOTH, H, "1", "up to 10, on prompt and generated tokens", number(0, 10, above=True)),
    Argument("ignore_eos", BOTH, H, "false", "EOS does not end the answer", boolean),
    Argument("min_tokens", BOTH, H, "0", "until then nothing but max_tokens ends it", integer(0, MAX_INTEGER)),
    Argument("stop_token_ids", BOTH, H, "none", "up to 128 ids that end it", checks.token_ids),
    Argument("return_token_ids", BOTH, H, "false", "adds token_ids and prompt_token_ids", boolean),
    Argument("explain", BOTH, H, "false", "adds times, steps and counts of this request", boolean),
    Argument("strict", BOTH, H, "false", "refuse what would be ignored", boolean),
    Argument("add_special_tokens", COMPLETIONS, H, "true", "a BOS in front of a text prompt", boolean),
    Argument("parse_special", COMPLETIONS, H, "true", "`<s>` and `</s>` in a text prompt are control tokens", boolean),
)

TABLE: dict[Endpoint, dict[str, Argument]] = {
    endpoint: {row.name: row for row in (*OPENAI, *EXTENSIONS) if endpoint in row.endpoints} for endpoint in ENDPOINTS
}


def markdown_table(rows: Sequence[Argument]) -> str:
    """The table as the README shows it."""
    lines = ["| parameter | endpoints | default | what becomes of it | |", "|---|---|---|---|---|"]
    for row in rows:
        where = "both" if row.endpoints == BOTH else row.endpoints[0]
        lines.append(f"| `{row.name}` | {where} | {row.default} | {row.action} | {row.note} |")
    return "\n".join(lines)


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
        row = TABLE[endpoint].get(name)
        if value is None:
            continue
        if row is None:
            if not asks_nothing(value):
                ignored.append(str(name))
            continue
        checked = row.check(name, value, context) if row.check else value
        if row.action is Action.HONOURED:
            given[name] = checked
        elif row.action is Action.IGNORED and not asks_nothing(value) and value not in row.silent:
            ignored.append(name)
    ignored += _ignored_inside(given)
    if ignored and (strict or given.get("strict")):
        raise _unknown(ignored[0])
    arguments = _collect(endpoint, given, context)
    arguments.ignored = sorted({name for name in ignored if SAFE_NAME.fullmatch(name)})[: limits.reported_names]
    return arguments


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


def _collect(endpoint: Endpoint, given: dict[str, Any], context: Context) -> Arguments:
    """Defaults, and the rules between fields."""
    required = "messages" if endpoint == "chat" else "prompt"
    if required not in given:
        raise missing(required)
    n = given.get("n", 1)
    best_of = given.get("best_of", n)
    stream = given.get("stream", False)
    if best_of < n:
        raise bad_value("best_of", best_of, f"must be at least n={n}")
    if stream and best_of > n:
        raise BadRequestError("'best_of' above n cannot be streamed.", param="best_of")
    count = len(given.get("prompt", [None])) * best_of
    if count > context.limits.sequences:
        param = "best_of" if best_of > n else "n"
        raise bad_value(param, best_of, f"prompts x {param} may be at most {context.limits.sequences}, not {count}")
    if "stream_options" in given and not stream:
        raise BadRequestError("'stream_options' needs stream=true.", param="stream_options")
    count_logprobs = _logprobs(endpoint, given)
    echo = given.get("echo", False)
    options = given.get("stream_options", {})
    return Arguments(
        endpoint=endpoint,
        params=_sampling(endpoint, given, count_logprobs, echo, best_of > n),
        model=given.get("model"),
        messages=given.get("messages", []),
        prompts=given.get("prompt", []),
        n=n,
        best_of=best_of,
        echo=echo,
        logprobs=count_logprobs,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        return_token_ids=given.get("return_token_ids", False),
        explain=given.get("explain", False),
        add_special_tokens=given.get("add_special_tokens", True),
        parse_special=given.get("parse_special", True),
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


def _max_tokens(endpoint: Endpoint, given: Mapping[str, Any], echo: bool) -> int | None:
    both = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(both) == 2 and both[0] != both[1]:
        message = "'max_tokens' and 'max_completion_tokens' mean the same here, and differ."
        raise BadRequestError(message, param="max_completion_tokens")
    if not both:
        return 16 if endpoint == "completions" else None
    if both[0] == 0 and not echo:
        raise bad_value("max_tokens", 0, "must be at least 1, or echo=true")
    return both[0]


def _sampling(
    endpoint: Endpoint, given: Mapping[str, Any], count_logprobs: int | None, echo: bool, ranked: bool
) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=_max_tokens(endpoint, given, echo),
            temperature=given.get("temperature", 1.0),
            top_k=given.get("top_k") or -1,
            top_p=given.get("top_p", 1.0),
            min_p=given.get("min_p", 0.0),
            presence_penalty=given.get("presence_penalty", 0.0),
            frequency_penalty=given.get("frequency_penalty", 0.0),
            repetition_penalty=given.get("repetition_penalty", 1.0),
            logit_bias=given.get("logit_bias", {}),
            seed=given.get("seed"),
            stop=given.get("stop", ()),
            stop_token_ids=given.get("stop_token_ids", ()),
            ignore_eos=given.get("ignore_eos", False),
            min_tokens=given.get("min_tokens", 0),
            logprobs=0 if ranked and count_logprobs is None else count_logprobs,
            prompt_logprobs=count_logprobs if echo else None,
        )
    except InvalidRequest as error:
        raise bad_value(error.field, error.value, error.limit) from error
