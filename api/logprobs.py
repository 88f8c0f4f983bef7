"""Logprobs in OpenAI's two shapes: a list of objects for chat, four lists of equal length for completions.

Token strings are unique in the vocabulary, so the keys of a map never collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from api.prompt import Prompt, offsets
from api.schema import CompletionLogprobs, TokenLogprob, TopLogprob
from llama.sequence import TokenLogprobs
from llama.stream import Delta
from llama.tokenizer import Vocabulary

LOWEST = -9999.0  # JSON has no minus infinity


def chat_token(entry: TokenLogprobs, vocabulary: Vocabulary, first: bool) -> TokenLogprob:
    """One token in the chat shape. first: the answer's text has not begun, so a word mark adds nothing."""

    def fields(token_id: int, logprob: float) -> dict[str, Any]:
        added = vocabulary.piece_bytes(token_id, first)
        return {
            "token": vocabulary.names[token_id],
            "logprob": max(logprob, LOWEST),
            "bytes": None if added is None else list(added),
        }

    top = [TopLogprob(**fields(*pair)) for pair in _best_first(entry)]
    return TokenLogprob(**fields(entry.token_id, entry.logprob), top_logprobs=top)


def add_prompt(
    logprobs: CompletionLogprobs, prompt: Prompt, entries: Sequence[TokenLogprobs], vocabulary: Vocabulary
) -> None:
    """An echoed prompt's tokens; entries: of all but the first, which has none, for nothing comes before it."""
    logprobs.tokens += [vocabulary.names[token_id] for token_id in prompt.ids]
    logprobs.text_offset += offsets(prompt, vocabulary)
    logprobs.token_logprobs += [None, *(max(entry.logprob, LOWEST) for entry in entries)]
    if logprobs.top_logprobs is not None:
        logprobs.top_logprobs += [None, *(_map(entry, vocabulary) for entry in entries)]


def add_tokens(logprobs: CompletionLogprobs, delta: Delta, base: int, vocabulary: Vocabulary) -> None:
    """A delta's tokens. base: characters of `text` before the answer's own, those of an echoed prompt."""
    for entry, offset in zip(delta.logprobs, delta.offsets, strict=True):
        logprobs.tokens.append(vocabulary.names[entry.token_id])
        logprobs.token_logprobs.append(max(entry.logprob, LOWEST))
        logprobs.text_offset.append(base + offset)
        if logprobs.top_logprobs is not None:
            logprobs.top_logprobs.append(_map(entry, vocabulary))


def extend(into: CompletionLogprobs, more: CompletionLogprobs | None) -> None:
    """Join the lists of two chunks."""
    if more is None:
        return
    into.tokens += more.tokens
    into.token_logprobs += more.token_logprobs
    into.text_offset += more.text_offset
    if into.top_logprobs is not None:
        into.top_logprobs += more.top_logprobs or []


def _map(entry: TokenLogprobs, vocabulary: Vocabulary) -> dict[str, float]:
    """The best tokens, and the chosen one if it is not among them; its number is the same in both places."""
    pairs = (*_best_first(entry), (entry.token_id, entry.logprob))
    return {vocabulary.names[token_id]: max(logprob, LOWEST) for token_id, logprob in pairs}


def _best_first(entry: TokenLogprobs) -> list[tuple[int, float]]:
    return sorted(entry.top, key=lambda pair: (-pair[1], pair[0]))
