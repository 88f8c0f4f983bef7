"""`Answer`: what the engine delivers becomes chunks, and the same chunks become one whole answer.

A whole answer is folded from the chunks that a stream would have, so the two are equal. No threads, no I/O, no clock.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from api import schema
from api.arguments import Arguments
from api.logprobs import add_prompt, add_tokens, chat_token, extend
from api.prompt import Prompt
from llama.sequence import FinishReason, TokenLogprobs
from llama.stream import Delta, RequestStats
from llama.tokenizer import Vocabulary

Compat = Literal["openai", "anyscale"]
MARK = "\0"  # stands for a text that is put in later; nothing else in a chunk can have it
Whole = TypeVar("Whole", schema.ChatCompletion, schema.Completion)
Chunk = TypeVar("Chunk", schema.ChatCompletionChunk, schema.Completion)
ChatChoice = schema.ChatChoice | schema.ChatChunkChoice
AnyChoice = ChatChoice | schema.CompletionChoice


@dataclass
class Heading:
    """What every object of one answer begins with."""

    model: str
    created: int
    fingerprint: str
    compat: Compat = "openai"
    request_id: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def id(self) -> str:
        return f"{self.model}-{self.request_id}"


@dataclass
class Progress:
    """One sequence so far. frame: the JSON before and after the text of its chunks, once it is known.

    blank: a chat answer's text has not begun. pending_ids: counted, not yet in a chunk.
    """

    prompt: Prompt
    frame: tuple[str, str] | None = None
    begun: bool = False
    blank: bool = True
    pending_ids: list[int] = field(default_factory=list)
    n_tokens: int = 0
    sum_logprobs: float = 0.0

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprobs / max(self.n_tokens, 1)

    def take_ids(self) -> list[int]:
        """The pending ids, which are then no longer pending."""
        ids, self.pending_ids = self.pending_ids, []
        return ids


@dataclass(eq=False)
class Answer(ABC, Generic[Whole, Chunk]):
    """The answer to one request, from its first delta to its last; one subclass for each endpoint.

    prompts: as the engine got them; sequence p * best_of + j belongs to prompts[p]. stats: of the request, read when
    usage or `explain` are made. seed: the one that was used, where there was one for all prompts.
    """

    whole_type: ClassVar[type[schema.Head]]
    chunk_type: ClassVar[type[schema.Head]]

    arguments: Arguments
    heading: Heading
    prompts: Sequence[Prompt]
    vocabulary: Vocabulary
    stats: RequestStats
    seed: int | None = None

    def __post_init__(self) -> None:
        self._openai = self.heading.compat == "openai"
        self._ids_on_wire = self._openai and self.arguments.return_token_ids
        self._progress = [Progress(prompt) for prompt in self.prompts for _ in range(self.arguments.best_of)]
        self._unfinished = len(self._progress)
        self._first = True

    def chunks(self, delta: Delta) -> list[Chunk]:
        """The chunks that a delta makes: none, if there is nothing to show yet."""
        progress = self._count(delta)
        progress.pending_ids += delta.token_ids
        chunks = [self._chunk([choice]) for choice in self._choices(delta, progress)]
        if delta.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished and self.arguments.stream:
                self._end(chunks)
        return chunks

    def wire(self, delta: Delta) -> list[str]:
        """The same chunks as JSON.

        Most chunks only add text. Serialise the first such chunk of a choice once, keep the JSON before and after its
        text, and splice in new text: building objects per token costs more than all other work.
        """
        progress, asked = self._progress[delta.index], self.arguments
        plain = progress.begun and delta.text and delta.finish_reason is None
        if not plain or asked.logprobs is not None or asked.return_token_ids:
            return [chunk.to_json() for chunk in self.chunks(delta)]
        if progress.frame is None:
            (choice,) = self._choices(Delta(delta.index, [], MARK), progress)
            before, _, after = self._chunk([choice]).to_json().rpartition(json.dumps(MARK))
            progress.frame = before, after
        self._count(delta)
        before, after = progress.frame
        return [before + json.dumps(delta.text) + after]

    def whole(self, chunks: Iterable[Chunk]) -> Whole:
        """All chunks of the answer, folded into one object."""
        parts: list[list[Any]] = [[] for _ in self._progress]
        for chunk in chunks:
            for choice in chunk.choices:
                parts[choice.index].append(choice)
        choices = [self._folded(index, parts[i]) for index, i in enumerate(self._best())]
        answer = self._object(self.whole_type, choices, first=True)
        answer.usage = self.usage
        if self.arguments.explain and self._openai:
            answer.explain = self._explain()
        return answer

    @property
    def usage(self) -> schema.Usage:
        """Of what was delivered until now."""
        n_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        n_answer = sum(progress.n_tokens for progress in self._progress)
        usage = schema.Usage(prompt_tokens=n_prompt, completion_tokens=n_answer, total_tokens=n_prompt + n_answer)
        if self._openai:
            usage.prompt_tokens_details = schema.PromptTokensDetails(
                cached_tokens=self.stats.cached_tokens, audio_tokens=0
            )
            usage.completion_tokens_details = schema.CompletionTokensDetails(
                reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
            )
        return usage

    @abstractmethod
    def _choices(self, delta: Delta, progress: Progress) -> list[Any]:
        """What a delta adds to its choice, one item for each chunk."""

    @abstractmethod
    def _folded(self, index: int, parts: list[Any]) -> Any:
        """A whole choice, from those of the chunks."""

    def _chunk(self, choices: list[Any]) -> Chunk:
        chunk = self._object(self.chunk_type, choices, self._first)
        if self._openai and self.arguments.include_usage:
            chunk.usage = None
        self._first = False
        return chunk

    def _object(self, kind: type[Any], choices: list[Any], first: bool) -> Any:
        """A whole answer or a chunk. first: with what is said once."""
        heading, ignored = self.heading, self.arguments.ignored
        name = kind.openai_name if self._openai else "text_completion"
        answer = kind(id=heading.id, object=name, created=heading.created, model=heading.model, choices=choices)
        if self._openai:
            answer.system_fingerprint = heading.fingerprint
        if not self._openai or (first and ignored):
            _attach(answer, "ignored_parameters", list(ignored), on_wire=self._openai)
        if first and self.arguments.endpoint == "chat":
            _attach(answer, "prompt_token_ids", list(self.prompts[0].ids), on_wire=self._ids_on_wire)
        return answer

    def _add_ids(self, choice: AnyChoice, generated: list[int], prompt: list[int]) -> None:
        _attach(choice, "token_ids", generated, on_wire=self._ids_on_wire)
        prompt_on_wire = self._ids_on_wire and bool(prompt) and isinstance(choice, schema.CompletionChoice)
        _attach(choice, "prompt_token_ids", prompt, on_wire=prompt_on_wire)

    def _count(self, delta: Delta) -> Progress:
        progress = self._progress[delta.index]
        progress.n_tokens += len(delta.token_ids)
        progress.sum_logprobs += sum(entry.logprob for entry in delta.logprobs)
        return progress

    def _shows(self, delta: Delta) -> bool:
        """Whether a delta needs a chunk: tokens without text do if their ids or logprobs were asked for."""
        asked = self.arguments.logprobs is not None or self.arguments.return_token_ids
        return bool(delta.text or (delta.token_ids and asked))

    def _end(self, chunks: list[Chunk]) -> None:
        """What comes with, or after, the last chunk of a stream."""
        if not self._openai:
            chunks[-1].usage = self.usage
            return
        if self.arguments.include_usage:
            chunks.append(self._chunk([]))
            chunks[-1].usage = self.usage
        if self.arguments.explain:
            chunks[-1].explain = self._explain()

    def _best(self) -> list[int]:
        """Which sequences become choices 0, 1, ...: of each prompt's best_of the n of best mean logprob."""
        n, best_of = self.arguments.n, self.arguments.best_of
        best: list[int] = []
        for start in range(0, len(self._progress), best_of):
            group = range(start, start + best_of)
            best += sorted(group, key=lambda i: -self._progress[i].mean_logprob)[:n] if best_of > n else group
        return best

    def _explain(self) -> schema.Explain:
        stats = self.stats
        return schema.Explain(
            seed=self.seed,
            queue_ms=_ms(stats.submitted, stats.first_scheduled),
            prefill_ms=_ms(stats.first_scheduled, stats.first_token),
            first_token_ms=_ms(stats.submitted, stats.first_token),
            decode_ms=_ms(stats.first_token, stats.finished),
            total_ms=_ms(stats.submitted, stats.finished),
            cached_tokens=stats.cached_tokens,
            preemptions=stats.preemptions,
            steps=[
                schema.Step(
                    tokens=step.n_tokens,
                    batch_sequences=step.batch_seqs,
                    batch_tokens=step.batch_tokens,
                    ms=round(step.seconds * 1000, 3),
                )
                for step in stats.steps or []
            ],
        )


class ChatAnswer(Answer[schema.ChatCompletion, schema.ChatCompletionChunk]):
    """Answers of chat.completions."""

    whole_type, chunk_type = schema.ChatCompletion, schema.ChatCompletionChunk

    def _folded(self, index: int, parts: list[schema.ChatChunkChoice]) -> schema.ChatChoice:
        message = schema.ChatMessage(role="assistant", content="".join(part.delta.content or "" for part in parts))
        if self._openai:
            message.refusal = None
        choice = schema.ChatChoice(index=index, message=message, finish_reason=parts[-1].finish_reason)
        entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        self._add_logprobs(choice, entries)
        self._add_ids(choice, [i for part in parts for i in part.token_ids], parts[0].prompt_token_ids)
        return choice

    def _choices(self, delta: Delta, progress: Progress) -> list[schema.ChatChunkChoice]:
        choices: list[schema.ChatChunkChoice] = []
        if not progress.begun:
            opening = schema.ChatDelta(role="assistant", content="")
            if self._openai:
                opening.refusal = None
            choices.append(self._choice(delta.index, opening, progress))
            progress.begun = True
        if self._shows(delta):
            entries = [self._token(entry, progress) for entry in delta.logprobs]
            choices.append(self._choice(delta.index, schema.ChatDelta(content=delta.text), progress, entries))
        if delta.finish_reason is not None:
            choices.append(self._choice(delta.index, schema.ChatDelta(), progress))
            choices[-1].finish_reason = _finish_reason(delta)
        return choices

    def _choice(
        self, index: int, delta: schema.ChatDelta, progress: Progress, entries: list[schema.TokenLogprob] | None = None
    ) -> schema.ChatChunkChoice:
        choice = schema.ChatChunkChoice(index=index, delta=delta, finish_reason=None)
        self._add_logprobs(choice, entries)
        if progress.begun:
            self._add_ids(choice, progress.take_ids(), [])
        else:
            self._add_ids(choice, [], progress.prompt.ids)
        return choice

    def _add_logprobs(self, choice: ChatChoice, entries: list[schema.TokenLogprob] | None) -> None:
        if entries is not None and self.arguments.logprobs is not None:
            choice.logprobs = schema.ChatLogprobs(content=entries, refusal=None)
        elif self._openai:
            choice.logprobs = None

    def _token(self, entry: TokenLogprobs, progress: Progress) -> schema.TokenLogprob:
        token = chat_token(entry, self.vocabulary, progress.blank)
        progress.blank = progress.blank and entry.token_id in self.vocabulary.blank
        return token


class CompletionAnswer(Answer[schema.Completion, schema.Completion]):
    """Answers of completions: whole and chunk have the same shape."""

    whole_type = chunk_type = schema.Completion

    def _folded(self, index: int, parts: list[schema.CompletionChoice]) -> schema.CompletionChoice:
        logprobs = parts[0].logprobs
        if logprobs is not None and self.arguments.logprobs is not None:
            for part in parts[1:]:
                extend(logprobs, part.logprobs)
        text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
        choice = schema.CompletionChoice(text=text, index=index, logprobs=logprobs, finish_reason=reason)
        self._add_ids(choice, [i for part in parts for i in part.token_ids], parts[0].prompt_token_ids)
        return choice

    def _choices(self, delta: Delta, progress: Progress) -> list[schema.CompletionChoice]:
        first, arguments = not progress.begun, self.arguments
        echo = arguments.echo and first
        if not (echo or self._shows(delta) or delta.finish_reason is not None):
            return []
        logprobs: schema.CompletionLogprobs | None = None if self._openai else schema.CompletionLogprobs()
        if arguments.logprobs is not None:
            logprobs = schema.CompletionLogprobs(tokens=[], token_logprobs=[], text_offset=[])
            logprobs.top_logprobs = [] if arguments.logprobs else None
            if echo:
                add_prompt(logprobs, progress.prompt, delta.prompt_logprobs or [], self.vocabulary)
            add_tokens(logprobs, delta, len(progress.prompt.text) if arguments.echo else 0, self.vocabulary)
        text = progress.prompt.text + delta.text if echo else delta.text
        reason = _finish_reason(delta)
        choice = schema.CompletionChoice(text=text, index=delta.index, logprobs=logprobs, finish_reason=reason)
        self._add_ids(choice, progress.take_ids(), progress.prompt.ids if first else [])
        progress.begun = True
        return [choice]


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """Deltas that gathered, as one for each sequence: a slow reader gets larger chunks, not more of them."""
    merged: dict[int, Delta] = {}
    for delta in deltas:
        into = merged.setdefault(delta.index, delta)
        if into is delta:
            continue
        into.token_ids += delta.token_ids
        into.text += delta.text
        into.logprobs += delta.logprobs
        into.offsets += delta.offsets
        into.finish_reason = delta.finish_reason
        if delta.prompt_logprobs is not None:
            into.prompt_logprobs = delta.prompt_logprobs
    return list(merged.values())


def _attach(target: schema.Object, name: str, value: Any, on_wire: bool) -> None:
    """Set a field. Off the wire it is for callers in process only, and does not count as set."""
    setattr(target, name, value)
    if not on_wire:
        target.model_fields_set.discard(name)


def _finish_reason(delta: Delta) -> schema.FinishReason | None:
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason is FinishReason.LENGTH else "stop"


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round((end - start) * 1000, 3)
