"""`Sequence`: one token stream of a request, and where its K/V lie. `num_computed` of its tokens are in the cache,
once the steps that are planned have run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

from llama.request import Request, SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended. STOP: eos, a stop id or a stop string. LENGTH: max_tokens or the context."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class TokenLogprobs:
    """One token's logprob, and the best alternatives (id, logprob), best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Sequence:
    """token_ids: the prompt, then what was generated. seed: of this sequence alone, 64 bits signed.

    keys: hash keys of its first blocks, as many as are published or were found. leader: another choice of the same
    prompt; this one starts when the leader has computed the prompt, and finds its blocks in the prefix cache.
    max_len: tokens at which it ends with LENGTH. last_plan: the number of the last plan that it was in.
    """

    request: Request
    index: int
    token_ids: list[int]
    n_prompt: int
    max_len: int
    seed: int
    stop_ids: frozenset[int]
    leader: Sequence | None = None
    num_computed: int = 0
    last_plan: int = 0
    block_table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def n_generated(self) -> int:
        return len(self.token_ids) - self.n_prompt


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request: a hash, so that neighbouring seeds and choices share nothing."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
