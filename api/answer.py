"""`Answer`: what the engine delivers becomes chunks, and the same chunks become one whole answer.

Deltas go in, chunk objects come out; a streamed answer is those chunks, a whole one is folded from them. So the two can
only be equal. No threads, no I/O, no clock but the one whose readings it is given.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from api.arguments import Arguments
from api.echo import Prompt
from api.logprobs import add_prompt, add_tokens, chat_token, extend
from api.schema import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionTokensDetails,
    Explain,
    FinishReason,
    PromptTokensDetails,
    Step,
    TokenLogprob,
    Usage,
)
from llama.sequence import FinishReason as Finished
from llama.sequence import TokenLogprobs
from llama.stream import Delta, RequestStats
from llama.tokenizer import Vocabulary

Compat = Literal["openai", "anyscale"]
MARK = "\0"  # stands for a text that is put in later; nothing else in a chunk can have it
Whole = TypeVar("Whole", ChatCompletion, Completion)
Chunk = TypeVar("Chunk", ChatCompletionChunk, Completion)

WithIds = TypeVar("WithIds", ChatChoice, ChatChunkChoice, CompletionChoice)
WithPromptIds = TypeVar("WithPromptIds", ChatCompletion, ChatCompletionChunk)
Dressed = TypeVar("Dressed", ChatCompletion, ChatCompletionChunk, Completion)


@dataclass
class Heading:
    """What every object of one answer begins with."""

    model: str
    created: int
    fingerprint: str
    compat: Compat = "openai"
    request_id: str = field(default_factory=lambda: secrets.token_urlsafe(32))  # 43 characters

    @property
    def id(self) -> str:
        return f"{self.model}-{self.request_id}"


@dataclass
class Progress:
    """One sequence so far. pending_ids: counted, not yet in a chunk. blank: a chat answer's text has not begun.

    frame: what stands before and after the text in the wire form of its chunks, once it is known.
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


class Answer(ABC, Generic[Whole, Chunk]):
    """The answer to one request, from its first delta to its last; one subclass for each endpoint.

    prompts: as the engine got them; sequence p * best_of + j belongs to prompts[p]. stats: of the request, read when
    usage or `explain` are made. seed: the one that was used, where there was one for all prompts.
    """

    def __init__(
        self,
        arguments: Arguments,
        heading: Heading,
        prompts: Sequence[Prompt],
        vocabulary: Vocabulary,
        stats: RequestStats,
        seed: int | None = None,
    ) -> None:
        self.arguments, self.heading, self.prompts = arguments, heading, prompts
        self.stats, self.seed = stats, seed
        self._vocabulary = vocabulary
        self._openai = heading.compat == "openai"
        self._progress = [Progress(prompt) for prompt in prompts for _ in range(arguments.best_of)]
        self._unfinished = len(self._progress)
        self._first = True

    def chunks(self, delta: Delta) -> list[Chunk]:
        """The chunks that a delta makes: none, if there is nothing to show yet."""
        progress = self._count(delta)
        progress.pending_ids += delta.token_ids
        chunks = self._choices(delta, progress)
        progress.begun = progress.begun or bool(chunks)
        if delta.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished and self.arguments.stream:
                self._end(chunks)
        return chunks

    def wire(self, delta: Delta) -> list[str]:
        """The same chunks as JSON. Most only add text: those are the first such one of their choice with another text,
        made without any objects, which would cost more than everything else that is done for a streamed token."""
        progress, asked = self._progress[delta.index], self.arguments
        plain = progress.begun and delta.text and delta.finish_reason is None
        if not plain or asked.logprobs is not None or asked.return_token_ids:
            return [chunk.to_json() for chunk in self.chunks(delta)]
        if progress.frame is None:
            (chunk,) = self._choices(Delta(delta.index, [], MARK), progress)
            before, _, after = chunk.to_json().rpartition(json.dumps(MARK))
            progress.frame = before, after
        self._count(delta)
        before, after = progress.frame
        return [before + json.dumps(delta.text) + after]

    @abstractmethod
    def whole(self, chunks: Iterable[Chunk]) -> Whole:
        """All chunks of the answer, folded into one object."""

    @property
    def usage(self) -> Usage:
        """Of what was delivered until now."""
        n_prompt = sum(len(prompt.ids) for prompt in self.prompts)
        n_answer = sum(progress.n_tokens for progress in self._progress)
        usage = Usage(prompt_tokens=n_prompt, completion_tokens=n_answer, total_tokens=n_prompt + n_answer)
        if not self._openai:
            return usage
        return usage.set(
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.stats.cached_tokens, audio_tokens=0),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
            ),
        )

    def _count(self, delta: Delta) -> Progress:
        progress = self._progress[delta.index]
        progress.n_tokens += len(delta.token_ids)
        progress.sum_logprobs += sum(entry.logprob for entry in delta.logprobs)
        return progress

    @abstractmethod
    def _choices(self, delta: Delta, progress: Progress) -> list[Chunk]: ...

    @abstractmethod
    def _chunk(self, choices: list[Any]) -> Chunk: ...

    def _shows(self, delta: Delta) -> bool:
        """Whether a delta needs a chunk: tokens without text do if their ids or logprobs were asked for."""
        asked = self.arguments.logprobs is not None or self.arguments.return_token_ids
        return bool(delta.text or (delta.token_ids and asked))

    def _end(self, chunks: list[Chunk]) -> None:
        """What comes with, or after, the last chunk of a stream."""
        if not self._openai:
            chunks[-1].set(usage=self.usage)
            return
        if self.arguments.include_usage:
            chunks.append(self._chunk([]).set(usage=self.usage))
        if self.arguments.explain:
            chunks[-1].set(explain=self._explain())

    def _dress(self, made: Dressed, first: bool = True) -> Dressed:
        """The fields that answers and chunks have in common; first: only then what needs to be said once."""
        if not self._openai:
            return made.keep(ignored_parameters=self.arguments.ignored)
        made.set(system_fingerprint=self.heading.fingerprint)
        if first and self.arguments.ignored:
            made.set(ignored_parameters=self.arguments.ignored)
        return made

    def _head(self) -> dict[str, Any]:
        return {"id": self.heading.id, "created": self.heading.created, "model": self.heading.model}

    def _ids(self, choice: WithIds, generated: list[int], prompt: list[int]) -> WithIds:
        """Token ids: always there as attributes, on the wire where they were asked for."""
        if self._openai and self.arguments.return_token_ids:
            return choice.set(token_ids=generated).keep(prompt_token_ids=prompt)
        return choice.keep(token_ids=generated, prompt_token_ids=prompt)

    def _best(self) -> list[int]:
        """Which sequences become choices 0, 1, ...: of each prompt's best_of the n of best mean logprob."""
        n, best_of = self.arguments.n, self.arguments.best_of
        best: list[int] = []
        for start in range(0, len(self._progress), best_of):
            group = range(start, start + best_of)
            best += sorted(group, key=lambda i: -self._progress[i].mean_logprob)[:n] if best_of > n else group
        return best

    def _explain(self) -> Explain:
        stats = self.stats
        return Explain(
            seed=self.seed,
            queue_ms=_ms(stats.submitted, stats.first_scheduled),
            prefill_ms=_ms(stats.first_scheduled, stats.first_token),
            first_token_ms=_ms(stats.submitted, stats.first_token),
            decode_ms=_ms(stats.first_token, stats.finished),
            total_ms=_ms(stats.submitted, stats.finished),
            cached_tokens=stats.cached_tokens,
            preemptions=stats.preemptions,
            steps=[
                Step(
                    tokens=step.n_tokens,
                    batch_sequences=step.batch_seqs,
                    batch_tokens=step.batch_tokens,
                    ms=round(step.seconds * 1000, 3),
                )
                for step in stats.steps or []
            ],
        )


class ChatAnswer(Answer[ChatCompletion, ChatCompletionChunk]):
    """Answers of chat.completions."""

    def whole(self, chunks: Iterable[ChatCompletionChunk]) -> ChatCompletion:
        parts: list[list[ChatChunkChoice]] = [[] for _ in self._progress]
        for chunk in chunks:
            for choice in chunk.choices:
                parts[choice.index].append(choice)
        choices = [self._folded(index, parts[i]) for index, i in enumerate(self._best())]
        kind: Literal["chat.completion", "text_completion"] = "chat.completion" if self._openai else "text_completion"
        made = self._dress(ChatCompletion(object=kind, choices=choices, usage=self.usage, **self._head()))
        if self.arguments.explain and self._openai:
            made.set(explain=self._explain())
        return self._prompt_ids(made)

    def _folded(self, index: int, parts: list[ChatChunkChoice]) -> ChatChoice:
        message = ChatMessage(role="assistant", content="".join(part.delta.content or "" for part in parts))
        choice = ChatChoice(index=index, message=message, finish_reason=parts[-1].finish_reason)
        if self.arguments.logprobs is not None:
            content = [token for part in parts if part.logprobs for token in part.logprobs.content]
            choice.set(logprobs=ChatLogprobs(content=content, refusal=None))
        elif self._openai:
            choice.set(logprobs=None)
        if self._openai:
            message.set(refusal=None)
        return self._ids(choice, [i for part in parts for i in part.token_ids], parts[0].prompt_token_ids)

    def _choices(self, delta: Delta, progress: Progress) -> list[ChatCompletionChunk]:
        made: list[ChatCompletionChunk] = []
        if not progress.begun:
            opening = ChatDelta(role="assistant", content="")
            made.append(self._part(delta.index, opening.set(refusal=None) if self._openai else opening, progress))
            progress.begun = True
        if self._shows(delta):
            part = self._part(delta.index, ChatDelta(content=delta.text), progress)
            if self.arguments.logprobs is not None:
                content = [self._token(entry, progress) for entry in delta.logprobs]
                part.choices[0].set(logprobs=ChatLogprobs(content=content, refusal=None))
            made.append(part)
        if delta.finish_reason is not None:
            end = self._part(delta.index, ChatDelta(), progress)
            end.choices[0].set(finish_reason=_finish_reason(delta))
            made.append(end)
        return made

    def _token(self, entry: TokenLogprobs, progress: Progress) -> TokenLogprob:
        shown = chat_token(entry, self._vocabulary, progress.blank)
        progress.blank = progress.blank and entry.token_id in self._vocabulary.blank
        return shown

    def _part(self, index: int, delta: ChatDelta, progress: Progress) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=None)
        if self._openai:
            choice.set(logprobs=None)
        first = not progress.begun
        ids: list[int] = []
        if not first:
            ids, progress.pending_ids = progress.pending_ids, ids
        return self._chunk([self._ids(choice, ids, progress.prompt.ids if first else [])])

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        kind: Literal["chat.completion.chunk", "text_completion"] = (
            "chat.completion.chunk" if self._openai else "text_completion"
        )
        made = self._dress(ChatCompletionChunk(object=kind, choices=choices, **self._head()), self._first)
        if self._first:
            self._prompt_ids(made)
        if self._openai and self.arguments.include_usage:
            made.set(usage=None)
        self._first = False
        return made

    def _prompt_ids(self, made: WithPromptIds) -> WithPromptIds:
        if self._openai and self.arguments.return_token_ids:
            return made.set(prompt_token_ids=self.prompts[0].ids)
        return made.keep(prompt_token_ids=self.prompts[0].ids)


class CompletionAnswer(Answer[Completion, Completion]):
    """Answers of completions: whole and chunk have the same shape."""

    def whole(self, chunks: Iterable[Completion]) -> Completion:
        parts: list[list[CompletionChoice]] = [[] for _ in self._progress]
        for chunk in chunks:
            for choice in chunk.choices:
                parts[choice.index].append(choice)
        choices = [self._folded(index, parts[i]) for index, i in enumerate(self._best())]
        made = Completion(object="text_completion", choices=choices, usage=self.usage, **self._head())
        if self.arguments.explain and self._openai:
            made.set(explain=self._explain())
        return self._dress(made)

    def _folded(self, index: int, parts: list[CompletionChoice]) -> CompletionChoice:
        logprobs = parts[0].logprobs
        if logprobs is not None and self.arguments.logprobs is not None:
            for part in parts[1:]:
                extend(logprobs, part.logprobs)
        choice = CompletionChoice(
            text="".join(part.text for part in parts),
            index=index,
            logprobs=logprobs,
            finish_reason=parts[-1].finish_reason,
        )
        ids = [i for part in parts for i in part.token_ids]
        return self._with_ids(choice, ids, parts[0].prompt_token_ids)

    def _choices(self, delta: Delta, progress: Progress) -> list[Completion]:
        first, arguments = not progress.begun, self.arguments
        echo = arguments.echo and first
        if not (echo or self._shows(delta) or delta.finish_reason is not None):
            return []
        logprobs: CompletionLogprobs | None = None if self._openai else CompletionLogprobs()
        if arguments.logprobs is not None:
            logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], text_offset=[])
            logprobs.set(top_logprobs=[] if arguments.logprobs else None)
            if echo:
                add_prompt(logprobs, progress.prompt, delta.prompt_logprobs or [], self._vocabulary)
            add_tokens(logprobs, delta, len(progress.prompt.text) if arguments.echo else 0, self._vocabulary)
        choice = CompletionChoice(
            text=progress.prompt.text + delta.text if echo else delta.text,
            index=delta.index,
            logprobs=logprobs,
            finish_reason=_finish_reason(delta),
        )
        ids, progress.pending_ids = progress.pending_ids, []
        return [self._chunk([self._with_ids(choice, ids, progress.prompt.ids if first else [])])]

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        made = self._dress(Completion(object="text_completion", choices=choices, **self._head()), self._first)
        if self._openai and self.arguments.include_usage:
            made.set(usage=None)
        self._first = False
        return made

    def _with_ids(self, choice: CompletionChoice, generated: list[int], prompt: list[int]) -> CompletionChoice:
        self._ids(choice, generated, prompt)
        if prompt and self._openai and self.arguments.return_token_ids:
            choice.set(prompt_token_ids=prompt)
        return choice


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """Deltas that gathered, as one for each sequence; a slow reader so gets larger chunks, not more of them."""
    merged: dict[int, Delta] = {}
    for delta in deltas:
        into = merged.get(delta.index)
        if into is None:
            merged[delta.index] = delta
            continue
        into.token_ids += delta.token_ids
        into.text += delta.text
        into.logprobs += delta.logprobs
        into.offsets += delta.offsets
        into.finish_reason = delta.finish_reason
        if delta.prompt_logprobs is not None:
            into.prompt_logprobs = delta.prompt_logprobs
    return list(merged.values())


def _finish_reason(delta: Delta) -> FinishReason | None:
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason is Finished.LENGTH else "stop"


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round((end - start) * 1000, 3)
