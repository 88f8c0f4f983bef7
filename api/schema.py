"""The objects of the OpenAI interface: what a request is answered with.

The wire form (`to_dict()`, `to_json()`) has the fields that were set, an explicit null among them; `model_dump()` adds
the optional ones that were not. Mapping access, as in 2023 (`answer["choices"]`), sees what the wire sees. A field that
has a value and is not in `model_fields_set` is for callers in process only.
"""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Object(BaseModel):
    """A JSON object with attribute and mapping access."""

    model_config = ConfigDict(extra="forbid")

    def to_dict(self) -> dict[str, Any]:
        """The wire form."""
        return self.model_dump(exclude_unset=True)

    def to_json(self, indent: int | None = None) -> str:
        """The wire form on one line (or indented), ASCII only: some readers take U+2028 and U+0085 for line ends."""
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_dict(), indent=indent, separators=separators, allow_nan=False)

    def __getitem__(self, name: str) -> Any:
        if name not in self.model_fields_set:
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self.model_fields_set else default

    def __contains__(self, name: object) -> bool:
        return name in self.model_fields_set

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a mapping gives its keys, pydantic gives pairs
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.model_fields_set)

    def __bool__(self) -> bool:
        return True

    def keys(self) -> KeysView[str]:
        return self._set_fields().keys()

    def values(self) -> ValuesView[Any]:
        return self._set_fields().values()

    def items(self) -> ItemsView[str, Any]:
        return self._set_fields().items()

    def _set_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class PromptTokensDetails(Object):
    """cached_tokens: prompt tokens whose K/V were found in the prefix cache."""

    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Object):
    """Kinds of tokens that this engine does not make; always 0."""

    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Object):
    """prompt_tokens: each prompt once, with BOS. completion_tokens: every token generated, for all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(Object):
    """bytes: what the token adds to the text; null for one without text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One generated token, and the best tokens at its place, sorted by logprob, then id."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Object):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Object):
    """Four lists of equal length (top_logprobs: or null), or, in compat="anyscale", an empty object.

    The first token of an echoed prompt has no logprob: null in token_logprobs and in top_logprobs.
    text_offset: where the token's text begins, in characters of `text`.
    """

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class Step(Object):
    """A step of the engine that the request took part in.

    tokens: how many of its own were computed; batch_sequences, batch_tokens: of all requests; ms: the step's duration.
    """

    tokens: int
    batch_sequences: int
    batch_tokens: int
    ms: float


class Explain(Object):
    """What happened to the request; all times in milliseconds. steps: the first ones, a bounded number.

    queue_ms: until its first step. prefill_ms: from there to the first token. decode_ms: from there to the last.
    seed: null where prompts were given one each.
    """

    seed: int | None
    queue_ms: float | None
    prefill_ms: float | None
    first_token_ms: float | None
    decode_ms: float | None
    total_ms: float | None
    cached_tokens: int
    preemptions: int
    steps: list[Step]


class ChatMessage(Object):
    """The fields after `refusal` are never set; readers may look for them."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class ChatDelta(Object):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    function_call: None = None
    tool_calls: None = None


class ChatChoice(Object):
    """token_ids: the generated ones, those swallowed by a stop among them."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class ChatChunkChoice(Object):
    """token_ids: those of this chunk. prompt_token_ids: in the choice's first chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class CompletionChoice(Object):
    """Of a whole answer, or of a chunk: there finish_reason is null but in the last, prompt_token_ids in the first."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class Head(Object):
    """What every answer and chunk begins with. id: equal in all chunks; created: Unix seconds.

    openai_name: what `object` is, but in compat="anyscale".
    """

    openai_name: ClassVar[str] = "text_completion"
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    ignored_parameters: list[str] = []
    explain: Explain | None = None


class ChatCompletion(Head):
    openai_name = "chat.completion"
    object: Literal["chat.completion", "text_completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = []


class ChatCompletionChunk(Head):
    openai_name = "chat.completion.chunk"
    object: Literal["chat.completion.chunk", "text_completion"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] = []


class Completion(Head):
    """A whole completion, or a chunk of one: their shape is the same."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(Object):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Object):
    object: Literal["list"]
    data: list[Model]

    def __iter__(self) -> Iterator[Model]:  # type: ignore[override]
        """The models themselves, as openai-python's list does."""
        return iter(self.data)


class Tokens(Object):
    """Answer of `tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(Object):
    """Answer of `detokenize`."""

    prompt: str


class Health(Object):
    """status: "ok" while the engine serves. heartbeat_age: seconds since its thread last moved; idle, it need not."""

    status: Literal["ok", "stalled", "stopped"]
    heartbeat_age: float
    slots: int
    slots_in_use: int
