"""`SamplingParams` and `Request`: what a caller asks for, checked whole before anything is queued or allocated."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama.config import Limits
from llama.errors import ContextLengthExceeded, InvalidRequest

# Below this a temperature is greedy: dividing by it would turn rounding noise into choices.
GREEDY_BELOW = 1e-4

# Read by the table of arguments in api, too.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0, 10),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises InvalidRequest, naming the field, for a bad value.
    `check_request` holds amounts to the engine's `Limits`.

    max_tokens: None = the rest of the context. temperature: below 1e-4 = greedy. top_k: -1 = off. top_p, min_p: 0 to 1.
    presence_penalty, frequency_penalty: -2 to 2, on generated tokens. repetition_penalty: above 0 to 10, on prompt and
    generated tokens. logit_bias: token id -> -100 to 100. seed: None = a fresh one; choices of one request differ in
    any case. stop: strings that end the text before them. stop_token_ids: end a sequence, as eos does unless
    ignore_eos. min_tokens: until then, only its length ends a sequence. logprobs, prompt_logprobs: how many of the best
    tokens to report beside each; None = no report.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Collection[str] = ()
    stop_token_ids: Collection[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            _number(name, getattr(self, name), low, high)
        if self.repetition_penalty == 0:
            raise InvalidRequest("repetition_penalty", self.repetition_penalty, "must be above 0")
        _integer("top_k", self.top_k, -1, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        _integer("max_tokens", self.max_tokens, 0, 1 << 31, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", self.min_tokens, f"is above max_tokens={self.max_tokens}")
        _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, 1 << 31, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, 1 << 31, optional=True)
        if type(self.ignore_eos) is not bool:
            raise InvalidRequest("ignore_eos", self.ignore_eos, "must be True or False")
        # Copies: what was checked is what the engine thread will read.
        object.__setattr__(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("stop", text, "a stop string has at least 1 character")
        object.__setattr__(self, "stop_token_ids", _items("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest("logit_bias", self.logit_bias, "must be a mapping from token id to number")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for value in self.logit_bias.values():
            _number("logit_bias", value, -100, 100)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def counts_tokens(self) -> bool:
        """Whether a token's logits depend on which ones came before it, other than through the model."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def penalised(self) -> bool:
        """Whether single logits must be changed before sampling."""
        return bool(self.logit_bias or self.min_tokens or self.counts_tokens)


@dataclass(frozen=True, eq=False)
class Request:
    """One API call: len(prompts) * n sequences that share one slot. Sequence p * n + j is choice j of prompt p.

    salt: requests share cached blocks only with equal salts. chat: the answer's text is decoded on its own, as Meta's
    chat code does, not as a continuation of the prompt's. trace: note its steps in its stream's `stats`.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    n: int = 1
    salt: str = ""
    chat: bool = False
    trace: bool = False


def check_request(request: Request, vocab_size: int, max_seq_len: int, max_cached: int, limits: Limits) -> None:
    """Raise InvalidRequest (or ContextLengthExceeded) unless the request can be served.

    max_cached: tokens that the whole KV cache can hold for one sequence.
    """
    for name, kind in (("params", SamplingParams), ("salt", str), ("chat", bool)):
        if not isinstance(getattr(request, name), kind):
            raise InvalidRequest(name, getattr(request, name), f"must be of type {kind.__name__}")
    _integer("n", request.n, 1, limits.n)
    _check_amounts(request.params, limits)
    max_tokens = request.params.max_tokens
    if not request.prompts:
        raise InvalidRequest("prompt", [], "at least one prompt is needed")
    if (count := len(request.prompts) * request.n) > limits.sequences:
        raise InvalidRequest("n", count, f"prompts x n may be at most {limits.sequences} sequences")
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(request.params, name):
            _integer(name, token_id, 0, vocab_size - 1)
    for prompt in request.prompts:
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
            raise InvalidRequest("prompt", prompt, "must be a list of token ids")
        if not len(prompt):
            raise InvalidRequest("prompt", [], "a prompt needs at least one token")
        for token_id in prompt:
            # `type` and not isinstance: True is not a token id.
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise InvalidRequest("prompt", token_id, f"token ids must be whole numbers from 0 to {vocab_size - 1}")
        # max_tokens=0 (only the prompt is scored) may fill the context; otherwise one position must be left.
        room = max_seq_len if max_tokens == 0 else max_seq_len - 1
        if len(prompt) > room:
            raise ContextLengthExceeded(len(prompt), room)
        longest = max_seq_len if max_tokens is None else min(len(prompt) + max_tokens, max_seq_len)
        if longest > max_cached:
            raise ContextLengthExceeded(longest, max_cached, "the KV cache")


def _check_amounts(params: SamplingParams, limits: Limits) -> None:
    _integer("logprobs", params.logprobs, 0, limits.logprobs, optional=True)
    _integer("prompt_logprobs", params.prompt_logprobs, 0, limits.logprobs, optional=True)
    for name in ("stop", "stop_token_ids", "logit_bias"):
        count, most = len(getattr(params, name)), getattr(limits, name)
        if count > most:
            raise InvalidRequest(name, count, f"at most {most} entries")
    for text in params.stop:
        if len(text) > limits.stop_chars:
            raise InvalidRequest("stop", text, f"a stop string has 1 to {limits.stop_chars} characters")


def _items(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise InvalidRequest(name, value, "must be a list")
    return tuple(value)


def _integer(name: str, value: object, low: int, high: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(name, value, f"must be a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        raise InvalidRequest(name, value, f"must be a number from {low} to {high}")
