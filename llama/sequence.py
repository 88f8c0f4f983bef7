"""`Sequence`: one token stream of a request, and where its K/V lie."""

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
    """leader: another choice of the same prompt. This one starts when the leader has computed the prompt, and finds its
    blocks in the prefix cache."""

    request: Request
    index: int
    token_ids: list[int]  # the prompt, then what was generated
    n_prompt: int
    max_len: int  # tokens at which it ends with LENGTH
    seed: int  # of this sequence alone, 64 bits signed
    stop_ids: frozenset[int]
    leader: Sequence | None = None
    num_computed: int = 0  # tokens whose K/V are in the cache once the planned steps have run
    last_plan: int = 0  # number of the last plan that it was in
    block_table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its first blocks, as many as are published or were found
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
