"""Ids to text, piece by piece, for one sequence: whole characters, and nothing that a stop string may still take back.

The returned texts, joined, are what SentencePiece decodes from all ids at once, cut before the first stop string. Up
to three bytes that may become a character are kept back, and the longest tail that may become a stop string.
"""

from __future__ import annotations

import codecs
from functools import lru_cache

from llama.tokenizer import Vocabulary

REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one sequence. Not thread-safe.

    skip_first_mark: drop the first word mark. True for a chat answer, which is decoded on its own;
    `vocabulary.is_blank(prompt_ids)` for a completion. stop: strings that end the text, none of them empty.

    In characters of the generated text:
    length    decoded so far, held back or not; after a stop string or `finish`, the length of the final text
    released  returned so far
    offset    where the text of the last pushed id begins; never goes back, the same for ids that share a character
    stopped   a stop string was found; nothing more may be pushed
    at_start  the next id's word mark will be dropped

    The offset to report is min(offset, length). It is final when `released` reaches it, or the sequence has ended.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_first_mark: bool, stop: tuple[str, ...] = ()) -> None:
        self.length = 0
        self.offset = 0
        self.stopped = False
        self.at_start = skip_first_mark
        self._vocabulary = vocabulary
        self._texts = vocabulary.texts  # one attribute look-up less in push
        self._tail = b""  # bytes of a character that is not complete
        self._stops = compile_stops(stop) if stop else None
        self._state = 0  # of `_stops`
        self._held = ""  # decoded, and a proper prefix of a stop string

    @property
    def released(self) -> int:
        """Characters returned so far."""
        return self.length - len(self._held)

    def push(self, token_id: int, match_stops: bool = True) -> str:
        """The text that this id releases, often the id's own. match_stops=False: not looked at for stop strings."""
        text = self._texts[token_id]
        if text is None or self._tail or self.at_start:
            text = self._decode(token_id)
        else:
            self.offset = self.length
            self.length += len(text)
        if self._stops is None:
            return text
        return self._match(self._stops, text) if match_stops else self._let_go(text)

    def finish(self, match_stops: bool = True) -> str:
        """The text still held back, once no more ids will come; a stop string may be completed by it."""
        text = REPLACEMENT * len(self._tail)
        self._tail = b""
        self.length += len(text)
        if self._stops is not None and match_stops:
            return self._match(self._stops, text) + self._let_go("")
        return self._let_go(text)

    def _decode(self, token_id: int) -> str:
        """The characters that this id completes: bytes, control ids, and whatever follows a tail or begins the text."""
        vocabulary = self._vocabulary
        byte = vocabulary.byte_values.get(token_id)
        if byte is not None:
            self.at_start = False
            text, self._tail = take_characters(self._tail + byte)
            self.length += len(text)
            self.offset = self.length if self._tail else self.length - 1  # the character that this byte lies in
            return text
        broken = REPLACEMENT * len(self._tail)  # any other id, a control id too, ends a run of bytes
        self._tail = b""
        own = (vocabulary.first_texts if self.at_start else vocabulary.texts)[token_id] or ""
        self.at_start = self.at_start and token_id in vocabulary.blank
        self.offset = self.length + len(broken)
        self.length = self.offset + len(own)
        return broken + own

    def _match(self, stops: StopStrings, text: str) -> str:
        """Take in new text, return what no stop string can take back any more. Each character is read once."""
        state = self._state
        if state == 0 and stops.first.isdisjoint(text):
            return text
        edges, fallback = stops.edges, stops.fallback
        seen = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            while state and character not in edges[state]:
                state = fallback[state]
            state = edges[state].get(character, 0)
            if stops.complete[state]:
                self.stopped = True
                return self._cut(seen, end - stops.complete[state])
        self._state = state
        safe = len(seen) - stops.depth[state]
        self._held = seen[safe:]
        return seen[:safe]

    def _cut(self, seen: str, end: int) -> str:
        """The text ends here: forget what was decoded beyond `seen[:end]`."""
        self._held, self._state, self._tail = "", 0, b""
        self.length -= len(seen) - end
        return seen[:end]

    def _let_go(self, text: str) -> str:
        """Release everything: what comes is not matched, so nothing before it can become a stop string either."""
        text = self._held + text
        self._held, self._state = "", 0
        return text


def take_characters(data: bytes) -> tuple[str, bytes]:
    """The characters of `data`, and the tail of at most 3 bytes that may still become one.

    A byte that cannot be part of a character gives one U+FFFD, as in SentencePiece; Python's "replace" gives one a run.
    """
    text = ""
    while True:
        try:
            characters, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as fault:
            text += data[: fault.start].decode() + REPLACEMENT
            data = data[fault.start + 1 :]
        else:
            text, tail = text + characters, data[used:]
            if tail[:1] == b"\xed" and tail[1:] >= b"\xa0":  # a surrogate; Python waits for its third byte all the same
                return text + REPLACEMENT * 2, b""
            return text, tail


class StopStrings:
    """Several strings looked for at once, reading each character of a text once.

    State s is a prefix of one of the strings: the longest that the text read so far ends with. 0 is the empty prefix.
    edges[s]     the states one character longer
    fallback[s]  the state of the longest proper suffix of that prefix
    depth[s]     its length: as many characters may still become a stop string
    complete[s]  length of the longest stop string that it ends with, 0 if none
    Source: Aho, Corasick, "Efficient string matching: an aid to bibliographic search", CACM 18(6), 1975.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        assert strings and all(strings), "stop strings are checked with the request"
        self.edges: list[dict[str, int]] = [{}]
        self.fallback, self.depth, self.complete = [0], [0], [0]
        for string in strings:
            state = 0
            for character in string:
                state = self._grow(state, character)
            self.complete[state] = len(string)
        self.first = frozenset(self.edges[0])
        self._link()

    def _grow(self, state: int, character: str) -> int:
        if character not in self.edges[state]:
            self.edges[state][character] = len(self.edges)
            self.edges.append({})
            self.fallback.append(0)
            self.depth.append(self.depth[state] + 1)
            self.complete.append(0)
        return self.edges[state][character]

    def _link(self) -> None:
        """Fill `fallback`, shortest prefixes first: a fallback is always shorter, hence known."""
        queue = list(self.edges[0].values())
        for state in queue:  # grows while it is read
            for character, longer in self.edges[state].items():
                shorter = self.fallback[state]
                while shorter and character not in self.edges[shorter]:
                    shorter = self.fallback[shorter]
                self.fallback[longer] = self.edges[shorter].get(character, 0)
                self.complete[longer] = self.complete[longer] or self.complete[self.fallback[longer]]
                queue.append(longer)


@lru_cache(maxsize=32)
def compile_stops(strings: tuple[str, ...]) -> StopStrings:
    """One automaton for all choices of a request; it is never changed after it is built."""
    return StopStrings(strings)
