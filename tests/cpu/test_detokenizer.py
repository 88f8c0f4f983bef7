"""Detokenizer: the stream, joined, is SentencePiece's own decoding, cut at the first stop string; and it holds back no
more than it must. Every oracle here is brute force over the whole text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.detokenizer import Detokenizer, compile_stops, take_characters
from llama.tokenizer import Tokenizer, Vocabulary

MODELS = ["tiny", "tokenizer", "models/stories260K-hf", "models/babyllama361-hf"]

# All byte strings that begin a character without completing it; the last byte of a character has six free bits.
BEGINNINGS = {
    code[:n]
    for point in range(0x80, 0x110000, 64)
    if not 0xD800 <= point < 0xE000
    for code in [chr(point).encode()]
    for n in range(1, len(code))
}

# Ids 0.. of a vocabulary without SentencePiece behind it: letters, pairs, all bytes.
LETTERS = ("a", "b", "c", "ab", "bc", "cab", " a", " ")
TOY = Vocabulary(
    names=(*LETTERS, "<s>", *(f"bytes:\\x{i:02x}" for i in range(256))),
    texts=(*LETTERS, None, *[None] * 256),
    first_texts=("a", "b", "c", "ab", "bc", "cab", "a", "", None, *[None] * 256),
    byte_values={9 + i: bytes([i]) for i in range(256)},
    blank=frozenset({8}),
    max_piece_chars=3,
)


@pytest.fixture(params=MODELS)
def tokenizer(
    request: pytest.FixtureRequest, shared_file: Callable[[str], Path], tiny_tokenizer: Tokenizer
) -> Tokenizer:
    return tiny_tokenizer if request.param == "tiny" else Tokenizer(shared_file(f"{request.param}/tokenizer.model"))


def cut_at_first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The rule itself: the first stop string to complete wins, the longest if several complete at once."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text.endswith(stop, 0, end)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


def longest_hold(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest tail of `text` that is a proper prefix of some stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """Pieces of text as released, `finish` last."""
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()]


def random_ids(rng: random.Random, vocabulary: Vocabulary) -> list[int]:
    """Sequences that meet the rare cases often: bytes of whole characters, stray bytes, control ids, marks, repeats."""
    byte_ids = {value[0]: token_id for token_id, value in vocabulary.byte_values.items()}
    size = len(vocabulary.names)
    ids: list[int] = []
    for _ in range(rng.randrange(12)):
        kind = rng.random()
        if kind < 0.5:
            ids.append(rng.randrange(size))
        elif kind < 0.65:
            ids += [byte_ids[b] for b in chr(rng.choice((0x41, 0xE9, 0x4F60, 0x1F600, 0xFFFD, 0x10FFFF))).encode()]
        elif kind < 0.8:
            ids.append(byte_ids[rng.choice((0x41, 0x80, 0xBD, 0xC3, 0xE4, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0x90, 0xFF))])
        elif kind < 0.9:
            ids.append(rng.randrange(3))
        else:
            ids.append(vocabulary.names.index(" "))
    return ids


def random_stops(rng: random.Random, text: str) -> tuple[str, ...]:
    """Up to 4 stop strings, most of them cut from the text so that they, or their beginnings, occur."""
    stops = []
    for _ in range(rng.randrange(5)):
        start = rng.randrange(len(text) + 1)
        stop = text[start : start + rng.randrange(1, 8)]
        stops.append((stop + rng.choice(("", "", "x", "\ufffd"))) or "x")
    return tuple(stops)


# --- stream = whole = SentencePiece ----------------------------------------------------------------------------------


def test_stream_is_what_sentencepiece_decodes(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(1500):
        ids = random_ids(rng, tokenizer.vocabulary)
        whole = tokenizer.decode(ids)
        detokenizer = Detokenizer(tokenizer.vocabulary, skip_first_mark=True)
        assert "".join(stream(detokenizer, ids)) == whole, ids
        assert detokenizer.length == detokenizer.released == len(whole)

        stops = random_stops(rng, whole)
        detokenizer = Detokenizer(tokenizer.vocabulary, skip_first_mark=True, stop=stops)
        text = "".join(stream(detokenizer, ids))
        assert (text, detokenizer.stopped) == cut_at_first_stop(whole, stops), (ids, stops)
        assert detokenizer.length == detokenizer.released == len(text)


def test_completion_is_what_the_answer_adds_to_the_prompt(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    mark = tokenizer.vocabulary.names.index(" ")
    prompts = [[], [1], [1, 2, 1], [1, mark], [1, mark, 2], [0], [1, *tokenizer.encode("the sea")], [1, 3 + 0x41]]
    for _ in range(1500):
        prompt, answer = rng.choice(prompts), random_ids(rng, tokenizer.vocabulary)
        before = tokenizer.decode(prompt)
        added = tokenizer.decode(prompt + answer)[len(before) :]
        detokenizer = Detokenizer(tokenizer.vocabulary, skip_first_mark=tokenizer.vocabulary.is_blank(prompt))
        assert "".join(stream(detokenizer, answer)) == added, (prompt, answer)


def test_only_what_may_still_change_is_held_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(400):
        ids = random_ids(rng, tokenizer.vocabulary)
        stops = random_stops(rng, tokenizer.decode(ids))
        detokenizer = Detokenizer(tokenizer.vocabulary, skip_first_mark=True, stop=stops)
        released = ""
        for n, token_id in enumerate(ids, 1):
            released += detokenizer.push(token_id)
            if detokenizer.stopped:
                break
            run = b""  # the bytes at the end that may still become a character
            for last in reversed(ids[:n]):
                if last not in tokenizer.vocabulary.byte_values:
                    break
                run = tokenizer.vocabulary.byte_values[last] + run
            tail = max((k for k in (1, 2, 3) if run[-k:] in BEGINNINGS and k <= len(run)), default=0)
            decoded = tokenizer.decode(ids[: n - tail])
            assert released == decoded[: len(decoded) - longest_hold(decoded, stops)], (ids[:n], stops)
            assert (detokenizer.length, detokenizer.released) == (len(decoded), len(released))


def test_chat_answer_of_the_origin_page(llama2_tokenizer: Tokenizer) -> None:
    text = " Sure! Test. Is there anything else I can assist you with?"
    ids = llama2_tokenizer.encode(text)
    pieces = stream(Detokenizer(llama2_tokenizer.vocabulary, skip_first_mark=True), ids)
    assert pieces[:4] == ["", " Sure", "!", " Test"], "the bare mark 29871 goes, the space of the word stays"
    assert "".join(pieces) == text


@given(text=st.text(), chat=st.booleans())
def test_any_text_streams_back(tiny_tokenizer: Tokenizer, text: str, chat: bool) -> None:
    ids = tiny_tokenizer.encode(text)
    out = "".join(stream(Detokenizer(tiny_tokenizer.vocabulary, skip_first_mark=chat), ids))
    assert out == ("" if chat or not ids else " ") + text.replace("\u2581", " ")


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text", "tail"),
    [
        (b"", "", b""),
        ("é你😀".encode(), "é你😀", b""),
        (b"\xe4\xbd", "", b"\xe4\xbd"),
        (b"\xf0\x9f\x98", "", b"\xf0\x9f\x98"),
        (b"\xe4\xbdx", "\ufffd\ufffdx", b""),
        (b"\xe4\xe4\xbd", "\ufffd", b"\xe4\xbd"),
        (b"\xed\xa0", "\ufffd\ufffd", b""),  # a surrogate
        (b"\xe0\x80", "\ufffd\ufffd", b""),  # longer than it need be
        (b"\xc0", "\ufffd", b""),
        (b"\xf4\x90", "\ufffd\ufffd", b""),  # beyond U+10FFFF
        (b"\xef\xbf\xbd", "\ufffd", b""),  # the character U+FFFD itself
    ],
)
def test_take_characters(data: bytes, text: str, tail: bytes) -> None:
    assert take_characters(data) == (text, tail)


@given(data=st.one_of(st.binary(max_size=12), st.text(max_size=3).map(str.encode)), cut=st.integers(0, 12))
def test_bytes_decode_alike_in_one_and_in_two_parts(tiny_tokenizer: Tokenizer, data: bytes, cut: int) -> None:
    first, tail = take_characters(data[:cut])
    assert not tail or tail in BEGINNINGS
    second, rest = take_characters(tail + data[cut:])
    assert (first + second, rest) == take_characters(data)
    assert first + second + "\ufffd" * len(rest) == tiny_tokenizer.decode([3 + byte for byte in data])


# --- stop strings ----------------------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.integers(0, len(LETTERS)), max_size=20),
    stops=st.lists(st.text(alphabet="abc ", min_size=1, max_size=5), max_size=4).map(tuple),
)
def test_first_to_complete_wins_then_the_longest(ids: list[int], stops: tuple[str, ...]) -> None:
    whole = "".join(TOY.texts[i] or "" for i in ids)
    detokenizer = Detokenizer(TOY, skip_first_mark=False, stop=stops)
    text = "".join(stream(detokenizer, ids))
    assert (text, detokenizer.stopped) == cut_at_first_stop(whole, stops)
    # Token borders do not matter: the same characters one by one end in the same place.
    by_character = Detokenizer(TOY, skip_first_mark=False, stop=stops)
    singles = [TOY.texts.index(character) for character in whole]
    assert "".join(stream(by_character, singles)) == text


def test_stop_inside_and_across_tokens() -> None:
    def pieces(ids: list[int], *stops: str) -> list[str]:
        return stream(Detokenizer(TOY, skip_first_mark=False, stop=stops), ids)

    a, b, c, ab, cab = 0, 1, 2, 3, 5
    assert pieces([a, b, c, a], "bc") == ["a", "", "", ""]
    assert pieces([cab, c], "a") == ["c", ""], "text is cut inside a token"
    assert pieces([a, b, a], "abc") == ["", "", "ab", "a"], "released when it can no longer match, or at the end"
    assert pieces([ab, ab, c], "abc") == ["", "ab", "", ""]
    assert pieces([a, b, c], "abc", "b") == ["", "a", ""], "b completes first"
    assert pieces([a, b, c], "bc", "abc", "c") == ["", "", "", ""], "of those that complete at once, the longest"


def test_stop_string_in_the_flushed_tail() -> None:
    detokenizer = Detokenizer(TOY, skip_first_mark=False, stop=("\ufffd\ufffd",))
    assert stream(detokenizer, [0, 9 + 0xE4, 9 + 0xBD]) == ["a", "", "", ""]
    assert detokenizer.stopped
    detokenizer = Detokenizer(TOY, skip_first_mark=False, stop=("\ufffd\ufffd",))
    assert [detokenizer.push(i) for i in (0, 9 + 0xE4, 9 + 0xBD)] == ["a", "", ""]
    assert detokenizer.finish(match_stops=False) == "\ufffd\ufffd"
    assert not detokenizer.stopped


def test_text_that_is_not_looked_at() -> None:
    detokenizer = Detokenizer(TOY, skip_first_mark=False, stop=("ab",))
    assert [detokenizer.push(i, match_stops=False) for i in (0, 1, 0)] == ["a", "b", "a"]
    assert [detokenizer.push(i) for i in (1, 0)] == ["b", ""], "and is no beginning of a stop string either"
    assert detokenizer.push(2, match_stops=False) == "ac", "what was held goes out with it"
    assert [detokenizer.push(i) for i in (2, 3)] == ["c", ""]
    assert detokenizer.stopped
    assert (detokenizer.finish(), detokenizer.length) == ("", 7)


def test_long_stop_strings_take_no_longer() -> None:
    """4 strings of 256 characters that nearly match all the time; a quadratic search would take minutes."""
    stops = ("a" * 255 + "b", "a" * 254 + "c", "ab" * 128, "aab" * 85)
    detokenizer = Detokenizer(TOY, skip_first_mark=False, stop=stops)
    started = time.perf_counter()
    text = "".join([detokenizer.push(0) for _ in range(4000)])
    assert time.perf_counter() - started < 2
    assert len(text) == 4000 - 255
    assert detokenizer.finish() == "a" * 255


def test_choices_of_a_request_share_one_automaton() -> None:
    assert compile_stops(("x", "y")) is compile_stops(("x", "y"))


# --- offsets ---------------------------------------------------------------------------------------------------------


def offsets(detokenizer: Detokenizer, ids: list[int]) -> list[int]:
    """Offsets as logprobs report them: each as soon as it is final, and final means that it never changes."""
    waiting: list[int] = []
    reported: list[int] = []
    for token_id in ids:
        detokenizer.push(token_id)
        waiting.append(detokenizer.offset)
        while waiting and waiting[0] <= detokenizer.released and not detokenizer.stopped:
            reported.append(waiting.pop(0))
        if detokenizer.stopped:
            break
    detokenizer.finish()
    return reported + [min(offset, detokenizer.length) for offset in waiting]


def test_offsets_of_ordinary_tokens() -> None:
    assert offsets(Detokenizer(TOY, skip_first_mark=False), [5, 6, 0, 8]) == [0, 3, 5, 6]
    assert offsets(Detokenizer(TOY, skip_first_mark=True), [8, 7, 6, 0, 8]) == [0, 0, 0, 2, 3]


def test_ids_in_one_character_share_its_offset() -> None:
    you = [9 + byte for byte in "你".encode()]
    assert offsets(Detokenizer(TOY, skip_first_mark=False), [0, *you, 3, *you]) == [0, 1, 1, 1, 2, 4, 4, 4]
    # E4 BD that no character follows: two marks, of which only the next id can tell.
    assert offsets(Detokenizer(TOY, skip_first_mark=False), [*you[:2], 0]) == [0, 0, 2]
    assert offsets(Detokenizer(TOY, skip_first_mark=False), [*you[:2], *you]) == [0, 0, 2, 2, 2]
    assert offsets(Detokenizer(TOY, skip_first_mark=False), [*you[:2], 8]) == [0, 0, 2]


def test_swallowed_ids_stand_at_the_end() -> None:
    assert offsets(Detokenizer(TOY, skip_first_mark=False, stop=("bca",)), [0, 1, 2, 0]) == [0, 1, 1, 1]
    assert offsets(Detokenizer(TOY, skip_first_mark=False, stop=("bb",)), [0, 1, 2, 0]) == [0, 1, 2, 3]


@given(
    ids=st.lists(st.one_of(st.integers(0, 8), st.sampled_from([9 + b for b in b"\xe4\xbd\xa0\xffA"])), max_size=20),
    stops=st.lists(st.text(alphabet="abc \ufffd", min_size=1, max_size=4), max_size=3).map(tuple),
    chat=st.booleans(),
)
def test_offsets_never_go_back_or_beyond(ids: list[int], stops: tuple[str, ...], chat: bool) -> None:
    detokenizer = Detokenizer(TOY, skip_first_mark=chat, stop=stops)
    found = offsets(detokenizer, ids)
    assert found == sorted(found)
    assert all(0 <= offset <= detokenizer.length for offset in found)
