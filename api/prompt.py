"""`Prompt`: a prompt as the engine gets it and as an echo shows it, and where in its text each token begins.

No threads, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from llama.detokenizer import Detokenizer
from llama.tokenizer import Tokenizer, Vocabulary

# How far a decoded character is looked for in the prompt as sent, where a tokenizer does not keep texts as they are.
SEARCH = 64


@dataclass
class Prompt:
    """text: what an echo begins with. as_ids: it was sent as ids, so the text is decoded from them.

    n_added: ids in front (BOS) that the text does not spell.
    """

    ids: list[int]
    text: str = ""
    as_ids: bool = False
    n_added: int = 0


def from_text(
    text: str, tokenizer: Tokenizer, max_tokens: int, *, add_bos: bool, parse_special: bool, double_bos: bool
) -> Prompt:
    """A text prompt. add_bos: unless it spells one, or, with double_bos, even then.

    Raises InvalidRequest; ContextLengthExceeded for a text that cannot fit max_tokens, before tokenizing.
    """
    ids = tokenizer.encode_prompt(text, add_special_tokens=False, parse_special=parse_special, max_tokens=max_tokens)
    added = add_bos and (double_bos or ids[:1] != [tokenizer.bos_id])
    return Prompt([tokenizer.bos_id, *ids] if added else ids, text, n_added=int(added))


def from_ids(ids: list[int], tokenizer: Tokenizer, echo: bool) -> Prompt:
    """A prompt of ids; its text is made only for an echo."""
    return Prompt(ids, tokenizer.decode(ids) if echo else "", as_ids=True)


def offsets(prompt: Prompt, vocabulary: Vocabulary) -> list[int]:
    """For each id the character of `prompt.text` where its text begins; never goes back.

    A text prompt was encoded stretch by stretch, between the control tokens that it spells; it is walked the same way.
    A prompt of ids is one stretch.
    """
    if prompt.as_ids:
        return _walk(prompt.ids, vocabulary)[0]
    places = [0] * prompt.n_added
    start = 0
    for control, group in groupby(prompt.ids[prompt.n_added :], lambda i: _is_control(i, vocabulary)):
        if control:
            for token_id in group:
                place = prompt.text.index(vocabulary.names[token_id], start)
                places.append(place)
                start = place + len(vocabulary.names[token_id])
        else:
            places += _stretch(group, prompt.text, start, vocabulary)
    return places


def _is_control(token_id: int, vocabulary: Vocabulary) -> bool:
    return vocabulary.texts[token_id] is None and token_id not in vocabulary.byte_values


def _walk(ids: Iterable[int], vocabulary: Vocabulary) -> tuple[list[int], str]:
    """Where each id's text begins in the text of all, and that text."""
    detokenizer = Detokenizer(vocabulary, skip_first_mark=True)
    places, text = [], ""
    for token_id in ids:
        text += detokenizer.push(token_id)
        places.append(detokenizer.offset)
    return places, text + detokenizer.finish()


def _stretch(ids: Iterable[int], text: str, start: int, vocabulary: Vocabulary) -> list[int]:
    """Places in `text`, from `start` on. Some tokenizers change texts (two spaces into one): align the characters."""
    places, decoded = _walk(ids, vocabulary)
    if text.startswith(decoded, start):
        return [start + place for place in places]
    aligned, cursor = [], start
    for character in decoded:
        at = text.find(character, cursor, cursor + SEARCH)
        aligned.append(max(at, cursor))
        cursor = max(at + 1, cursor)
    aligned.append(cursor)
    return [aligned[min(place, len(decoded))] for place in places]
